"""What the child processes that talk to the hub have in common: jobs in, reports out, an end with the server."""

import contextlib
import os
import resource
import threading
from collections.abc import Callable, Iterator

import msgspec

from mlxgui_grpc.hub_frames import Job, Report

Emit = Callable[[Report], None]

MAX_MEMORY_BYTES = 4 * 1024**3
"""Addresses of a child: it takes 60 MB, and what a hub sends must not take the machine."""


def library_environment(endpoint: str | None) -> dict[str, str]:
    """What huggingface_hub reads when it is imported."""
    environment = {
        # Xet has a cache, retries and partial files of its own, and cannot resume into ours.
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_VERBOSITY": "critical",
        # The server has decided already whether it may go online.
        "HF_HUB_OFFLINE": "0",
    }
    if endpoint:
        environment["HF_ENDPOINT"] = endpoint
    return environment


def limit_memory() -> None:
    """Have what takes more memory fail with MemoryError, where the system knows such a limit."""
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = MAX_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MAX_MEMORY_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def open_reports() -> Emit:
    """Take standard output for reports, from any thread; whatever a library prints goes to standard error."""
    reports = os.dup(1)
    os.dup2(2, 1)
    lock = threading.Lock()

    def emit(report: Report) -> None:
        line = memoryview(msgspec.json.encode(report) + b"\n")
        with lock:
            while line:
                line = line[os.write(reports, line) :]

    return emit


def read_jobs() -> Iterator[Job]:
    """The jobs on standard input, one a line, until it closes."""
    pending = b""
    # os.read, because a daemon thread inside a buffered reader upsets the interpreter's shutdown.
    while chunk := os.read(0, 65536):
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            yield msgspec.json.decode(line, type=Job)


def end_with_the_server() -> None:
    """Wait until standard input closes, then end at once, whatever other threads do."""
    while os.read(0, 4096):
        pass
    os._exit(2)
