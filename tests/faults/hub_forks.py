"""Runs the jobs of hub processes in forks of one that has done their imports: each is killed where it is told to be.

`python -m tests.faults.hub_forks` reads lines of a failpoint, a blank and a job, and answers each with one line: the
job's last report, or `killed`.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec

from mlxgui_grpc import failpoints
from mlxgui_grpc.hub_child import library_environment
from mlxgui_grpc.hub_download import delete, download
from mlxgui_grpc.hub_failures import as_failure
from mlxgui_grpc.hub_frames import Deleted, DeleteJob, Downloaded, DownloadJob, Failed, Job, Report

KILLED = "killed"


class HubForks:
    """The client side: one process, and a fork of it for each job."""

    def __init__(self, endpoint: str, cache: Path) -> None:
        self._cache = cache
        self._endpoint = endpoint
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.hub_forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **library_environment(endpoint), "HF_HUB_CACHE": str(cache)},
        )

    def close(self) -> None:
        self._process.communicate()

    def download(self, model_id: str, failpoint: str = "") -> Downloaded | Failed | None:
        """The end of a download; None when it was killed."""
        job = DownloadJob(model_id, None, str(self._cache), self._endpoint, None, 4, 0)
        report = self._run(job, failpoint)
        assert report is None or isinstance(report, Downloaded | Failed)
        return report

    def delete(self, model_id: str, revision: str, failpoint: str = "") -> Deleted | Failed | None:
        """The end of a deletion; None when it was killed."""
        report = self._run(DeleteJob(model_id, revision, str(self._cache)), failpoint)
        assert report is None or isinstance(report, Deleted | Failed)
        return report

    def _run(self, job: Job, failpoint: str) -> Report | None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(failpoint.encode() + b" " + msgspec.json.encode(job) + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        report: Report | None = (
            None if line.strip() == KILLED.encode() else msgspec.json.decode(line, type=Report)
        )
        return report


def main() -> None:
    """Run jobs until standard input ends."""
    from huggingface_hub import (  # noqa: F401
        HfApi,
        constants,
        file_download,
        get_session,
        hf_hub_url,
        scan_cache_dir,
    )

    for line in sys.stdin.buffer:
        failpoint, _, job = line.partition(b" ")
        child = os.fork()
        if child == 0:
            _run(failpoint.decode(), msgspec.json.decode(job, type=Job))
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            os.write(1, KILLED.encode() + b"\n")


def _run(failpoint: str, job: Job) -> None:
    failpoints.arm(failpoint, os.getpid())
    try:
        assert isinstance(job, DownloadJob | DeleteJob)
        report: Report = download(job, lambda progress: None) if isinstance(job, DownloadJob) else delete(job)
    except BaseException as error:
        report = as_failure(error, job)
    os.write(1, msgspec.json.encode(report) + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main()
