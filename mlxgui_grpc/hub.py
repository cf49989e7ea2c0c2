"""Installing from the model hub: starts a child process per download and relays what it reports."""

import asyncio
import contextlib
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from mlxgui_grpc import errors
from mlxgui_grpc.hub_cache import (
    PARTIAL_MAX_AGE_SECONDS,
    RepositoryFolder,
    Snapshot,
    cached_models,
    sweep_partials,
)
from mlxgui_grpc.hub_frames import Deleted, DeleteJob, Downloaded, DownloadJob, Failed, Job, Progress, Report
from mlxgui_grpc.secrets import without_secrets

__all__ = ["DownloadProgress", "Hub", "Snapshot", "check_model_id", "check_revision"]

_log = logging.getLogger(__name__)

# -P: a folder in which somebody happens to start the server is no place to import from.
_COMMAND = (sys.executable, "-P", "-m", "mlxgui_grpc.hub_download")
_ID_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,127}")
_LOG_TAIL_BYTES = 4096
_SECRETS = re.compile(r"hf_\w+|(?<=://)[^\s/@]+@|(?<=[?&])[^\s?&=]+=[^\s&\"']+")


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """How far a download is.

    `phase` is resolving, downloading or verifying. Bytes and files that an earlier attempt or another
    tool left in the cache count as done. `eta_seconds` is None until a speed is known.
    """

    phase: str
    done_bytes: int
    total_bytes: int
    done_file_count: int
    total_file_count: int
    current_file: str
    bytes_per_second: float
    eta_seconds: float | None


