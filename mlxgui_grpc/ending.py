"""How a run of the server ends: who asked for it, whether it begins again, and until when requests may go on."""

import asyncio
import math


class Ending:
    """The end of a run. Use on the event loop only."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._asked = asyncio.Event()
        self._sooner = asyncio.Event()
        self._deadline = math.inf
        self.is_restart = False
        """The server is to begin again."""

    def ask(self, *, restart: bool, grace_seconds: float) -> None:
        """End the run. Asked more than once, a stop goes before a restart and the earliest deadline counts."""
        self.is_restart = restart and (self.is_restart or not self._asked.is_set())
        self._deadline = min(self._deadline, self._loop.time() + grace_seconds)
        self._asked.set()
        self._sooner.set()

    async def asked(self) -> None:
        """Return when somebody has asked."""
        await self._asked.wait()

    async def wait_for(self, idle: asyncio.Event) -> bool:
        """Wait until `idle` is set or the deadline has passed, which may come nearer meanwhile; whether it is set."""
        waiting = self._loop.create_task(idle.wait())
        try:
            while not waiting.done() and (left := self._deadline - self._loop.time()) > 0:
                self._sooner.clear()
                sooner = self._loop.create_task(self._sooner.wait())
                await asyncio.wait({waiting, sooner}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                sooner.cancel()
        finally:
            waiting.cancel()
        return idle.is_set()
