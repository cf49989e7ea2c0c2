"""The RPCs of ModelService about memory: load, unload, what is there, priorities, pins, estimates."""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator

from mlxgui.v1 import model_pb2 as pb
from mlxgui_grpc import checkpoint, convert
from mlxgui_grpc.catalog import Catalog, InstalledModel
from mlxgui_grpc.errors import (
    HardwareIncompatibleError,
    InvalidRequestError,
    ModelServerError,
    ServerDrainingError,
)
from mlxgui_grpc.memory import gigabytes_text
from mlxgui_grpc.operations import LoadProgress, Operation, Operations
from mlxgui_grpc.residency import LoadWish, Residency
from mlxgui_grpc.services.manager_messages import model_to_proto, snapshot_to_proto
from mlxgui_grpc.services.model_base import Context, ModelServiceBase

WATCH_SECONDS = 0.5
"""Least time between two snapshots of WatchManager."""
ESTIMATE_TOKENS = 2048
MAX_REQUESTS = 1024


class ManagerRpcs(ModelServiceBase):
    """Everything that moves models into memory and out of it, or looks at it."""

    def __init__(
        self, catalog: Catalog, residency: Residency, operations: Operations, draining: asyncio.Event
    ) -> None:
        """`draining` is set when the server ends."""
        super().__init__(catalog, residency, operations)
        self._draining = draining
        self._load_streams: Counter[int] = Counter()
        """LoadModel streams that are open, by model."""
        self._wishes: dict[int, LoadWish] = {}
        """What the callers of the last LoadModel want, by model."""

    async def LoadModel(
        self, request: pb.LoadModelRequest, context: Context
    ) -> AsyncIterator[pb.LoadModelResponse]:
        wish = LoadWish(convert.priority(request.priority), convert.keep_alive_seconds(request))
        model = self._find(request.name)
        self._load_streams[model.id] += 1
        try:
            operation = self._operations.running("load", model.name)
            if operation is None:
                operation = await self._start_load(model, wish)
            else:
                self._wishes[model.id].join(wish)
                self._residency.amend_load(model, self._wishes[model.id])
            async for snapshot in self._watch(operation):
                yield pb.LoadModelResponse(operation=snapshot)
        finally:
            self._load_streams[model.id] -= 1
            self._leave_load(model)
        await self._operations.wait(operation)

    async def _start_load(self, model: InstalledModel, wish: LoadWish) -> Operation:
        async def action(operation: Operation) -> InstalledModel:
            await self._residency.load(model, wish, report=lambda progress: _show(operation, progress))
            return self._catalog.get(model.name)

        self._wishes[model.id] = wish
        return await self._operations.start("load", model.name, LoadProgress(), action)

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Context) -> pb.UnloadModelResponse:
        model = self._find(request.name)
        await self._finish(self._residency.unload(model.name, force=request.force))
        return pb.UnloadModelResponse(model=self._to_proto(self._find(model.name)))

    async def GetModelStatus(
        self, request: pb.GetModelStatusRequest, context: Context
    ) -> pb.GetModelStatusResponse:
        status = self._residency.status(self._find(request.name))
        return pb.GetModelStatusResponse(status=model_to_proto(status))

    async def GetManagerStatus(
        self, request: pb.GetManagerStatusRequest, context: Context
    ) -> pb.GetManagerStatusResponse:
        return pb.GetManagerStatusResponse(snapshot=self._snapshot())

    async def WatchManager(
        self, request: pb.WatchManagerRequest, context: Context
    ) -> AsyncIterator[pb.WatchManagerResponse]:
        changes, before = self._residency.changes, None
        while not self._draining.is_set():
            seen = changes.count
            snapshot = self._snapshot()
            if snapshot != before:
                yield pb.WatchManagerResponse(snapshot=snapshot)
                before = snapshot
            await asyncio.sleep(WATCH_SECONDS)
            is_busy = snapshot.status.running_request_count or snapshot.status.tokens_per_second
            while not is_busy and changes.count == seen and not self._draining.is_set():
                await changes.wait(WATCH_SECONDS)
        raise ServerDrainingError("The server is stopping")

    async def SetModelPriority(
        self, request: pb.SetModelPriorityRequest, context: Context
    ) -> pb.SetModelPriorityResponse:
        model = self._find(request.name)
        priority = convert.priority(request.priority)
        position = self._residency.set_priority(model, priority)
        return pb.SetModelPriorityResponse(
            name=model.name, priority=priority, queue_position=position or None
        )

    async def PinModel(self, request: pb.PinModelRequest, context: Context) -> pb.PinModelResponse:
        model = await self._finish(self._residency.pin(self._find(request.name), pinned=True))
        return pb.PinModelResponse(model=self._to_proto(model))

    async def UnpinModel(self, request: pb.UnpinModelRequest, context: Context) -> pb.UnpinModelResponse:
        model = await self._finish(self._residency.pin(self._find(request.name), pinned=False))
        return pb.UnpinModelResponse(model=self._to_proto(model))

    async def EstimateLoad(
        self, request: pb.EstimateLoadRequest, context: Context
    ) -> pb.EstimateLoadResponse:
        model = self._find(request.name)
        budget = self._residency.budget
        context_length = model.context_length or math.inf
        tokens = request.tokens_per_request if request.HasField("tokens_per_request") else ESTIMATE_TOKENS
        count = budget.limits.max_rows
        if request.HasField("concurrent_request_count"):
            count = request.concurrent_request_count
        if not 1 <= count <= MAX_REQUESTS:
            raise InvalidRequestError(
                f"concurrent_request_count must be between 1 and {MAX_REQUESTS}",
                field="concurrent_request_count",
            )
        if request.HasField("tokens_per_request") and not 1 <= tokens <= context_length:
            raise InvalidRequestError(
                f"tokens_per_request must be between 1 and {context_length}, the model's context",
                field="tokens_per_request",
            )
        asked = budget.estimate(model, request_count=count, token_count=tokens)
        # What LoadModel itself would reckon with; requests beyond it wait for memory, and do not fail.
        plan, room = budget.plan(model, budget.estimate(model).required_bytes)
        is_loaded = self._residency.is_loaded(model.name)
        refusal = None if is_loaded else await self._unloadable(model) or plan.refusal
        warning = "" if is_loaded or refusal else plan.memory_warning
        if not warning and not refusal and asked.required_bytes > plan.reclaimable_bytes and not is_loaded:
            warning = (
                f"{count} requests of {tokens} tokens at once would need {gigabytes_text(asked.required_bytes)}, and "
                f"{gigabytes_text(plan.reclaimable_bytes)} are there: some of them would wait"
            )
        return pb.EstimateLoadResponse(
            accepted=refusal is None,
            refusal=convert.error_to_proto(refusal) if refusal else None,
            weight_bytes=asked.weight_bytes,
            kv_bytes=asked.kv_bytes,
            prefill_bytes=asked.prefill_bytes,
            process_bytes=asked.process_bytes,
            required_bytes=asked.required_bytes,
            available_bytes=max(0, room.free_bytes),
            reclaimable_bytes=max(0, plan.reclaimable_bytes),
            evicted_models=() if is_loaded or refusal else plan.victims,
            memory_warning=warning,
            already_loaded=is_loaded,
        )

    async def _unloadable(self, model: InstalledModel) -> ModelServerError | None:
        """Why the model cannot be loaded, however much memory there is."""
        if cause := self._residency.hardware_error:
            return HardwareIncompatibleError(cause)

        def check() -> None:
            checkpoint.require_loadable(checkpoint.inspect(model.path))

        try:
            await asyncio.to_thread(check)
        except ModelServerError as error:
            return error
        return None

    def _snapshot(self) -> pb.ManagerSnapshot:
        loads = self._operations.list(include_done=False)
        return snapshot_to_proto(
            self._residency.snapshot(), {one.model: one.id for one in loads if one.kind == "load"}
        )

    def _leave_load(self, model: InstalledModel) -> None:
        """A stream of a load has gone. With the last one a load is withdrawn that still waits for its turn."""
        if self._load_streams[model.id] > 0:
            return
        del self._load_streams[model.id]
        operation, resident = self._operations.running("load", model.name), self._residency.find(model.name)
        if operation is not None and resident is not None and resident.state == "queued":
            self._run_to_end(self._operations.cancel(operation))


def _show(operation: Operation, progress: LoadProgress) -> None:
    """Let those who watch the operation see how far its load is."""
    if progress != operation.progress:
        operation.progress = progress
        operation.changed()
