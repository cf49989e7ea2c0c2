"""The queue of loads: one at a time, larger priorities first, and nobody waits for ever."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

PRIORITY_SECONDS = 1.0
"""Waiting time that one point of priority is worth: whoever waits long enough comes before any priority."""


@dataclass(eq=False, slots=True)
class Ticket:
    """A place in the queue."""

    model: str
    priority: int = 0
    queue_time: float = field(default_factory=time.time)
    """Unix seconds."""
    changed: Callable[[], None] = lambda: None
    """Called when its place has changed."""

    @property
    def order(self) -> float:
        """The smallest is next."""
        return self.queue_time - self.priority * PRIORITY_SECONDS


class LoadQueue:
    """Loads that wait for their turn. Use on the event loop only."""

    def __init__(self) -> None:
        self._waiting: list[Ticket] = []
        self._turns: dict[Ticket, asyncio.Future[None]] = {}
        self._is_taken = False

    @contextlib.asynccontextmanager
    async def turn(self, ticket: Ticket) -> AsyncIterator[None]:
        """Wait for the ticket's turn and hold it while the block runs."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns[ticket] = future
        self._waiting.append(ticket)
        self._reorder()
        try:
            await future
        except asyncio.CancelledError:
            if ticket in self._turns:
                self._remove(ticket)
                self._reorder()
            else:  # It was called in the same moment.
                self._release()
            raise
        try:
            yield
        finally:
            self._release()

    def move(self, ticket: Ticket, priority: int) -> None:
        """Give a ticket another priority."""
        ticket.priority = priority
        self._reorder()

    def position(self, ticket: Ticket) -> int:
        """1 is next; 0: it does not wait."""
        return self._waiting.index(ticket) + 1 if ticket in self._turns else 0

    def tickets(self) -> list[Ticket]:
        """Those that wait, next first."""
        return list(self._waiting)

    def _release(self) -> None:
        self._is_taken = False
        self._reorder()

    def _remove(self, ticket: Ticket) -> None:
        self._waiting.remove(ticket)
        del self._turns[ticket]

    def _reorder(self) -> None:
        """Sort, call the next one if nobody has the turn, and tell the others their places."""
        self._waiting.sort(key=lambda ticket: ticket.order)
        if self._waiting and not self._is_taken:
            ticket = self._waiting[0]
            future = self._turns[ticket]
            self._remove(ticket)
            self._is_taken = True
            future.set_result(None)
            ticket.changed()
        for ticket in self._waiting:
            ticket.changed()
