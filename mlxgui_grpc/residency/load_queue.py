"""The queue of loads: one at a time, larger priorities first, and nobody waits for ever."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from mlxgui_grpc.engine.frames import PRIORITY_SECONDS


@dataclass(eq=False, slots=True)
class Ticket:
    """A place in the queue."""

    model: str
    priority: int = 0
    queue_time: float = field(default_factory=time.time)
    """Unix seconds, to be shown."""
    begin: float = field(default_factory=time.monotonic)
    """Since when it waits, on the monotonic clock."""
    needs_room: bool = True
    """Even with the turn it waits: it has not found room in memory yet."""
    changed: Callable[[], None] = lambda: None
    """Called when its place may have changed."""

    @property
    def order(self) -> float:
        """The smallest is next."""
        return self.begin - self.priority * PRIORITY_SECONDS


class LoadQueue:
    """Loads that wait for their turn. Use on the event loop only."""

    def __init__(self) -> None:
        self._waiting: list[Ticket] = []
        self._turns: dict[Ticket, asyncio.Future[None]] = {}
        self._holder: Ticket | None = None

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
            if self._turns.pop(ticket, None) is not None:
                self._waiting.remove(ticket)
                self._reorder()
            elif self._holder is ticket:  # It was called in the same moment.
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
        if self._holder is not None:
            self._holder.changed()

    def is_overtaken(self, ticket: Ticket) -> bool:
        """Whether somebody who waits goes before the one that has the turn."""
        return bool(self._waiting) and self._waiting[0].order < ticket.order

    def position(self, ticket: Ticket) -> int:
        """1 is next; 0: it does not wait."""
        tickets = self.tickets()
        return tickets.index(ticket) + 1 if ticket in tickets else 0

    def tickets(self) -> list[Ticket]:
        """Those that wait, next first: for their turn, or for room."""
        if self._holder is None or not self._holder.needs_room:
            return list(self._waiting)
        return sorted([self._holder, *self._waiting], key=lambda ticket: ticket.order)

    def _release(self) -> None:
        self._holder = None
        self._reorder()

    def _reorder(self) -> None:
        """Sort, call the next one if nobody has the turn, and tell the others their places."""
        self._waiting.sort(key=lambda ticket: ticket.order)
        while self._waiting and self._holder is None:
            ticket = self._waiting.pop(0)
            future = self._turns.pop(ticket)
            if not future.done():  # Else it is cancelled, and is about to learn it.
                self._holder = ticket
                future.set_result(None)
                ticket.changed()
        for ticket in self._waiting:
            ticket.changed()
