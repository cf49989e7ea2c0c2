"""What the parts of ModelService share: finding models, watching operations, and both as messages."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import grpc

from mlxgui.v1 import model_pb2 as pb
from mlxgui.v1 import model_pb2_grpc
from mlxgui_grpc import convert
from mlxgui_grpc.catalog import Catalog, InstalledModel, Origin
from mlxgui_grpc.operations import InstallProgress, Operation, Operations
from mlxgui_grpc.residency import Residency
from mlxgui_grpc.services.manager_messages import STATES, TYPES

Context = grpc.aio.ServicerContext[Any, Any]
Result = TypeVar("Result")

_SOURCES = {
    Origin.HUB: pb.MODEL_SOURCE_HUB,
    Origin.DIRECTORY: pb.MODEL_SOURCE_DIRECTORY,
    Origin.DEMO: pb.MODEL_SOURCE_BUILT_IN,
}
_KINDS = {
    "install": pb.Operation.KIND_INSTALL,
    "load": pb.Operation.KIND_LOAD,
    "update": pb.Operation.KIND_UPDATE,
}


class ModelServiceBase(model_pb2_grpc.ModelServiceServicer):
    """The registry, what is in memory, and long actions, for the RPCs of the subclasses."""

    def __init__(self, catalog: Catalog, residency: Residency, operations: Operations) -> None:
        self._catalog = catalog
        self._residency = residency
        self._operations = operations
        self._unstoppable: set[asyncio.Task[Any]] = set()

    async def _finish(self, action: Coroutine[Any, Any, Result]) -> Result:
        """Run what must not stop halfway: it goes on when the caller leaves."""
        return await asyncio.shield(self._run_to_end(action))

    def _run_to_end(self, action: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = asyncio.get_running_loop().create_task(action)
        self._unstoppable.add(task)
        task.add_done_callback(self._unstoppable.discard)
        return task

    # Conversions that need to know what is in memory.

    def _find(self, name: str) -> InstalledModel:
        return self._catalog.get(convert.model_name(name, "name"))

    async def _watch(self, operation: Operation) -> AsyncIterator[pb.Operation]:
        async for changed in self._operations.watch(operation):
            yield self._operation_to_proto(changed)

    def _to_proto(self, model: InstalledModel) -> pb.Model:
        metadata = json.loads(model.metadata)
        resident = self._residency.find(model.name)
        if not model.id:
            state = pb.MODEL_STATE_AVAILABLE
        elif resident is not None:
            state = STATES[resident.state]
        elif self._operations.running("install", model.name):
            state = pb.MODEL_STATE_INSTALLING
        else:
            state = pb.MODEL_STATE_FAILED if model.error_message else pb.MODEL_STATE_UNLOADED
        message = pb.Model(
            id=model.id,
            name=model.name,
            path=str(model.path),
            version=model.revision[:12] or "1.0",
            type=TYPES.get(model.type, pb.MODEL_TYPE_UNSPECIFIED),
            state=state,
            memory_required_bytes=model.memory_bytes,
            use_count=model.use_count,
            create_time=convert.timestamp(model.create_time) if model.id else None,
            update_time=convert.timestamp(model.update_time) if model.id else None,
            error_message=model.error_message,
            metadata_json=model.metadata,
            huggingface_id=model.huggingface_id,
            author=model.author,
            revision=model.revision,
            context_length=model.context_length,
            size_bytes=model.size_bytes,
            source=_SOURCES[model.origin],
            architecture=metadata.get("architecture", ""),
            parameter_count=metadata.get("parameter_count", 0),
            quantization_bits=metadata.get("quantization_bits", 0),
            pinned=model.pinned,
        )
        if model.last_use_time is not None:
            message.last_use_time.CopyFrom(convert.timestamp(model.last_use_time))
        if model.type == "text":
            message.capabilities.append(pb.CAPABILITY_COMPLETION)
            if metadata.get("has_chat_template"):
                message.capabilities.append(pb.CAPABILITY_CHAT)
                if metadata.get("has_tools"):
                    message.capabilities.append(pb.CAPABILITY_TOOLS)
            if resident is not None and resident.loaded is not None and resident.loaded.batchable:
                message.capabilities.append(pb.CAPABILITY_BATCHING)
        else:
            message.notes.append(f"this version does not serve models for {model.type}")
        return message

    def _operation_to_proto(self, operation: Operation) -> pb.Operation:
        message = pb.Operation(
            id=operation.id,
            kind=_KINDS[operation.kind],
            model=operation.model,
            done=operation.is_done,
            warnings=operation.warnings,
            create_time=convert.timestamp(operation.create_time),
            update_time=convert.timestamp(operation.update_time),
        )
        progress = operation.progress
        if isinstance(progress, InstallProgress):
            message.install.CopyFrom(
                pb.InstallProgress(
                    phase=pb.InstallProgress.Phase.Value(f"PHASE_{progress.phase.upper()}"),
                    done_bytes=progress.done_bytes,
                    total_bytes=progress.total_bytes,
                    done_file_count=progress.done_file_count,
                    total_file_count=progress.total_file_count,
                    current_file=progress.current_file,
                    bytes_per_second=int(progress.bytes_per_second),
                )
            )
            if progress.remaining_seconds is not None:
                message.install.remaining.CopyFrom(convert.duration(progress.remaining_seconds))
        else:
            message.load.CopyFrom(
                pb.LoadProgress(
                    phase=pb.LoadProgress.Phase.Value(f"PHASE_{progress.phase.upper()}"),
                    queue_position=progress.queue_position,
                    attempt=progress.attempt,
                    evicted_models=progress.evicted_models,
                    done_bytes=progress.done_bytes,
                    total_bytes=progress.total_bytes,
                    memory_warning=progress.memory_warning,
                )
            )
        if operation.is_done and operation.error is not None:
            message.error.CopyFrom(convert.error_to_proto(operation.error))
        elif operation.is_done and operation.result is not None:
            message.success.CopyFrom(self._to_proto(operation.result))
        return message
