"""Installing from the model hub: starts a child process per download and relays what it reports."""

import json
import re
import subprocess
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from mlxgui_grpc import errors, hub_process
from mlxgui_grpc.hub_cache import (
    PARTIAL_MAX_AGE_SECONDS,
    RepositoryFolder,
    Snapshot,
    cache_dir_of,
    cached_models,
    sweep_partials,
)
from mlxgui_grpc.hub_frames import Deleted, DeleteJob, Downloaded, DownloadJob, Failed, Progress

__all__ = ["DownloadProgress", "Hub", "Snapshot", "check_model_id", "check_revision"]

_CHILD = "mlxgui_grpc.hub_download"
_ID_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_TOKEN = re.compile(r"[!-~]+")
_REVISION_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,127}")


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
        self.cache_dir = cache_dir
        self._token = token
        self._offline = offline
        self._parallel_file_count = parallel_file_count
        self._disk_reserve_bytes = disk_reserve_bytes

    @property
    def cache_dir(self) -> Path:
        """The Hugging Face cache of new downloads; what is in an earlier one stays there, and is deleted there."""
        return self._cache_dir

    @cache_dir.setter
    def cache_dir(self, path: Path) -> None:
        self._cache_dir = path.expanduser().absolute()

    async def download(
        self,
        model_id: str,
        revision: str | None,
        on_progress: Callable[[DownloadProgress], None],
        *,
        force: bool = False,
        cache_dir: Path | None = None,
    ) -> Snapshot:
        """Fetch a repository's revision (default: main) into the Hugging Face cache, or another `cache_dir`.

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
        check_access(self._endpoint, self._token)
        job = DownloadJob(
            model_id=model_id,
            revision=revision,
            cache_dir=str(cache_dir or self._cache_dir),
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

    def delete_revision(self, model_id: str, revision: str, path: Path | None = None) -> int:
        """Remove one revision (a commit hash) from the cache that `path` is in (its snapshot's folder; default:
        the cache of new downloads); bytes freed, 0 when it is not there.

        Other revisions keep their files, and nothing outside the repository's folder is touched. The
        caller has checked that it is ours to delete. Blocks for a scan of the cache. Raises
        ModelInUseError while the repository is being downloaded, ModelDeleteFailedError.
        """
        check_model_id(model_id)
        check_revision(revision)
        cache_dir = cache_dir_of(path) if path else None
        job = DeleteJob(model_id=model_id, revision=revision, cache_dir=str(cache_dir or self._cache_dir))
        child = subprocess.run(
            hub_process.command(_CHILD),
            input=hub_process.encoded(job),
            capture_output=True,
            check=False,
            env=hub_process.environment(),
            process_group=0,
        )
        hub_process.log_tail(child.stderr)
        for line in child.stdout.splitlines():
            report = hub_process.decoded(line)
            if isinstance(report, Deleted):
                return report.freed_bytes
            if isinstance(report, Failed):
                raise hub_process.error_of(report)
        raise errors.ModelDeleteFailedError(
            f"The files of '{model_id}' were not removed: the process that does it ended with "
            f"{hub_process.ending(child.returncode)}.",
            model_id=model_id,
        )

    def find_cached(
        self, model_id: str, revision: str | None = None, cache_dir: Path | None = None
    ) -> Snapshot | None:
        """The complete snapshot in the cache (default: main, else the newest), whoever fetched it."""
        check_model_id(model_id)
        return RepositoryFolder(cache_dir or self._cache_dir, model_id).find(revision)

    def cached_models(self) -> list[Snapshot]:
        """Every complete model in the cache, by hub id."""
        return cached_models(self._cache_dir)

    def sweep_partials(
        self, keep: Collection[str] = (), *, older_than_seconds: float = PARTIAL_MAX_AGE_SECONDS
    ) -> int:
        """Remove leftovers of interrupted downloads, except those of the hub ids in `keep`; bytes freed."""
        return sweep_partials(self._cache_dir, keep=keep, older_than_seconds=older_than_seconds)


def check_model_id(model_id: str, field: str = "model_id") -> None:
    """Raise InvalidRequestError unless it is `owner/name`, which is also safe as a folder's name."""
    parts = model_id.split("/")
    well_formed = len(parts) == 2 and all(_ID_PART.fullmatch(part) for part in parts)
    if not well_formed or "--" in model_id or ".." in model_id or model_id.endswith(".git"):
        raise errors.InvalidRequestError(
            f"{field} must be a hub id such as 'owner/name', not {json.dumps(model_id[:100])}.",
            field=field,
        )


def check_access(endpoint: str | None, token: str | None) -> None:
    """Raise HubUnavailableError or HubAccessDeniedError where the hub cannot even be asked with these."""
    if endpoint and urlsplit(endpoint).scheme not in ("http", "https"):
        raise errors.HubUnavailableError(
            "HF_ENDPOINT is not an http or https address; set it to the hub's, or unset it."
        )
    if token and not _TOKEN.fullmatch(token):
        raise errors.HubAccessDeniedError(
            "HF_TOKEN has characters that no token has, such as a space or a line break; set it again and restart."
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
    child = await hub_process.HubProcess.spawn(_CHILD)
    try:
        child.send(job)
        while (report := await child.receive()) is not None:
            if isinstance(report, Progress):
                on_progress(DownloadProgress(**msgspec.structs.asdict(report)))
            elif isinstance(report, Downloaded):
                return report
            elif isinstance(report, Failed):
                raise hub_process.error_of(report)
        raise errors.HubUnavailableError(
            f"The download of '{job.model_id}' was interrupted (its process ended with {await child.ending()}); "
            "repeat the install, it goes on where it stopped.",
            model_id=job.model_id,
        )
    finally:
        # The pipe stays open until here: its end is the child's end.
        await child.end()
