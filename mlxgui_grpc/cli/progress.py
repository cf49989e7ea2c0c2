"""Shows a long action on stderr: a bar on a terminal, one line per phase elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from mlxgui.v1 import model_pb2
from mlxgui_grpc.cli.failures import CommandError
from mlxgui_grpc.cli.output import enum_word, size, span
from mlxgui_grpc.client import Stream

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Display(Protocol):
    """Takes every snapshot of an operation."""

    def show(self, operation: model_pb2.Operation) -> None:
        """Draw it."""


def follow(stream: Stream[model_pb2.Operation], seen: list[model_pb2.Operation]) -> model_pb2.Operation:
    """Show an operation until it is done and answer its last snapshot; raises what it failed with.

    `seen` is given the latest snapshot, for a caller that is interrupted and wants to cancel.
    """
    with stream, _display() as display:
        for operation in stream:
            seen[:] = [operation]
            display.show(operation)
    if not seen or not seen[0].done:
        raise CommandError("The server ended before the operation did: `mlxgui ls` says how far it came")
    for warning in seen[0].warnings:
        print(f"Note: {warning}", file=sys.stderr)
    return seen[0]


def phase(operation: model_pb2.Operation) -> str:
    """What the operation does now, in one or a few words."""
    if operation.HasField("install"):
        word = enum_word(model_pb2.InstallProgress.Phase.DESCRIPTOR, operation.install.phase)
        return "starting" if word == "unspecified" else word
    if operation.HasField("load"):
        word = enum_word(model_pb2.LoadProgress.Phase.DESCRIPTOR, operation.load.phase)
        if word == "queued" and operation.load.queue_position:
            return f"queued, place {operation.load.queue_position}"
        return "starting" if word == "unspecified" else word
    return "starting"


def amounts(operation: model_pb2.Operation) -> tuple[int, int]:
    """Bytes done, and bytes in all; 0 where they are not known."""
    if operation.HasField("install"):
        return operation.install.done_bytes, operation.install.total_bytes
    return operation.load.done_bytes, operation.load.total_bytes


def speed(operation: model_pb2.Operation) -> str:
    """Speed and time left of a download; empty where they are not known."""
    install = operation.install
    words = [f"{size(install.bytes_per_second)}/s"] if install.bytes_per_second else []
    if install.HasField("remaining"):
        words.append(f"{span(install.remaining.ToTimedelta().total_seconds())} left")
    return ", ".join(words)


@contextmanager
def _display() -> Iterator[Display]:
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}", markup=False),
        TextColumn("{task.fields[speed]}", markup=False),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        yield _Bar(progress)


class _Bar:
    def __init__(self, progress: "Progress") -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def show(self, operation: model_pb2.Operation) -> None:
        done, total = amounts(operation)
        if self._task is None:
            self._task = self._progress.add_task("", total=None, amount="", speed="")
        self._progress.update(
            self._task,
            description=f"{operation.model}: {phase(operation)}",
            completed=done,
            total=total or None,
            amount=f"{size(done) or '0 B'} of {size(total)}" if total else "",
            speed=speed(operation),
        )


class _Lines:
    def __init__(self) -> None:
        self._last = ""

    def show(self, operation: model_pb2.Operation) -> None:
        _, total = amounts(operation)
        line = f"{operation.model}: {phase(operation)}"
        if line != self._last and not operation.done:
            self._last = line
            print(f"{line}{f' ({size(total)})' if total else ''}", file=sys.stderr, flush=True)
