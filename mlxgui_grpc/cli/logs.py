"""`logs`: the end of the server's log file, and what is added to it."""

import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import TextIO

from mlxgui_grpc.cli.failures import EXIT_NOT_FOUND, CommandError

POLL_SECONDS = 0.25


def logs(home: Path, line_count: int, follow: bool) -> None:
    """Print the last lines; with `follow` go on until interrupted, over rotations of the file."""
    path = home / "logs" / "mlxgui.log"
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except OSError as error:
        raise CommandError(
            f"There is no log at {path} ({error.strerror}): `mlxgui serve` writes it", EXIT_NOT_FOUND
        ) from None
    with file:
        sys.stdout.writelines(deque(file, maxlen=line_count))
        sys.stdout.flush()
        if not follow:
            return
        while True:
            if not copy_new(file):
                if _is_rotated(file, path):
                    break
                time.sleep(POLL_SECONDS)
    # The new file from its first line on.
    while True:
        with path.open(encoding="utf-8", errors="replace") as file:
            while copy_new(file) or not _is_rotated(file, path):
                time.sleep(POLL_SECONDS)


def copy_new(file: TextIO) -> bool:
    """Print what was added since the last time; whether there was anything."""
    text = file.read()
    sys.stdout.write(text)
    sys.stdout.flush()
    return bool(text)


def _is_rotated(file: TextIO, path: Path) -> bool:
    try:
        return not os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        # Between the rename and the first line of the new file.
        return False
