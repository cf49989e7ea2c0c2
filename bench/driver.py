"""The harness's side of one client process: sends it orders, reacts to its marks, returns its figures."""

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.protocol import Figures, Order

START_LIMIT_SECONDS = 120.0


class DriverError(RuntimeError):
    """The client process ended, or did not answer in time."""


class Driver:
    """One client process. Not for use from several threads at once; end it with close()."""

    def __init__(
        self, module: str, arguments: tuple[str, ...], environment: Mapping[str, str], log: Path
    ) -> None:
        self._module = module
        self._log = log
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=dict(environment),
                text=True,
            )
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, name=module, daemon=True).start()
        while self._next(START_LIMIT_SECONDS).get("mark") != "ready":
            pass

    @property
    def pid(self) -> int:
        return self._process.pid

    def perform(self, order: Order, on_mark: Callable[[str], None] = lambda mark: None) -> Figures:
        """Carry out `order`; `on_mark` is called the moment its window opens ("start") and closes ("end")."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(order.to_line())
            self._process.stdin.flush()
        except OSError as error:
            raise DriverError(self._explain("ended")) from error
        while True:
            # A client process bounds each order itself; this only guards against one that hangs.
            message = self._next(2 * order.limit_seconds + 30)
            if "mark" in message:
                on_mark(message["mark"])
            else:
                return Figures.from_json(message["figures"])

    def close(self) -> None:
        """End the process; it may be called twice."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                self._messages.put(json.loads(line))
        self._messages.put(None)

    def _next(self, limit_seconds: float) -> dict[str, Any]:
        try:
            message = self._messages.get(timeout=limit_seconds)
        except queue.Empty:
            self._process.kill()
            raise DriverError(self._explain(f"did not answer in {limit_seconds:.0f} s")) from None
        if message is None:
            raise DriverError(self._explain("ended"))
        return message

    def _explain(self, what: str) -> str:
        return f"{self._module} {what}: {last_line(self._log)}"


def last_line(log: Path) -> str:
    """The last line that a log says, for an error message."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it logged nothing"
