"""Runs the API document's shell examples as they stand: by bash with curl, which tells each status."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def localized(text: str, base_url: str) -> str:
    """The block with the test server's port."""
    assert "localhost:8000" in text
    return text.replace("localhost:8000", f"localhost:{urlsplit(base_url).port}")


def run_bash(script: str, folder: Path) -> tuple[list[str], list[int]]:
    """What each curl of a script printed, and the status that it got."""
    (folder / ".curlrc").write_text('silent\nwrite-out = "\\n@@@%{http_code}\\n"\n')
    environment = {
        "PATH": os.environ["PATH"],
        "CURL_HOME": str(folder),
        "HOME": str(folder),
        "NO_PROXY": "*",
        "LC_ALL": "C.UTF-8",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    parts = re.split(r"\n@@@(\d{3})\n", done.stdout)
    return parts[0:-1:2], [int(status) for status in parts[1::2]]
