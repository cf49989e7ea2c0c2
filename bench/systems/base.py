"""What a measured system is to the harness, and how the processes of one are started and ended."""

import contextlib
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

from bench.driver import Driver, last_line
from bench.process_tree import Roles

START_LIMIT_SECONDS = 120.0


class CannotRun(RuntimeError):
    """The system does not run here; its targets are skipped with this notice."""


@dataclass(frozen=True)
class Site:
    """Where a system is started: the model to serve, what its processes inherit, a folder for its files."""

    model: str
    model_folder: Path
    environment: Mapping[str, str]
    folder: Path


class Running(Protocol):
    """A started system."""

    # The process whose tree is measured.
    root_pid: int
    roles: Roles
    # By kind of client: where to reach it ...
    endpoints: Mapping[str, str]
    # ... and the model's name there.
    model: str

    def own_driver(self) -> Driver | None:
        """The client process when it is the measured process itself, else None."""

    def stop(self) -> None:
        """End every process of the system; it may be called twice."""


class System(Protocol):
    def start(self, site: Site) -> Running:
        """Start it and return when it answers. Raises CannotRun."""


@dataclass
class RunningServer:
    """A system that is a server process, with children of its own or not."""

    process: subprocess.Popen[bytes]
    roles: Roles
    endpoints: Mapping[str, str]
    model: str
    root_pid: int = field(init=False)

    def __post_init__(self) -> None:
        self.root_pid = self.process.pid

    def own_driver(self) -> Driver | None:
        return None

    def stop(self) -> None:
        end_process(self.process)


def spawn(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=dict(environment)
        )


def wait_for_http(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when `url` answers 200. Raises CannotRun, with what the log says, when it never does."""
    deadline = time.monotonic() + START_LIMIT_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise CannotRun(f"exit status {process.returncode}: {last_line(log)}")
        with (
            contextlib.suppress(OSError, urllib.error.URLError),
            urllib.request.urlopen(url, timeout=3) as reply,
        ):
            if reply.status == 200:
                return
        time.sleep(0.1)
    end_process(process)
    raise CannotRun(f"no answer on {url} in {START_LIMIT_SECONDS:.0f} s: {last_line(log)}")


def end_process(process: subprocess.Popen[bytes], limit_seconds: float = 15.0) -> None:
    """Ask `process` to end, then end it and what it started, by process id."""
    if process.poll() is not None:
        return
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(limit_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(children, timeout=3)
    for child in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
