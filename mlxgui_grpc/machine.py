"""Which machine this is: its operating system, processor and kind."""

import contextlib
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SYSCTL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Machine:
    """What does not change while the server runs."""

    platform: str
    """For example `Darwin`."""
    architecture: str
    """For example `arm64`."""
    processor: str
    """For example `Apple M2 Pro`."""
    is_apple_silicon: bool
    """A Mac with Apple's own processor, under Rosetta too."""


def read_machine() -> Machine:
    """Ask the system; blocks for a moment."""
    if sys.platform == "darwin":
        processor, is_apple_silicon = _sysctl("machdep.cpu.brand_string"), _sysctl("hw.optional.arm64") == "1"
    else:
        processor, is_apple_silicon = _linux_processor(), False
    return Machine(
        platform.system(),
        platform.machine(),
        processor or platform.processor() or platform.machine(),
        is_apple_silicon,
    )


def _sysctl(name: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(
            ["/usr/sbin/sysctl", "-n", name],
            capture_output=True,
            text=True,
            timeout=SYSCTL_SECONDS,
            check=True,
        )
        return answer.stdout.strip()
    return ""


def _linux_processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware"):
                return value.strip()
    return ""
