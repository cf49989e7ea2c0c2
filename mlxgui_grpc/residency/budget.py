"""The memory for models: what there is, what each one takes or was promised, and what a load would need."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from mlxgui_grpc import memory
from mlxgui_grpc.catalog import InstalledModel
from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.supervisor import WorkerProcess
from mlxgui_grpc.errors import HardwareIncompatibleError
from mlxgui_grpc.residency.plan import Occupant, Plan, Room, plan_load
from mlxgui_grpc.residency.residents import Limits
from mlxgui_grpc.residency.roster import Roster

KV_SHARE = 0.5
"""Part of the free memory that is given out for KV caches; the rest is for prefills and for what comes next."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What MLX runs on."""

    name: str
    memory_bytes: int
    """What it may use; 0: MLX does not say, as on a CPU."""
    is_gpu: bool


class Budget:
    """Reservations of memory. Use on the event loop only."""

    def __init__(self, roster: Roster, limits: Limits) -> None:
        self._roster = roster
        self.limits = limits
        self.standby_bytes: Callable[[], int] = lambda: 0
        """Memory of the workers that wait for a model: a load takes one of them over."""
        self.process_bytes = memory.PROCESS_BYTES
        """Footprint of a worker without a model, as the last one told."""
        self.device: DeviceInfo | None = None
        """What the last worker found MLX to run on; None before the first."""
        self.hardware_error = ""
        """Why no worker can run MLX on this machine; empty: one could, or none has tried."""
        self.versions: dict[str, str] = {}
        """Versions of the engine's packages."""

    def learn(self, worker: WorkerProcess, ready: frames.Ready) -> None:
        """Keep what a worker without a model tells."""
        self.versions = ready.versions
        self.hardware_error = ""
        self.device = DeviceInfo(ready.device_name or ready.device, ready.device_memory_bytes, ready.is_gpu)
        self.process_bytes = worker.footprint_bytes or self.process_bytes

    def learn_failure(self, error: Exception) -> None:
        """Keep why a worker could not run MLX."""
        if isinstance(error, HardwareIncompatibleError):
            self.hardware_error = error.message

    def room(self, newcomer: str = "") -> Room:
        """The memory for models, by reservation and by what the machine has free; `newcomer` reserves nothing yet."""
        machine = memory.read_machine_memory()
        limits = [machine.total_bytes]
        if self.device is not None and self.device.memory_bytes:
            limits.append(self.device.memory_bytes)
        without_cap = min(limits)
        budget = min(without_cap, self.limits.memory_cap_bytes or without_cap)
        reserved = promised = 0
        for resident in self._roster.residents():
            if resident.name == newcomer:
                continue
            used_bytes = resident.used_bytes
            reserved_bytes = resident.reserved_bytes
            reserved += reserved_bytes
            promised += max(0, reserved_bytes - used_bytes)
        available = machine.available_bytes + self.standby_bytes() - promised
        is_capped = budget - reserved < min(without_cap - reserved, available)
        return Room(budget, min(budget - reserved, available), self.limits.max_models, is_capped)

    def estimate(
        self,
        model: InstalledModel,
        *,
        request_count: int = 1,
        token_count: int = memory.ESTIMATE_CONTEXT_TOKENS,
    ) -> memory.Estimate:
        """Memory that a model takes."""
        facts = json.loads(model.metadata)
        return memory.estimate(
            int(facts.get("weight_bytes", model.size_bytes)),
            int(facts.get("kv_bytes_per_token", 0)),
            context_length=model.context_length,
            token_count=token_count,
            request_count=request_count,
            process_bytes=self.process_bytes,
            batch_bytes=int(facts.get("batch_bytes", 0)),
        )

    def plan(self, model: InstalledModel, required_bytes: int) -> tuple[Plan, Room]:
        """What a load of so many bytes would do now, and the memory for it. Changes nothing."""
        room = self.room(newcomer=model.name)
        occupants = [
            Occupant(
                name=one.name,
                reserved_bytes=one.reserved_bytes,
                idle_since=one.idle_since,
                is_busy=one.is_busy or not one.is_loaded,
                is_pinned=one.model.pinned,
            )
            for one in self._roster.residents()
            if one.state != "queued" and one.name != model.name
        ]
        return plan_load(model.name, required_bytes, occupants, room), room

    def available_bytes(self) -> int:
        """Memory that a load could have now, that of idle models included."""
        return max(0, self.room().free_bytes + sum(one.reserved_bytes for one in self._roster.idle()))

    def has_room_for_standby(self) -> bool:
        """A warm worker is a convenience: none where memory is short."""
        return memory.read_machine_memory().available_bytes > 2 * self.process_bytes

    def kv_share_bytes(self) -> int:
        """KV cache that each model may have beyond what it has or is promised: its share of what is free."""
        sharing_count = sum(one.state in ("loading", "loaded") for one in self._roster.residents())
        return int(KV_SHARE * max(0, self.room().free_bytes) / max(1, sharing_count))

    def share_out(self) -> None:
        """Tell the workers what they may use, now that somebody has come or gone."""
        share_bytes = self.kv_share_bytes()
        for resident in self._roster.residents():
            if resident.is_loaded and resident.worker is not None and resident.worker.is_alive:
                resident.worker.limit(
                    max_rows=self.limits.max_rows, kv_budget_bytes=resident.kv_needed_bytes + share_bytes
                )
