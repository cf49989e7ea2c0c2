"""Keeps answers for a short time, and asks for each only once at a time."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class TimedCache(Generic[Key, Value]):
    """Answers by key, each kept for some seconds from when it came; errors are not kept. Use on the event loop only."""

    def __init__(self, seconds: float, max_entries: int) -> None:
        self._seconds = seconds
        self._max_entries = max_entries
        self._kept: dict[Key, tuple[float, Value]] = {}
        """By key: when it came, and what; the oldest first."""
        self._asked: dict[Key, asyncio.Task[Value]] = {}

    async def get(self, key: Key, ask: Callable[[], Awaitable[Value]]) -> Value:
        """What is kept, or what `ask` answers, which all who come meanwhile wait for; it goes on when they leave."""
        self._drop(time.monotonic() - self._seconds)
        if key in self._kept:
            return self._kept[key][1]
        task = self._asked.get(key)
        if task is None:
            task = self._asked[key] = asyncio.get_running_loop().create_task(self._ask(key, ask))
            task.add_done_callback(_look_at)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Stop asking."""
        for task in list(self._asked.values()):
            task.cancel()
        if self._asked:
            await asyncio.wait(list(self._asked.values()))

    async def _ask(self, key: Key, ask: Callable[[], Awaitable[Value]]) -> Value:
        try:
            value = await ask()
        finally:
            del self._asked[key]
        while len(self._kept) >= self._max_entries:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = (time.monotonic(), value)
        return value

    def _drop(self, before: float) -> None:
        while self._kept and next(iter(self._kept.values()))[0] < before:
            del self._kept[next(iter(self._kept))]


def _look_at(task: "asyncio.Task[Value]") -> None:
    """Its failure is the business of those who wait, if anybody still does."""
    if not task.cancelled():
        task.exception()
