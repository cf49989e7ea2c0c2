"""What every loop of the MLX thread does between its turns: calls of other threads, reports, sleep."""

import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import NoReturn

REPORT_SECONDS = 1.0
IDLE_REPORT_SECONDS = 0.1
"""So long nothing came after the last turn: a report says that the worker is idle."""


class Loop(ABC):
    """Takes turns for ever. All methods but `call` run on the MLX thread."""

    def __init__(self, report: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        """`report` is called about once a second while there is work, and once when there is no more."""
        self._report = report
        self._clock = clock
        self._report_time = -math.inf
        self._has_news = False
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self.turn_count = 0
        """Turns that went well."""

    @abstractmethod
    def turn(self) -> bool:
        """Do the next piece of work; False when there is none."""

    def call(self, function: Callable[[], None]) -> None:
        """From any thread: run `function` on the MLX thread between two turns."""
        with self._wake:
            self._calls.append(function)
            self._wake.notify()

    def run(self) -> NoReturn:
        """Work for ever. Sleeps on a condition when there is nothing to do."""
        while True:
            while self._calls:
                self._calls.popleft()()
            if self.turn():
                self.turn_count += 1
                self._has_news = True
                if self._clock() >= self._report_time:
                    self._tell()
            elif not self._wait_for_call(IDLE_REPORT_SECONDS if self._has_news else None):
                self._tell()

    def _wait_for_call(self, seconds: float | None) -> bool:
        with self._wake:
            return self._wake.wait_for(lambda: bool(self._calls), seconds)

    def _tell(self) -> None:
        self._has_news = False
        self._report_time = self._clock() + REPORT_SECONDS
        self._report()
