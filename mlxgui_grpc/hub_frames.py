"""The messages between the control process and the children that talk to the hub: one JSON line each."""

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


class SearchJob(msgspec.Struct, frozen=True, tag="search"):
    """List one page of the hub's repositories."""

    words: str
    """To be found in the id; empty: any id."""
    tags: tuple[str, ...]
    """A repository has all of them."""
    sort: str
    """created_at, downloads, last_modified or likes; the largest first."""
    limit: int
    cursor: str
    """`Listed.next_cursor` of the page before; empty: the first page."""
    endpoint: str | None
    token: str | None
    time_limit_seconds: float

    def __repr__(self) -> str:
        return f"SearchJob({self.words!r}, {self.tags!r}, {self.sort!r})"


class DescribeJob(msgspec.Struct, frozen=True, tag="describe"):
    """Read everything that the hub knows of one repository."""

    model_id: str
    endpoint: str | None
    token: str | None
    time_limit_seconds: float

    def __repr__(self) -> str:
        return f"DescribeJob({self.model_id!r})"


class Repository(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the hub says of a model repository; None or empty where it does not."""

    id: str
    downloads: int = 0
    """Of the last 30 days."""
    likes: int = 0
    tags: list[str] = []
    pipeline_tag: str = ""
    library_name: str = ""
    create_time: float | None = None
    """Unix seconds, as the next one."""
    update_time: float | None = None
    is_gated: bool = False
    base_model: str = ""
    """Hub id of the model that this one was made from."""
    card_description: str = ""
    architecture: str = ""
    """`model_type` of its config.json."""
    type: str = ""
    """By its config.json, see `model_types`. A search knows that in part: there it is empty rather than text."""
    quantization_bits: int = 0
    quantization_method: str = ""
    """Of other libraries; MLX names none."""
    has_safetensors: bool = False
    tensor_bytes: int | None = None
    """Bytes of the tensors, by the headers of the safetensors files."""
    weight_file_bytes: int | None = None
    """Bytes of the files of weights; only a description has them."""
    kv_bytes_per_token: int = 0
    """0: not known."""
    context_length: int = 0
    """Positions; 0: not known."""
    mlx_repository: str = ""
    """Hub id of an MLX version of it, where it is none itself; only a description has it."""


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


class Listed(msgspec.Struct, frozen=True, tag="listed"):
    """One page of repositories."""

    repositories: list[Repository]
    next_cursor: str
    """Empty: this was the last page."""


class Described(msgspec.Struct, frozen=True, tag="described"):
    """One repository."""

    repository: Repository


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The job ended with an error of `mlxgui_grpc.errors`, named by its reason."""

    reason: str
    message: str
    field: str = ""
    retry_after_seconds: float | None = None
    metadata: dict[str, str] = {}


LookupJob = SearchJob | DescribeJob
Job = DownloadJob | DeleteJob | LookupJob
Report = Progress | Downloaded | Deleted | Listed | Described | Failed


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
