"""The child process that talks to the model hub: fetches or deletes one revision, reports, ends.

Started as `python -m mlxgui_grpc.hub_download`. It reads one job as a JSON line from standard input,
writes reports as JSON lines to standard output, and ends at once when standard input closes. Whenever
it ends, by whatever signal, the cache has the whole snapshot or none of it, and the next attempt goes
on where this one stopped.
"""

import dataclasses
import os
import queue
import threading
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING, BinaryIO, cast

from mlxgui_grpc import failpoints
from mlxgui_grpc.failpoints import failpoint
from mlxgui_grpc.hub_cache import RepositoryBusyError, RepositoryFolder
from mlxgui_grpc.hub_child import Emit, end_with_the_server, library_environment, open_reports, read_jobs
from mlxgui_grpc.hub_failures import as_failure, rate_limited, retry_after_seconds
from mlxgui_grpc.hub_files import (
    MAX_WEIGHT_FILE_BYTES,
    ListedFile,
    RepositoryFile,
    select_files,
)
from mlxgui_grpc.hub_frames import (
    Deleted,
    DeleteJob,
    Downloaded,
    DownloadJob,
    JobError,
    Progress,
)
from mlxgui_grpc.hub_part import Meter, PartFile, wrong_size

if TYPE_CHECKING:
    from httpx2 import Response
    from huggingface_hub import DeleteCacheStrategy

CHUNK_BYTES = 256 * 1024
"""How much is fetched between two writes; the library's 10 MB would be lost whenever a line breaks."""

METADATA_TIMEOUT_SECONDS = 30.0
MAX_PATIENCE_SECONDS = 20.0
"""A hub that asks to wait longer than this is reported to the caller rather than waited for."""


def main() -> None:
    """Run the job on standard input."""
    failpoints.arm(os.environ.get(failpoints.ENVIRONMENT, ""), control_pid=os.getppid())
    emit = open_reports()
    job = next(read_jobs())
    assert isinstance(job, DownloadJob | DeleteJob)
    endpoint = job.endpoint if isinstance(job, DownloadJob) else None
    os.environ.update(library_environment(endpoint), HF_HUB_CACHE=job.cache_dir)
    os.environ.pop("HF_DEBUG", None)  # It logs every request.
    try:
        if isinstance(job, DownloadJob):
            threading.Thread(target=end_with_the_server, name="control", daemon=True).start()
            emit(download(job, emit))
        else:
            emit(delete(job))
    except BaseException as error:
        emit(as_failure(error, job))
        # Other threads may wait on the network for seconds; nothing of theirs is worth that.
        os._exit(1)


def download(job: DownloadJob, emit: Emit) -> Downloaded:
    """Fetch a revision, verify it and put it in place.

    Raises JobError, or what huggingface_hub and the system raise; `as_failure` explains either.
    """
    emit(Progress("resolving"))
    _prepare_client(job)
    commit, listed = _describe(job)
    files = select_files(job.model_id, listed)
    folder = RepositoryFolder(Path(job.cache_dir), job.model_id)
    with folder.locked(wait=True):
        present = folder.find(commit)
        is_ours = present is None or present.is_ours
        folder.prepare()
        # Equal files have one blob.
        contents = list({file.etag: file for file in files}.values())
        if job.force:
            emit(Progress("verifying"))
        is_there = folder.has_intact if job.force else folder.has
        missing = [file for file in contents if not is_there(file)]
        _check_disk(job, folder, missing)
        meter = Meter(emit, contents, missing)
        _fetch_all(job, commit, folder, missing, meter)
        meter.report("verifying")
        path = folder.commit(commit, job.revision or "main", files, is_ours=is_ours)
    return Downloaded(
        revision=commit,
        path=str(path),
        size_bytes=sum(file.size_bytes for file in contents),
        file_count=len(files),
        is_ours=is_ours,
    )


