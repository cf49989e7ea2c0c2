"""CPU time and memory of a process and all its descendants, attributed to roles."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class ProcessSample:
    pid: int
    role: str
    cpu_seconds: float
    rss_bytes: int


@dataclass(frozen=True)
class Roles:
    """Names processes by what their command line contains; the root has its own name."""

    root: str
    by_argument: tuple[tuple[str, str], ...] = ()

    def name(self, process: psutil.Process, root_pid: int) -> str:
        if process.pid == root_pid:
            return self.root
        command_line = " ".join(process.cmdline())
        for argument, role in self.by_argument:
            if argument in command_line:
                return role
        return "other"


def sample(root_pid: int, roles: Roles) -> list[ProcessSample]:
    """One sample per living process of the tree; [] when its root is gone."""
    found: list[ProcessSample] = []
    try:
        root = psutil.Process(root_pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    for process in processes:
        # A process may end between being listed and being read.
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess), process.oneshot():
            times = process.cpu_times()
            found.append(
                ProcessSample(
                    process.pid,
                    roles.name(process, root_pid),
                    times.user + times.system,
                    process.memory_info().rss,
                )
            )
    return found


def cpu_by_role(before: Sequence[ProcessSample], after: Sequence[ProcessSample]) -> dict[str, float]:
    """CPU seconds each role used between two samples; a process new in `after` counts from its start."""
    start = {process.pid: process.cpu_seconds for process in before}
    used: dict[str, float] = {}
    for process in after:
        used[process.role] = used.get(process.role, 0.0) + process.cpu_seconds - start.get(process.pid, 0.0)
    return used


def settle(
    root_pids: Sequence[int], *, quiet_seconds: float, limit_seconds: float, share: float = 0.05
) -> bool:
    """Wait until all the trees together have used less than `share` of one core for `quiet_seconds`.

    Returns False when that had not come about after `limit_seconds`.
    """
    deadline = time.monotonic() + limit_seconds
    before = _total_cpu_seconds(root_pids)
    while time.monotonic() < deadline:
        time.sleep(quiet_seconds)
        after = _total_cpu_seconds(root_pids)
        # A process that ended takes its past with it, so the sum may fall.
        if abs(after - before) <= share * quiet_seconds:
            return True
        before = after
    return False


def _total_cpu_seconds(root_pids: Sequence[int]) -> float:
    return sum(process.cpu_seconds for pid in root_pids for process in sample(pid, Roles("root")))
