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
from mlxgui_grpc.engine import architectures
from mlxgui_grpc.engine.frames import Loaded
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
POOLINGS = {
    "cls": pb.POOLING_CLS,
    "mean": pb.POOLING_MEAN,
    "max": pb.POOLING_MAX,
    "last_token": pb.POOLING_LAST_TOKEN,
    "weighted_mean": pb.POOLING_WEIGHTED_MEAN,
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
        loaded = resident.loaded if resident is not None else None
        if loaded is not None:
            message.notes.extend(loaded.notes)
        if model.type in ("text", "vision"):
            message.capabilities.append(pb.CAPABILITY_COMPLETION)
            if metadata.get("has_chat_template"):
                message.capabilities.append(pb.CAPABILITY_CHAT)
                self._tell_replies(message, metadata, loaded)
            message.capabilities.extend([pb.CAPABILITY_STRUCTURED_OUTPUT, pb.CAPABILITY_LOGPROBS])
            if model.type == "vision" and not (loaded and loaded.warnings):
                message.capabilities.append(pb.CAPABILITY_IMAGE_INPUT)
            # Of a model that is not loaded its architecture tells; its layers may yet turn out to be special.
            note = architectures.serial_note(message.architecture) if model.type == "text" else ""
            if loaded.batchable if loaded is not None else model.type == "text" and not note:
                message.capabilities.append(pb.CAPABILITY_BATCHING)
            if loaded is None and note:
                message.notes.append(note)
        elif model.type == "embedding":
            message.capabilities.extend([pb.CAPABILITY_EMBEDDING, pb.CAPABILITY_BATCHING])
            message.pooling = POOLINGS.get(metadata.get("pooling"), pb.POOLING_UNSPECIFIED)
            message.embedding_dimensions = metadata.get("embedding_dimensions", 0)
            if metadata.get("is_pooling_assumed"):
                message.notes.append(
                    "the checkpoint does not say how it pools (it has no 1_Pooling/config.json); what its family "
                    "usually does is done"
                )
        elif model.type == "reranker":
            message.capabilities.extend([pb.CAPABILITY_RERANK, pb.CAPABILITY_BATCHING])
        else:
            message.notes.append(f"this version does not serve models for {model.type}")
        return message

    @staticmethod
    def _tell_replies(message: pb.Model, metadata: dict[str, Any], loaded: Loaded | None) -> None:
        """Thinking and tool calls: as the template shows them, or as the loaded model turned out to mark them."""
        message.tool_format = loaded.tool_format if loaded is not None else metadata.get("tool_format", "")
        if loaded.can_think if loaded is not None else metadata.get("has_thinking"):
            message.capabilities.append(pb.CAPABILITY_REASONING)
        if not metadata.get("has_tools"):
            return
        is_known = loaded is not None or "tool_format" in metadata  # An older version did not look.
        if message.tool_format or not is_known:
            message.capabilities.append(pb.CAPABILITY_TOOLS)
        else:
            message.notes.append(
                "its chat template takes tools, and how it writes calls is not known: they stay in the text"
            )

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
