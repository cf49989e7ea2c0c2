"""What goes wrong at the hub, explained: exceptions of the child process become reasons and sentences."""

import errno
import os
import traceback
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mlxgui_grpc.hub_frames import DeleteJob, DownloadJob, Failed, Job, JobError, LookupJob, SearchJob

if TYPE_CHECKING:
    from httpx2 import Response

OnlineJob = DownloadJob | LookupJob


def as_failure(error: BaseException, job: Job) -> Failed:
    """What went wrong, as a reason and one sentence with the way out; never the token, never a signed URL."""
    if isinstance(error, JobError):
        return error.failed
    known = None if isinstance(job, DeleteJob) else _hub_failure(error, job)
    if known is not None:
        return known.failed
    if isinstance(error, OSError) and not isinstance(job, LookupJob):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return Failed(
                "DISK_FULL", f"The disk of {job.cache_dir} is full; free some space and repeat the install."
            )
        if error.errno is not None:
            return Failed(
                "INTERNAL", f"The cache {job.cache_dir} cannot be written: {os.strerror(error.errno)}."
            )
    text = "".join(traceback.format_exception(error))
    if not isinstance(job, DeleteJob) and job.token:
        text = text.replace(job.token, "***")
    os.write(2, text.encode())
    return Failed("INTERNAL", f"The {_words(job)} failed ({type(error).__name__}); the log has details.")


def _words(job: Job) -> str:
    return "search of the hub" if isinstance(job, SearchJob) else f"job on '{job.model_id}'"


def _hub_failure(error: BaseException, job: OnlineJob) -> JobError | None:
    import httpx2
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = _shown_endpoint(job)
    if isinstance(error, HfHubHTTPError) and isinstance(job, SearchJob):
        return _status_failure(error.response, job, hub)
    model_id = "" if isinstance(job, SearchJob) else job.model_id
    if isinstance(error, HFValidationError):
        return JobError(
            "INVALID_PARAMETER", f"'{model_id}' is not a hub id.", field="model_id", model_id=model_id
        )
    if isinstance(error, GatedRepoError):
        way_out = (
            f"accept the terms at {hub}/{model_id} with the account of HF_TOKEN"
            if job.token
            else f"accept the terms at {hub}/{model_id} and set HF_TOKEN"
        )
        return JobError(
            "HUB_ACCESS_DENIED", f"Repository '{model_id}' is gated; {way_out}.", model_id=model_id
        )
    if isinstance(error, DisabledRepoError):
        return JobError(
            "HUB_ACCESS_DENIED",
            f"Repository '{model_id}' was disabled by the hub; choose another one.",
            model_id=model_id,
        )
    if isinstance(error, RevisionNotFoundError):
        revision = (job.revision if isinstance(job, DownloadJob) else None) or "main"
        return JobError(
            "HUB_REPO_NOT_FOUND",
            f"Revision '{revision}' of '{model_id}' not found on the hub; name a branch, a tag or a commit.",
            field="revision",
            model_id=model_id,
            revision=revision,
        )
    if isinstance(error, RepositoryNotFoundError):
        return _not_found(model_id)
    if isinstance(error, HfHubHTTPError):
        return _status_failure(error.response, job, hub)
    if isinstance(error, httpx2.HTTPError):
        return JobError(
            "HUB_UNAVAILABLE",
            f"The hub at {hub} cannot be reached ({type(error).__name__}); check the network or HF_ENDPOINT.",
            endpoint=hub,
        )
    if isinstance(error, (ValueError, KeyError, TypeError, RecursionError, MemoryError)):
        _note(error)
        return JobError(
            "HUB_UNAVAILABLE",
            f"{hub} answered with something that is not a model hub's; check HF_ENDPOINT and proxies.",
            endpoint=hub,
        )
    return None


def _status_failure(response: "Response", job: OnlineJob, hub: str) -> JobError:
    status = response.status_code
    if status == 429:
        return rate_limited(response)
    if isinstance(job, SearchJob):
        if status in (401, 403):
            return JobError("HUB_ACCESS_DENIED", f"The hub at {hub} refuses a search; check HF_TOKEN.")
    elif status in (401, 403):
        if job.token or status == 403:
            return JobError(
                "HUB_ACCESS_DENIED",
                f"The hub refuses '{job.model_id}'; check HF_TOKEN and the terms at {hub}/{job.model_id}.",
                model_id=job.model_id,
            )
        return _not_found(job.model_id)
    elif status == 404:
        return _not_found(job.model_id)
    return JobError(
        "HUB_UNAVAILABLE",
        f"The hub at {hub} answered HTTP {status}; try again later.",
        retry_after_seconds=retry_after_seconds(response) or None,
        endpoint=hub,
        status=str(status),
    )


def _not_found(model_id: str) -> JobError:
    return JobError(
        "HUB_REPO_NOT_FOUND",
        f"Repository '{model_id}' not found on the hub; check the id, or set HF_TOKEN if it is private.",
        model_id=model_id,
    )


def rate_limited(response: "Response") -> JobError:
    """The error for an answer of status 429."""
    seconds = retry_after_seconds(response)
    when = f"in {seconds:.0f} seconds" if seconds else "later"
    return JobError(
        "HUB_RATE_LIMITED",
        f"The hub asks for fewer requests; try again {when}, or set HF_TOKEN for a higher limit.",
        retry_after_seconds=seconds or None,
    )


def retry_after_seconds(response: "Response") -> float:
    """How long the answer asks to wait; 0 when it does not say."""
    text = response.headers.get("Retry-After", "")
    if text.isascii() and text.isdigit():
        return float(text)
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    limit = parse_ratelimit_headers(response.headers)
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else 0.0


def _shown_endpoint(job: OnlineJob) -> str:
    """The hub's address without a password that may be in it."""
    from huggingface_hub import constants

    url = urlsplit(job.endpoint or constants.ENDPOINT)
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}".rstrip("/")


def _note(error: BaseException) -> None:
    """Leave the place of an unexpected answer on standard error; its text may hold anything."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames))
    os.write(2, f"{type(error).__name__} at {where}\n".encode())
