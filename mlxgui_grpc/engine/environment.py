"""What worker processes are given when they are started: an environment and a scheduling class."""

import contextlib
import glob
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from mlxgui_grpc.secrets import without_secrets


def worker_environment(environment: Mapping[str, str], temporary_directory: Path) -> dict[str, str]:
    """The environment of a worker: no tokens, no network, a private TMPDIR, and on Linux OpenBLAS where it is.

    The Linux wheel of mlx bundles the scalar reference BLAS; with OpenBLAS preloaded, matrix products take a
    twentieth of the time. One thread: two that spin lose on shared cores. Never required.
    """
    result = without_secrets(environment)
    # mlx on Linux compiles to and loads libraries from $TMPDIR/mlx: nobody else may write there.
    result |= {"TMPDIR": str(temporary_directory), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    result |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if sys.platform == "linux" and (library := find_openblas()):
        preloaded = result.get("LD_PRELOAD", "")
        if "openblas" not in preloaded:
            result["LD_PRELOAD"] = f"{preloaded} {library}".strip()
        result.setdefault("OPENBLAS_NUM_THREADS", "1")
    return result


def find_openblas() -> str | None:
    """The path of the system's OpenBLAS, looked for where Debian, Fedora and Arch put it."""
    for pattern in (
        "/usr/lib/*/libopenblas.so.0",
        "/usr/lib64/libopenblas.so.0",
        "/usr/lib/libopenblas.so.0",
    ):
        if found := sorted(glob.glob(pattern)):
            return found[0]
    return None


def set_idle_class(pid: int, *, idle: bool) -> None:
    """Move all threads of a process to the idle scheduling class or back; Linux only, elsewhere without effect."""
    if sys.platform != "linux":
        return
    policy = os.SCHED_IDLE if idle else os.SCHED_OTHER
    with contextlib.suppress(OSError):  # The process may have ended.
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):  # So may one of its threads.
                os.sched_setscheduler(int(task), policy, os.sched_param(0))
