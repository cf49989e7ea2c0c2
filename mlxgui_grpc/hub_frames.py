"""The messages between `Hub` and its child process: one JSON line each."""

import msgspec


class DownloadJob(msgspec.Struct, frozen=True, tag="download"):
    """Fetch one revision of one repository into the cache.

    The token travels on this pipe and nowhere else: arguments and environments of a process can be
    read by others.
    """

    model_id: str
    revision: str | None
    cache_dir: str
    endpoint: str | None
    token: str | None
    parallel_file_count: int
    disk_reserve_bytes: int
    force: bool = False
    """Hash what is in the cache, too, and fetch again what is damaged."""

    def __repr__(self) -> str:
        return f"DownloadJob({self.model_id!r}, {self.revision!r})"


class DeleteJob(msgspec.Struct, frozen=True, tag="delete"):
    """Remove one revision of one repository from the cache."""

    model_id: str
    revision: str
    cache_dir: str


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """How far a download is; see `hub.DownloadProgress`."""

    phase: str
    done_bytes: int = 0
    total_bytes: int = 0
    done_file_count: int = 0
    total_file_count: int = 0
    current_file: str = ""
    bytes_per_second: float = 0.0
    eta_seconds: float | None = None


class Downloaded(msgspec.Struct, frozen=True, tag="downloaded"):
    """The download is complete and registered in the cache."""

    revision: str
    path: str
    size_bytes: int
    file_count: int
    is_ours: bool


class Deleted(msgspec.Struct, frozen=True, tag="deleted"):
    """The revision is gone."""

    freed_bytes: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The job ended with an error of `mlxgui_grpc.errors`, named by its reason."""

    reason: str
    message: str
    field: str = ""
    retry_after_seconds: float | None = None
    metadata: dict[str, str] = {}


Job = DownloadJob | DeleteJob
Report = Progress | Downloaded | Deleted | Failed


class JobError(Exception):
    """Raised in the child to end the job with a reason that the caller can act on."""

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        field: str = "",
        retry_after_seconds: float | None = None,
        **metadata: str,
    ) -> None:
        super().__init__(message)
        self.failed = Failed(reason, message, field, retry_after_seconds, metadata)
