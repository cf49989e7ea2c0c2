"""Where the events of one request wait for the coroutine that relays them."""

import asyncio
from collections.abc import Callable

from mlxgui_grpc.engine import frames
from mlxgui_grpc.errors import ModelServerError, SlowConsumerError

PAUSE_AT_EVENTS = 256
SLOW_CONSUMER_SECONDS = 30.0

Event = frames.Accepted | frames.Prefilled | frames.Piece | frames.Answer


class Mailbox:
    """Events of the rows of one request, in order. Used on the event loop only.

    The reader takes everything that waits at once, so that tokens are joined under load and only then. When too
    much waits, the rows are paused, and fail when the reader has not caught up in time.
    """

    def __init__(
        self, pause: Callable[[], None], resume: Callable[[], None], abandon: Callable[[], None]
    ) -> None:
        self._events: list[Event] = []
        self._error: ModelServerError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._pause, self._resume, self._abandon = pause, resume, abandon
        self._overrun: asyncio.TimerHandle | None = None

    def put(self, event: Event) -> None:
        """Deliver one event; after the error nothing more is."""
        if self._error is not None:
            return
        self._events.append(event)
        if len(self._events) >= PAUSE_AT_EVENTS and self._overrun is None:
            self._pause()
            loop = asyncio.get_running_loop()
            self._overrun = loop.call_later(SLOW_CONSUMER_SECONDS, self._give_up)
        self._notify()

    def fail(self, error: ModelServerError) -> None:
        """End the request with an error, after what was delivered before it. The first error wins."""
        if self._error is None:
            self._error = error
        self._notify()

    async def take(self) -> list[Event]:
        """Everything that waits, at least one event; raises the error the request ended with."""
        while not self._events:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events, self._events = self._events, []
        if self._overrun is not None:
            self._overrun.cancel()
            self._overrun = None
            self._resume()
        return events

    def close(self) -> None:
        """The reader is gone."""
        if self._overrun is not None:
            self._overrun.cancel()

    def _notify(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _give_up(self) -> None:
        self._abandon()
        self.fail(
            SlowConsumerError(
                f"the stream was not read for {SLOW_CONSUMER_SECONDS:.0f} seconds; read faster, or ask for less"
            )
        )