class Hub:
    """The model hub and its cache, as the control process sees them.

    `download` belongs to the event loop; the other methods read or write the disk and block. Nothing
    here imports huggingface_hub: its 40 MB live in a child, as long as a job takes.
    """

    def __init__(
        self,
        *,
        endpoint: str | None,
        cache_dir: Path,
        token: str | None,
        offline: bool,
        parallel_file_count: int = 4,
        disk_reserve_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        """`endpoint` None is the public hub; `disk_reserve_bytes` stay free whatever is downloaded."""
        self._endpoint = endpoint.rstrip("/") if endpoint else None
        self._cache_dir = cache_dir.expanduser().absolute()
        self._token = token
        self._offline = offline
        self._parallel_file_count = parallel_file_count
        self._disk_reserve_bytes = disk_reserve_bytes

    async def download(
        self,
        model_id: str,
        revision: str | None,
        on_progress: Callable[[DownloadProgress], None],
        *,
        force: bool = False,
    ) -> Snapshot:
        """Fetch a repository's revision (default: main) into the Hugging Face cache.

        What an earlier attempt fetched is not fetched again, a half file goes on where it stopped; with
        `force` what is in the cache is hashed, and fetched again where that finds damage. The
        snapshot appears in the cache at once, when every file has the announced size and hash.
        Cancelling ends the child and keeps its parts. A second download of the same repository, from
        another server too, waits for the first.

        Raises InvalidRequestError, HubRepositoryNotFoundError, HubAccessDeniedError,
        HubRateLimitedError, HubUnavailableError, DiskFullError, ModelUnsafeError,
        ModelIncompatibleError.
        """
        check_model_id(model_id)
        if revision is not None:
            check_revision(revision)
        if self._offline:
            raise errors.HubUnavailableError(
                f"'{model_id}' cannot be downloaded: the server is offline (HF_HUB_OFFLINE); "
                "unset it and restart, or install a local directory.",
                model_id=model_id,
            )
        self._check_endpoint()
        job = DownloadJob(
            model_id=model_id,
            revision=revision,
            cache_dir=str(self._cache_dir),
            endpoint=self._endpoint,
            token=self._token,
            parallel_file_count=self._parallel_file_count,
            disk_reserve_bytes=self._disk_reserve_bytes,
            force=force,
        )
        done = await _run(job, on_progress)
        return Snapshot(
            model_id=model_id,
            revision=done.revision,
            path=Path(done.path),
            size_bytes=done.size_bytes,
            file_count=done.file_count,
            is_ours=done.is_ours,
        )

    def delete_revision(self, model_id: str, revision: str) -> int:
        """Remove one revision (a commit hash) from the cache; bytes freed, 0 when it is not there.

        Other revisions keep their files, and nothing outside the repository's folder is touched. The
        caller has checked that it is ours to delete. Blocks for a scan of the cache. Raises
        ModelInUseError while the repository is being downloaded, ModelDeleteFailedError.
        """
        check_model_id(model_id)
        check_revision(revision)
        job = DeleteJob(model_id=model_id, revision=revision, cache_dir=str(self._cache_dir))
        child = subprocess.run(
            _COMMAND,
            input=_encoded(job),
            capture_output=True,
            check=False,
            env=without_secrets(os.environ),
            process_group=0,
        )
        _log_tail(child.stderr)
        for line in child.stdout.splitlines():
            report = _decoded(line)
            if isinstance(report, Deleted):
                return report.freed_bytes
            if isinstance(report, Failed):
                raise _error(report)
        raise errors.ModelDeleteFailedError(
            f"The files of '{model_id}' were not removed: the process that does it ended with "
            f"{_ending(child.returncode)}.",
            model_id=model_id,
        )

    def find_cached(self, model_id: str, revision: str | None = None) -> Snapshot | None:
        """The complete snapshot in the cache (default: main, else the newest), whoever fetched it."""
        check_model_id(model_id)
        return RepositoryFolder(self._cache_dir, model_id).find(revision)

    def cached_models(self) -> list[Snapshot]:
        """Every complete model in the cache, by hub id."""
        return cached_models(self._cache_dir)

    def sweep_partials(
        self, keep: Collection[str] = (), *, older_than_seconds: float = PARTIAL_MAX_AGE_SECONDS
    ) -> int:
        """Remove leftovers of interrupted downloads, except those of the hub ids in `keep`; bytes freed."""
        return sweep_partials(self._cache_dir, keep=keep, older_than_seconds=older_than_seconds)

    def _check_endpoint(self) -> None:
        if self._endpoint and urlsplit(self._endpoint).scheme not in ("http", "https"):
            raise errors.HubUnavailableError(
                "HF_ENDPOINT is not an http or https address; set it to the hub's, or unset it."
            )


def check_model_id(model_id: str) -> None:
    """Raise InvalidRequestError unless it is `owner/name`, which is also safe as a folder's name."""
    parts = model_id.split("/")
    well_formed = len(parts) == 2 and all(_ID_PART.fullmatch(part) for part in parts)
    if not well_formed or "--" in model_id or ".." in model_id or model_id.endswith(".git"):
        raise errors.InvalidRequestError(
            f"model_id must be a hub id such as 'owner/name', not {json.dumps(model_id[:100])}.",
            field="model_id",
        )


def check_revision(revision: str) -> None:
    """Raise InvalidRequestError unless it is a branch, tag or commit, which is also safe as a path."""
    parts = revision.split("/")
    if len(parts) > 8 or ".." in revision or not all(_REVISION_PART.fullmatch(part) for part in parts):
        raise errors.InvalidRequestError(
            f"revision must be a branch, a tag or a commit, not {json.dumps(revision[:100])}.",
            field="revision",
        )


async def _run(job: DownloadJob, on_progress: Callable[[DownloadProgress], None]) -> Downloaded:
    child = await asyncio.create_subprocess_exec(
        *_COMMAND,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # The token goes by the job. Ctrl-C in a terminal is for the server: it decides what ends.
        env=without_secrets(os.environ),
        process_group=0,
    )
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    tail = asyncio.create_task(_read_tail(child.stderr))
    try:
        child.stdin.write(_encoded(job))
        async for line in child.stdout:
            report = _decoded(line)
            if isinstance(report, Progress):
                on_progress(DownloadProgress(**msgspec.structs.asdict(report)))
            elif isinstance(report, Downloaded):
                return report
            elif isinstance(report, Failed):
                raise _error(report)
        status = await child.wait()
        raise errors.HubUnavailableError(
            f"The download of '{job.model_id}' was interrupted (its process ended with {_ending(status)}); "
            "repeat the install, it goes on where it stopped.",
            model_id=job.model_id,
        )
    finally:
        # The pipe stays open until here: its end is the child's end.
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        child.stdin.close()
        await child.wait()
        _log_tail(await tail)


async def _read_tail(stream: asyncio.StreamReader) -> bytes:
    tail = b""
    while chunk := await stream.read(_LOG_TAIL_BYTES):
        tail = (tail + chunk)[-_LOG_TAIL_BYTES:]
    return tail


def _log_tail(output: bytes) -> None:
    if text := output[-_LOG_TAIL_BYTES:].decode("utf-8", "replace").strip():
        _log.warning("hub process: %s", _SECRETS.sub("***", text))


def _encoded(job: Job) -> bytes:
    return msgspec.json.encode(job) + b"\n"


def _decoded(line: bytes) -> Report:
    report: Report = msgspec.json.decode(line, type=Report)
    return report


def _error(failed: Failed) -> errors.ModelServerError:
    return errors.BY_REASON[failed.reason](
        failed.message,
        field=failed.field,
        retry_after_seconds=failed.retry_after_seconds,
        **failed.metadata,
    )


def _ending(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"
