"""`top`: what is in memory, what waits and how fast it runs, as it changes."""

import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mlxgui.v1 import model_pb2
from mlxgui_grpc.cli.connection import Connection
from mlxgui_grpc.cli.failures import CommandError
from mlxgui_grpc.cli.output import memory, plain_table, rich_table, to_json
from mlxgui_grpc.cli.residents import COLUMNS, rows
from mlxgui_grpc.cli.status import model_words, request_words
from mlxgui_grpc.client import Stream

if TYPE_CHECKING:
    from rich.console import RenderableType

REDRAW_SECONDS = 1.0
"""Between snapshots only the ages and the clock change."""
BAR_CELLS = 30

Snapshots = Stream[model_pb2.ManagerSnapshot]


def top(connection: Connection, once: bool, as_json: bool) -> None:
    """Show snapshots until the user ends it, or the server does, which is an error."""
    with contextlib.suppress(KeyboardInterrupt), connection.open() as client:
        if once:
            _write(client.manager_status(), as_json)
            return
        with client.watch_manager() as snapshots:
            if as_json or not sys.stdout.isatty():
                for snapshot in snapshots:
                    _write(snapshot, as_json)
            elif _draw(snapshots):
                return
        raise CommandError("The server ended: `mlxgui serve` starts it again")


def _write(snapshot: model_pb2.ManagerSnapshot, as_json: bool) -> None:
    if as_json:
        print(json.dumps(to_json(snapshot), ensure_ascii=False), flush=True)
        return
    lines = [*summary(snapshot), "", *plain_table(COLUMNS, rows(snapshot)), ""]
    print("\n".join(lines), flush=True)


def summary(snapshot: model_pb2.ManagerSnapshot) -> list[str]:
    """The lines above the table."""
    manager = snapshot.status
    return [
        f"{time.strftime('%H:%M:%S')}  {model_words(manager)}",
        f"{bar(manager.total_model_memory_bytes, manager.memory_budget_bytes)}  "
        f"KV {memory(manager.kv_bytes)}, prefix cache {memory(manager.cache_bytes)}, "
        f"{manager.standby_count} standby",
        request_words(manager),
    ]


def bar(part: int, whole: int) -> str:
    """How much of the memory budget is taken, as a bar and in percent."""
    share = min(1.0, part / whole) if whole > 0 else 0.0
    filled = round(share * BAR_CELLS)
    return f"[{'#' * filled}{'.' * (BAR_CELLS - filled)}] {share:4.0%}"


def _draw(snapshots: Snapshots) -> bool:
    """Redraw in place; whether the user ended it. What ends the stream otherwise is raised."""
    from rich.console import Console
    from rich.live import Live

    # So that the terminal is as it was then, too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with (
        _Latest(snapshots) as latest,
        _single_keys() as keys,
        Live(console=Console(), screen=True, auto_refresh=False) as live,
    ):
        while not latest.has_ended():
            if latest.snapshot is not None:
                live.update(_screen(latest.snapshot, live.console.width), refresh=True)
            ready, _, _ = select.select([latest.readable, *keys], [], [], REDRAW_SECONDS)
            if any(key in ready and b"q" in os.read(key, 64).lower() for key in keys):
                return True
            if latest.readable in ready:
                latest.notice()
        return False


def _screen(snapshot: model_pb2.ManagerSnapshot, width: int) -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    lines = [Text(line, no_wrap=True, overflow="ellipsis") for line in summary(snapshot)]
    return Group(*lines, Text(), rich_table(COLUMNS, rows(snapshot), width))


class _Latest:
    """Reads a stream in a thread of its own and keeps its newest snapshot.

    The file `readable` is so when there is a snapshot that was not noticed, and when the stream has ended.
    """

    def __init__(self, snapshots: Snapshots) -> None:
        self.snapshot: model_pb2.ManagerSnapshot | None = None
        self._snapshots = snapshots
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self.readable, self._writable = os.pipe()

    def notice(self) -> None:
        """Wait for what is newer than this."""
        os.read(self.readable, 4096)

    def has_ended(self) -> bool:
        """Whether there will be no other; raises what the stream ended with."""
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True

    def __enter__(self) -> "_Latest":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._snapshots.close()
        self._thread.join()
        os.close(self.readable)
        os.close(self._writable)

    def _read(self) -> None:
        try:
            for snapshot in self._snapshots:
                self.snapshot = snapshot
                os.write(self._writable, b".")
        except Exception as error:
            self._error = error
        # The thread ends a moment later than this is read: the screen is then drawn once more.
        os.write(self._writable, b".")


@contextlib.contextmanager
def _single_keys() -> Iterator[list[int]]:
    """Keys come as they are pressed, unseen; no file to read them from where stdin is not a terminal."""
    if not sys.stdin.isatty():
        yield []
        return
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)
    try:
        yield [terminal]
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
