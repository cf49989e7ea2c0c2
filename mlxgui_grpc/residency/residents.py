"""A model in memory or on its way there, and the limits that all of them share."""

import asyncio
import math
import time
from dataclasses import dataclass, field

from mlxgui_grpc.catalog import InstalledModel
from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.supervisor import WorkerProcess
from mlxgui_grpc.memory import ESTIMATE_CONTEXT_TOKENS, Estimate
from mlxgui_grpc.operations import LoadProgress
from mlxgui_grpc.residency.load_queue import Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the settings say about models in memory."""

    max_models: int = 3
    auto_unload: bool = True
    """Unload models that are idle."""
    idle_seconds: float = 1800.0
    memory_cap_bytes: int = 0
    """Memory that all models together may take; 0: what the machine has."""
    max_rows: int = 32
    """Rows that decode at once, per model."""
    max_waiting_rows: int = 128
    context_limit: int = 0
    """Most tokens of a row; 0: what each model was made for."""
    use_gpu: bool = True
    standby_count: int = 1


@dataclass(slots=True)
class LoadWish:
    """What those want who ask for a load; it may change while the load is under way."""

    priority: int = 0
    """0: the model's own."""
    keep_alive_seconds: float | None = None
    """How long the model stays after its last use; None: as the settings say."""

    def join(self, other: "LoadWish") -> None:
        """Somebody else asks for the same load: the larger priority counts, and the later keep-alive."""
        self.priority = max(self.priority, other.priority)
        if other.keep_alive_seconds is not None:
            self.keep_alive_seconds = other.keep_alive_seconds


@dataclass(eq=False, slots=True)
class Resident:
    """A model in memory, or on its way in or out."""

    model: InstalledModel
    estimate: Estimate
    ticket: Ticket
    state: str = "queued"
    """queued, loading, loaded or unloading."""
    worker: WorkerProcess | None = None
    loaded: frames.Loaded | None = None
    load: asyncio.Task[None] | None = None
    progress: LoadProgress = field(default_factory=LoadProgress)
    is_explicit: bool = False
    """Somebody asked for the load itself: it need not spare models that have just come."""
    use_count: int = 0
    """Requests that hold it now."""
    waiting_count: int = 0
    """Requests that wait for its load."""
    follower_count: int = 0
    """Everybody who waits for its load, requests included."""
    is_leaving: bool = False
    """To be evicted as soon as its requests have ended: it takes no new ones."""
    keep_alive_seconds: float | None = None
    """How long it stays after its last use, as LoadModel said; None: as the settings say."""
    request_keep_alive_seconds: float | None = None
    """The same as the last request said, which counts before it; None: it did not say."""
    load_time: float = 0.0
    """When it was loaded, Unix seconds."""
    idle_since: float = 0.0
    """End of its last use, or of its load, on the monotonic clock."""
    loaded_since: float = 0.0
    """End of its load, on the monotonic clock."""

    @property
    def name(self) -> str:
        """The installed name."""
        return self.model.name

    @property
    def is_loaded(self) -> bool:
        """Ready to serve."""
        return self.state == "loaded"

    @property
    def is_busy(self) -> bool:
        """Requests hold it or are about to."""
        return self.use_count + self.waiting_count > 0

    @property
    def used_bytes(self) -> int:
        """Memory that it takes now: the larger of MLX's count and the process's footprint."""
        worker = self.worker
        if worker is None or not worker.is_alive:
            return 0
        usage = worker.latest_usage
        in_mlx = usage.active_bytes + usage.cache_bytes if usage else 0
        return max(worker.footprint_bytes, in_mlx)

    @property
    def kv_bytes(self) -> int:
        """Memory of its rows' caches."""
        usage = self.worker.latest_usage if self.worker else None
        return usage.kv_bytes if usage else 0

    @property
    def kv_needed_bytes(self) -> int:
        """KV cache that it may have in any case: what its rows hold, and enough for one of some thousand tokens."""
        if self.loaded is None:
            return self.estimate.kv_bytes
        tokens = min(self.loaded.context_length or ESTIMATE_CONTEXT_TOKENS, ESTIMATE_CONTEXT_TOKENS)
        return max(self.loaded.kv_bytes_per_token * tokens, self.kv_bytes)

    @property
    def reserved_bytes(self) -> int:
        """What is set aside for it: what it takes, or what it was promised if that is more."""
        if self.state == "queued":
            return 0
        return max(self.used_bytes, self.estimate.required_bytes)

    def expires_at(self, limits: Limits) -> float:
        """When it is unloaded for being idle, on the monotonic clock; infinity: never, or it is in use."""
        if self.state != "loaded" or self.is_busy or self.model.pinned:
            return math.inf
        for seconds in (self.request_keep_alive_seconds, self.keep_alive_seconds):
            if seconds is not None:
                return self.idle_since + seconds
        return self.idle_since + limits.idle_seconds if limits.auto_unload else math.inf

    def note_loaded(self) -> None:
        """Its load has ended well."""
        self.state = "loaded"
        self.load_time = time.time()
        self.loaded_since = self.idle_since = time.monotonic()


@dataclass(frozen=True, slots=True)
class Lease:
    """A loaded model, held for one request."""

    resident: Resident
    worker: WorkerProcess
    load_seconds: float
    """What this request waited for the load; 0 when the model was there."""
