"""Watches the memory of a worker process from outside, to know, once it is dead, whether memory was why."""

import contextlib
import ctypes
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mlxgui_grpc.engine.control_group import MemoryGroup

NEAR_SHARE = 0.8
"""Beyond this share of a limit, a process that dies by a signal is taken to have died of it."""
NEAR_RESOURCE_SHARE = 0.5
"""The same for resource limits: they deny the next piece, which may be large, before any of it is in use."""


@dataclass(frozen=True, slots=True)
class _Limit:
    """Something that a process has so much of and may not have more of than so much; 0 or less: as it likes."""

    name: str
    used_bytes: int
    limit_bytes: int
    near_share: float = NEAR_SHARE


class MemoryWatch:
    """One process. `sample` costs some 0.2 ms; call it now and then while the process works."""

    def __init__(self, pid: int, budget_bytes: Callable[[], int]) -> None:
        """`budget_bytes` says what the process may take, 0: nobody has set that."""
        self._pid = pid
        self._budget_bytes = budget_bytes
        self._process: psutil.Process | None = None
        self._group: MemoryGroup | None = None
        self._near = ""
        self._expected_bytes = 0
        self._used_before: dict[str, int] = {}
        # The last two counts: what the newest one already counts may be the death of the process itself.
        self._kill_counts = (0, 0)
        try:
            self._process = psutil.Process(pid)
        except psutil.Error:  # It is gone already.
            return
        self.sample()

    @property
    def footprint_bytes(self) -> int:
        """What the process takes of the machine's memory now; 0 when it is gone.

        Resident memory; on macOS the physical footprint, which is what that system judges processes by.
        """
        try:
            if sys.platform == "darwin":
                return _darwin_footprint_bytes(self._pid)
            return int(self._process.memory_info().rss) if self._process else 0
        except (psutil.Error, OSError):
            return 0

    def expect(self, more_bytes: int) -> None:
        """The process is about to take so much more than it has now (0: no longer).

        What cannot be had is asked for in one piece, so a limit that this goes beyond need not be near before it
        is reached.
        """
        self._expected_bytes = more_bytes
        self._used_before = {limit.name: limit.used_bytes for limit in self._limits(0)}
        self.sample()

    def sample(self, mlx_bytes: int = 0) -> None:
        """Note how near the process is to its limits; `mlx_bytes` is what MLX says that it holds."""
        if not self.footprint_bytes:
            return  # It is on its way out: the sample before is the one that counts.
        group = MemoryGroup.of(self._pid)
        count = _kill_count(group)
        self._kill_counts = (self._kill_counts[1] if group == self._group else count, count)
        self._group = group
        self._near = next(filter(None, map(self._nearness, self._limits(mlx_bytes))), "")

    def evidence(self, status: int) -> str:
        """Why memory is suspected, in words, or nothing, for a process that died with this exit status."""
        if status == -signal.SIGKILL and _kill_count(self._group) > self._kill_counts[0]:
            return "the kernel's out-of-memory killer struck"
        return self._near

    def signs_of_life(self) -> tuple[Any, ...]:
        """Figures that stand still only while the process does nothing: processor time, memory, bytes read.

        Nothing where the system does not tell.
        """
        process = self._process
        if process is None:
            return ()
        read = 0  # Not every system counts what a process reads; those that do not count its page faults.
        with contextlib.suppress(psutil.Error, OSError, AttributeError):
            read = process.io_counters().read_chars
        try:
            times = process.cpu_times()
            return (times.user, times.system, tuple(process.memory_info()), read)
        except (psutil.Error, OSError):
            return ()

    def _nearness(self, limit: _Limit) -> str:
        if limit.limit_bytes <= 0:
            return ""
        if limit.used_bytes >= limit.near_share * limit.limit_bytes:
            return f"it was using {_mib(limit.used_bytes)} of the {_mib(limit.limit_bytes)} of {limit.name}"
        needed = self._used_before.get(limit.name, limit.used_bytes) + self._expected_bytes
        if self._expected_bytes and needed > limit.limit_bytes:
            return f"it needed {_mib(needed)} of the {_mib(limit.limit_bytes)} of {limit.name}"
        return ""

    def _limits(self, mlx_bytes: int) -> list[_Limit]:
        """What limits the process."""
        found = [_Limit("its memory budget", max(self.footprint_bytes, mlx_bytes), self._budget_bytes())]
        if sys.platform == "linux" and self._process is not None:
            try:
                memory: Any = self._process.memory_info()
                for name, used, resource in (
                    ("its address space limit", memory.vms, psutil.RLIMIT_AS),
                    ("its data size limit", memory.data, psutil.RLIMIT_DATA),
                ):
                    limit, _ = self._process.rlimit(resource)
                    found.append(_Limit(name, int(used), limit, NEAR_RESOURCE_SHARE))  # -1 is infinity
            except (psutil.Error, OSError):
                pass
        if self._group is not None:
            found += [
                _Limit(f"its control group {group.name}", group.used_bytes, group.limit_bytes)
                for group in self._group.limits()
            ]
        return found


def _kill_count(group: MemoryGroup | None) -> int:
    """Processes that the kernel has killed for memory, on this machine and once more in this control group."""
    count = group.kill_count() if group is not None else 0
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                count += int(line.split()[1])
    except OSError:
        pass  # Not Linux.
    return count


def _mib(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB"


class _RusageInfo(ctypes.Structure):
    """`struct rusage_info_v0` of <sys/resource.h> on macOS."""

    _fields_ = (
        ("uuid", ctypes.c_uint8 * 16),
        ("user_time", ctypes.c_uint64),
        ("system_time", ctypes.c_uint64),
        ("package_idle_wakeups", ctypes.c_uint64),
        ("interrupt_wakeups", ctypes.c_uint64),
        ("page_ins", ctypes.c_uint64),
        ("wired_size", ctypes.c_uint64),
        ("resident_size", ctypes.c_uint64),
        ("physical_footprint", ctypes.c_uint64),
        ("start_time", ctypes.c_uint64),
        ("exit_time", ctypes.c_uint64),
    )


def _darwin_footprint_bytes(pid: int) -> int:
    """What Activity Monitor calls Memory: psutil has resident memory only, which leaves Metal's buffers out.

    Only a Mac can show that this is right.
    """
    usage = _RusageInfo()
    if ctypes.CDLL(None).proc_pid_rusage(pid, 0, ctypes.byref(usage)) != 0:
        return 0
    return int(usage.physical_footprint)