def delete(job: DeleteJob) -> Deleted:
    """Remove one revision through huggingface_hub, and nothing that lies outside its folder."""
    from huggingface_hub import scan_cache_dir

    cache_dir = Path(job.cache_dir)
    folder = RepositoryFolder(cache_dir, job.model_id)
    if not (folder.snapshots / job.revision).is_dir():
        return Deleted(0)
    if folder.path.is_symlink():
        raise JobError(
            "MODEL_DELETE_FAILED",
            f"'{folder.path}' is a link to elsewhere; remove the model by hand.",
            model_id=job.model_id,
        )
    try:
        with folder.locked(wait=False):
            cache = scan_cache_dir(cache_dir)
            repositories = frozenset(repo for repo in cache.repos if repo.repo_path == folder.path.resolve())
            if not repositories:
                causes = [str(warning) for warning in cache.warnings if str(folder.path.name) in str(warning)]
                raise JobError(
                    "MODEL_DELETE_FAILED",
                    f"The cache folder of '{job.model_id}' is damaged; remove '{folder.path}' by hand"
                    f" ({causes[0] if causes else 'not listed by huggingface_hub'}).",
                    model_id=job.model_id,
                )
            # Forks share commit hashes, and the library would take the first repository that has one.
            cache = dataclasses.replace(cache, repos=repositories)
            strategy = _confined(cache.delete_revisions(job.revision), folder)
            failpoint("hub.before-delete")
            with folder.hidden(job.revision) as remainder:
                failpoint("hub.in-delete")
                strategy.execute()
            failpoint("hub.after-delete")
            if remainder.exists():
                raise JobError(
                    "MODEL_DELETE_FAILED",
                    f"The files of '{job.model_id}' could not be removed; check '{folder.path}'.",
                    model_id=job.model_id,
                )
    except RepositoryBusyError:
        raise JobError(
            "MODEL_IN_USE",
            f"'{job.model_id}' is being downloaded; cancel that first.",
            model_id=job.model_id,
        ) from None
    return Deleted(strategy.expected_freed_size)


def _confined(strategy: "DeleteCacheStrategy", folder: RepositoryFolder) -> "DeleteCacheStrategy":
    """Drop what a crafted link in a snapshot would have deleted elsewhere."""
    blobs = folder.blobs.resolve()
    return dataclasses.replace(
        strategy, blobs=frozenset(blob for blob in strategy.blobs if blob.parent.resolve() == blobs)
    )


def _prepare_client(job: DownloadJob) -> None:
    from huggingface_hub import constants, get_session

    constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES

    def refuse_long_waits(response: "Response") -> None:
        if response.status_code == 429 and retry_after_seconds(response) > MAX_PATIENCE_SECONDS:
            raise rate_limited(response)

    client = get_session()
    client.event_hooks = {**client.event_hooks, "response": [refuse_long_waits]}


def _describe(job: DownloadJob) -> tuple[str, list[ListedFile]]:
    """The commit that the revision names, and the files in it."""
    from huggingface_hub import HfApi

    info = HfApi(endpoint=job.endpoint, token=job.token).model_info(
        job.model_id, revision=job.revision, files_metadata=True, timeout=METADATA_TIMEOUT_SECONDS
    )
    commit = info.sha or ""
    if len(commit) != 40 or set(commit) - set("0123456789abcdef") or info.siblings is None:
        raise JobError(
            "HUB_UNAVAILABLE",
            f"The hub's description of '{job.model_id}' names no commit or no files; check HF_ENDPOINT.",
            model_id=job.model_id,
        )
    return commit, [
        ListedFile(
            name=sibling.rfilename,
            size_bytes=sibling.lfs.size if sibling.lfs else sibling.size,
            git_blob=sibling.blob_id,
            sha256=sibling.lfs.sha256 if sibling.lfs else None,
        )
        for sibling in info.siblings
    ]


