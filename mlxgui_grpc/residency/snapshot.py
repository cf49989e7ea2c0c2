"""What is in memory and what waits, at one moment, as plain values."""

import math
import time
from dataclasses import dataclass

from mlxgui_grpc.residency.residents import Resident


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """What one model does in memory. Instants in Unix seconds, None: never or not known."""

    name: str
    state: str
    """queued, loading, loaded, unloading; or unloaded, failed for a model that is not there."""
    type: str
    load_time: float | None = None
    last_use_time: float | None = None
    expire_time: float | None = None
    memory_bytes: int = 0
    estimated_memory_bytes: int = 0
    queue_position: int = 0
    """1 is next; 0: its load does not wait."""
    running_request_count: int = 0
    waiting_request_count: int = 0
    tokens_per_second: float = 0.0
    kv_bytes: int = 0
    is_pinned: bool = False
    process_id: int = 0


@dataclass(frozen=True, slots=True)
class QueuedLoad:
    """A load that waits; the first of them is next."""

    model: str
    priority: int
    queue_time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything, at one moment."""

    models: tuple[ModelStatus, ...]
    """By name."""
    queue: tuple[QueuedLoad, ...]
    budget_bytes: int
    machine_bytes: int
    max_models: int
    auto_unload: bool
    idle_seconds: float
    standby_count: int

    @property
    def loaded(self) -> list[ModelStatus]:
        """Those that are ready."""
        return [model for model in self.models if model.state == "loaded"]


def status_of(
    resident: Resident,
    last_use_time: float | None,
    queue_position: int,
    held_count: int,
    expires_at: float,
) -> ModelStatus:
    """What a resident does now. `held_count` requests wait until it has left, to load it again; `expires_at` is on the
    monotonic clock, infinity: never."""
    worker = resident.worker
    return ModelStatus(
        name=resident.name,
        state=resident.state,
        type=resident.model.type,
        load_time=resident.load_time or None,
        last_use_time=last_use_time,
        expire_time=time.time() + expires_at - time.monotonic() if expires_at < math.inf else None,
        memory_bytes=resident.used_bytes,
        estimated_memory_bytes=resident.estimate.required_bytes,
        queue_position=queue_position,
        running_request_count=worker.running_count if worker else 0,
        waiting_request_count=held_count + resident.waiting_count + (worker.waiting_count if worker else 0),
        tokens_per_second=worker.tokens_per_second if worker else 0.0,
        kv_bytes=resident.kv_bytes,
        is_pinned=resident.model.pinned,
        process_id=worker.pid if worker is not None and worker.is_alive else 0,
    )
