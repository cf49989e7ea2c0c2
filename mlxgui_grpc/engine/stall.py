"""Notices that a worker is stuck: nothing gets done for too long while something waits for it."""

import asyncio
from collections.abc import Callable

from mlxgui_grpc.engine import frames


class StallWatch:
    """Two clocks, one for each thread of a worker that requests wait for. Use on the event loop only.

    The helper thread owes an answer to every prompt; the MLX thread owes tokens to every row whose prompt is
    tokenized and that is not paused. A worker that goes on tokenizing while no row gets on is as stuck as a silent one.
    """

    def __init__(
        self,
        stall_seconds: float,
        on_stall: Callable[[float], None],
        clock: Callable[[], float] | None = None,
    ) -> None:
        """`on_stall` is called once, with the seconds of silence; `clock` is the loop's unless another is given."""
        self._loop = asyncio.get_running_loop()
        self._clock = clock or self._loop.time
        self._stall_seconds = stall_seconds
        self._on_stall = on_stall
        self._prompts: set[int] = set()
        self._rows: set[int] = set()
        self._paused: set[int] = set()
        self._prompt_time = self._row_time = self._clock()
        self._work_count = -1
        self._timer: asyncio.TimerHandle | None = None

    @property
    def quiet_seconds(self) -> float:
        """How long nothing got done that somebody waits for; 0 when nobody waits."""
        now = self._clock()
        return max(
            now - self._prompt_time if self._prompts else 0.0, now - self._row_time if self._rows else 0.0
        )

    # What is waited for.

    def asked(self, keys: tuple[int, ...]) -> None:
        """Prompts were sent off. A timer runs only while somebody waits, so an idle server does nothing."""
        if not self._prompts:
            self._prompt_time = self._clock()
        self._prompts.update(keys)
        if self._timer is None:
            self._timer = self._loop.call_later(self._stall_seconds, self._check)

    def accepted(self, keys: tuple[int, ...], open_keys: tuple[int, ...]) -> None:
        """A prompt is tokenized: the rows of it that somebody still waits for wait for their tokens now."""
        self.answered(keys)
        if not self._rows:
            self._row_time = self._clock()
        self._rows.update(key for key in open_keys if key not in self._paused)

    def answered(self, keys: tuple[int, ...]) -> None:
        """The helper thread is done with these."""
        self._prompt_time = self._clock()
        self._prompts.difference_update(keys)

    def paused(self, key: int) -> None:
        """Nothing is owed to a row whose reader is slow."""
        self._paused.add(key)
        self._rows.discard(key)

    def resumed(self, key: int) -> None:
        """The reader caught up."""
        self._paused.discard(key)
        if not self._rows:
            self._row_time = self._clock()
        if key not in self._prompts:
            self._rows.add(key)

    def closed(self, key: int) -> None:
        """Nobody waits for this key any more."""
        self._prompts.discard(key)
        self._rows.discard(key)
        self._paused.discard(key)

    # Signs of life.

    def progressed(self) -> None:
        """A token came, or a chunk of a prompt is done."""
        self._row_time = self._clock()

    def reported(self, usage: frames.Usage) -> None:
        """A report is a sign of life only if something was done since the one before."""
        if usage.work_count != self._work_count:
            self._work_count = usage.work_count
            self.progressed()

    def close(self) -> None:
        """The process is gone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        if not self._prompts and not self._rows and not self._paused:
            return
        quiet = self.quiet_seconds
        if quiet >= self._stall_seconds:
            self._on_stall(quiet)
        else:
            self._timer = self._loop.call_later(self._stall_seconds - quiet, self._check)