def _check_disk(job: DownloadJob, folder: RepositoryFolder, missing: list[RepositoryFile]) -> None:
    for file in missing:
        if file.size_bytes > MAX_WEIGHT_FILE_BYTES:
            raise JobError(
                "MODEL_INCOMPATIBLE",
                f"'{file.name}' of '{job.model_id}' is over 50 GB; choose a version in smaller shards.",
                model_id=job.model_id,
                file=file.name,
            )
    needed_bytes = sum(file.size_bytes - folder.partial_bytes(file) for file in missing)
    free_bytes = disk_usage(folder.path).free
    if needed_bytes and needed_bytes + job.disk_reserve_bytes > free_bytes:
        raise JobError(
            "DISK_FULL",
            f"'{job.model_id}' needs {needed_bytes / 1e9:.2f} GB more and {job.cache_dir} has "
            f"{free_bytes / 1e9:.2f} GB free; free some space or set HF_HUB_CACHE to another disk.",
            model_id=job.model_id,
            needed_bytes=str(needed_bytes),
            free_bytes=str(free_bytes),
        )


def _fetch_all(
    job: DownloadJob, commit: str, folder: RepositoryFolder, missing: list[RepositoryFile], meter: "Meter"
) -> None:
    """Fetch on a few threads; the first error ends it, and the process, without waiting for the others."""
    waiting: queue.SimpleQueue[RepositoryFile] = queue.SimpleQueue()
    for file in missing:
        waiting.put(file)
    outcomes: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            while True:
                _fetch(job, commit, folder, waiting.get_nowait(), meter)
        except queue.Empty:
            outcomes.put(None)
        except BaseException as error:
            outcomes.put(error)

    thread_count = min(job.parallel_file_count, len(missing))
    for number in range(thread_count):
        threading.Thread(target=work, name=f"fetch-{number}", daemon=True).start()
    for _ in range(thread_count):
        if (error := outcomes.get()) is not None:
            raise error


def _fetch(
    job: DownloadJob, commit: str, folder: RepositoryFolder, file: RepositoryFile, meter: "Meter"
) -> None:
    meter.start(file)
    part_path = folder.part(file.etag)
    for is_last_attempt in (False, True):
        with PartFile.opened(part_path, file, job.model_id, meter) as part:
            is_resumed = part.size_bytes > 0
            _get(job, commit, file, part)
            failpoint("hub.before-sync")
            part.sync()
            is_right = part.etag() == file.etag
        if is_right:
            failpoint("hub.before-rename")
            os.replace(part_path, folder.verified(file.etag))
            failpoint("hub.after-rename")
            meter.finish(file)
            return
        part_path.unlink()
        meter.advance(-file.size_bytes)
        # Bytes of an earlier attempt can be bad (a power cut); bytes fetched just now are the hub's word.
        if is_last_attempt or not is_resumed:
            break
    raise JobError(
        "HUB_UNAVAILABLE",
        f"'{file.name}' of '{job.model_id}' is not the content that the hub announced; repeat the install.",
        model_id=job.model_id,
        file=file.name,
    )


def _get(job: DownloadJob, commit: str, file: RepositoryFile, part: "PartFile") -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers = build_hf_headers(token=job.token)
    # Bytes as they are stored: a compressed answer has no ranges and another length.
    headers["Accept-Encoding"] = "identity"
    try:
        http_get(
            hf_hub_url(job.model_id, file.name, revision=commit, endpoint=job.endpoint),
            cast(BinaryIO, part),
            resume_size=part.size_bytes,
            headers=headers,
            expected_size=file.size_bytes,
            displayed_filename=file.name,
        )
    except HfHubHTTPError as error:
        if error.response.status_code == 416:
            part.discard()
            raise wrong_size(job.model_id, file) from error
        raise
    except OSError as error:
        # The library's "consistency check": the hub ended the file in order, but early.
        if type(error) is OSError and error.errno is None:
            part.discard()
            raise wrong_size(job.model_id, file) from error
        raise


if __name__ == "__main__":
    main()
