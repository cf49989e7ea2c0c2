"""A disk so small that a test can fill it: a file system in memory, mounted for the test."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SIZE_BYTES = 80 * 1024 * 1024
"""More than what a download leaves free whatever it fetches."""


class SmallDisk:
    """A mounted file system, and the file that fills it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self) -> None:
        """Leave not one byte."""
        with self._ballast.open("ab") as ballast:
            for step in (1024 * 1024, 4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        os.posix_fallocate(ballast.fileno(), ballast.tell(), step)
                        ballast.seek(step, os.SEEK_CUR)
        assert os.statvfs(self.path).f_bavail == 0

    def free(self) -> None:
        """Make room again."""
        self._ballast.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Needs the right to mount; where there is none, test_registry_failures.py and test_download_failures.py remain."""
    path = tmp_path / "disk"
    path.mkdir()
    root = [] if os.getuid() == 0 else ["sudo", "-n"]
    options = f"size={SIZE_BYTES},uid={os.getuid()}"
    try:
        subprocess.run(
            [*root, "mount", "-t", "tmpfs", "-o", options, "mlxgui-test", path],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk cannot be mounted here: {error}")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run([*root, "umount", "--lazy", path], check=True)
