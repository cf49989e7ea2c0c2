"""What the machine is and what it was doing meanwhile: facts, load average, CPU time and steal."""

import ctypes.util
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

PACKAGES = ("mlx", "mlx-lm", "transformers", "grpcio", "protobuf", "waitress", "flask", "mlxgui-grpc")


@dataclass(frozen=True)
class CpuClock:
    """CPU seconds of the whole machine since boot, all cores added."""

    busy: float
    stolen: float
    total: float

    @classmethod
    def read(cls) -> "CpuClock":
        times = psutil.cpu_times()
        # Only Linux reports what the host of a virtual machine took away; guest time is in user already.
        stolen = float(getattr(times, "steal", 0.0))
        waiting = times.idle + float(getattr(times, "iowait", 0.0))
        guest = float(getattr(times, "guest", 0.0)) + float(getattr(times, "guest_nice", 0.0))
        total = float(sum(times)) - guest
        return cls(busy=total - waiting - stolen, stolen=stolen, total=total)

    def steal_share(self, earlier: "CpuClock") -> float:
        """Share of the machine (0-1) that its host gave to others since `earlier`."""
        return (self.stolen - earlier.stolen) / max(1e-9, self.total - earlier.total)


def load_average() -> float:
    return os.getloadavg()[0]


def openblas() -> str | None:
    """Name of the OpenBLAS library to preload on Linux, or None: mlx's wheel bundles a far slower BLAS."""
    if platform.system() != "Linux":
        return None
    return ctypes.util.find_library("openblas")


def blas_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a process that runs MLX: OpenBLAS preloaded where there is one, one thread of it."""
    library = openblas()
    if library is None:
        return dict(environment)
    # Two spinning OpenBLAS threads lose against one on shared cores.
    return {**environment, "LD_PRELOAD": library, "OPENBLAS_NUM_THREADS": "1"}


def uses_openblas(pid: int) -> bool:
    """True when process `pid` has OpenBLAS mapped; always False where that cannot be seen."""
    try:
        return "openblas" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def facts(repository: Path) -> dict[str, str]:
    """The machine and the software under test, as label and value; no host name, no path."""
    memory = psutil.virtual_memory()
    frequency = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    values = {
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model() + (f", {frequency.current:.0f} MHz" if frequency and frequency.current else ""),
        "cores": f"{psutil.cpu_count(logical=False) or '?'} physical, {psutil.cpu_count()} logical",
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available",
        "python": platform.python_version(),
        "blas": openblas() or "as bundled with mlx",
        "commit": _commit(repository),
    }
    for package in PACKAGES:
        try:
            values[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return values


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _commit(repository: Path) -> str:
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()
