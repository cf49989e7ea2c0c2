"""Lets coroutines wait until something has changed."""

import asyncio
import contextlib


class Changes:
    """A bell that wakes everybody who waits at the moment it rings. Use on the event loop only."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()
        self.count = 0
        """Times it rang: who remembers the count misses nothing."""

    def notify(self) -> None:
        """Ring."""
        self.count += 1
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, timeout_seconds: float | None = None) -> None:
        """Return at the next change, or after the timeout."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_seconds):
                    await waiter
        finally:
            self._waiters.discard(waiter)
