"""ModelService: the registry, what is in memory, and long actions on models."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import grpc

from mlxgui.v1 import model_pb2 as pb
from mlxgui.v1 import model_pb2_grpc
from mlxgui_grpc import convert
from mlxgui_grpc.catalog import Catalog, InstalledModel, Origin
from mlxgui_grpc.errors import InvalidRequestError
from mlxgui_grpc.installer import Installer
from mlxgui_grpc.operations import InstallProgress, LoadProgress, Operation, Operations
from mlxgui_grpc.residency import Residency

Context = grpc.aio.ServicerContext[Any, Any]
Result = TypeVar("Result")

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1_000

_TYPES = {
    "text": pb.MODEL_TYPE_TEXT,
    "vision": pb.MODEL_TYPE_VISION,
    "embedding": pb.MODEL_TYPE_EMBEDDING,
    "transcription": pb.MODEL_TYPE_TRANSCRIPTION,
    "speech": pb.MODEL_TYPE_SPEECH,
}
_STATES = {
    "loading": pb.MODEL_STATE_LOADING,
    "loaded": pb.MODEL_STATE_LOADED,
    "unloading": pb.MODEL_STATE_UNLOADING,
}
_SOURCES = {
    Origin.HUB: pb.MODEL_SOURCE_HUB,
    Origin.DIRECTORY: pb.MODEL_SOURCE_DIRECTORY,
    Origin.DEMO: pb.MODEL_SOURCE_BUILT_IN,
}
_KINDS = {"install": pb.Operation.KIND_INSTALL, "load": pb.Operation.KIND_LOAD}


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """Dropping a stream of a long action detaches from it; CancelOperation ends it."""

    def __init__(
        self, catalog: Catalog, residency: Residency, installer: Installer, operations: Operations
    ) -> None:
        self._catalog = catalog
        self._residency = residency
        self._installer = installer
        self._operations = operations
        self._unstoppable: set[asyncio.Task[Any]] = set()

    # The registry.

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        found = self._catalog.models()
        if request.include_available:
            found += await self._installer.available()
        models = [self._to_proto(model) for model in found]
        models.sort(key=lambda model: model.name.casefold())
        if request.types:
            models = [model for model in models if model.type in request.types]
        if request.states:
            models = [model for model in models if model.state in request.states]
        # The token is the name after which the page begins: models that come and go shift nothing.
        after = _name_token(request.page_token)
        rest = [model for model in models if model.name.casefold() > after]
        size = _page_size(request.page_size)
        token = rest[size - 1].name.casefold().encode().hex() if len(rest) > size else ""
        return pb.ListModelsResponse(models=rest[:size], next_page_token=token)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        return pb.GetModelResponse(model=self._to_proto(self._find(request.name)))

    async def CheckModelHealth(
        self, request: pb.CheckModelHealthRequest, context: Context
    ) -> pb.CheckModelHealthResponse:
        model = self._to_proto(self._find(request.name))
        reason = model.error_message or "the model is not loaded"
        healthy = False
        if model.state == pb.MODEL_STATE_LOADED:
            resident = self._residency.find(model.name)
            healthy = resident is not None and resident.worker is not None and resident.worker.is_delivering
            reason = "" if healthy else "the model is loaded, and its worker delivers nothing"
        return pb.CheckModelHealthResponse(
            name=model.name,
            state=model.state,
            healthy=healthy,
            last_use_time=model.last_use_time if model.HasField("last_use_time") else None,
            reason=reason,
        )

    async def DeleteModel(self, request: pb.DeleteModelRequest, context: Context) -> pb.DeleteModelResponse:
        removal = await self._finish(
            self._installer.remove(
                self._find(request.name).name,
                remove_files=request.remove_files if request.HasField("remove_files") else True,
                force=request.force,
            )
        )
        return pb.DeleteModelResponse(
            name=removal.name,
            removed_files=removal.removed_files,
            kept_reason=removal.kept_reason,
            freed_bytes=removal.freed_bytes,
        )

    # Long actions.

    async def InstallModel(
        self, request: pb.InstallModelRequest, context: Context
    ) -> AsyncIterator[pb.InstallModelResponse]:
        kind = request.WhichOneof("source")
        if kind == "model_id":
            operation = await self._installer.install_from_hub(
                request.model_id,
                request.name,
                request.revision,
                force=request.force,
                request_id=request.request_id,
            )
        elif kind == "local_directory":
            if request.revision:
                raise InvalidRequestError("a local directory has no revision", field="revision")
            operation = await self._installer.install_directory(
                request.local_directory,
                request.name,
                trusted=_is_local_user(context),
                force=request.force,
                request_id=request.request_id,
            )
        else:
            raise InvalidRequestError("one of model_id and local_directory is required", field="model_id")
        async for snapshot in self._watch(operation):
            yield pb.InstallModelResponse(operation=snapshot)
        await self._operations.wait(operation)

    async def LoadModel(
        self, request: pb.LoadModelRequest, context: Context
    ) -> AsyncIterator[pb.LoadModelResponse]:
        if not -100 <= request.priority <= 100:
            raise InvalidRequestError("priority must be between -100 and 100", field="priority")
        model = self._find(request.name)

        async def action(operation: Operation) -> InstalledModel:
            assert isinstance(operation.progress, LoadProgress)
            operation.progress.phase = "loading"
            operation.changed()
            await self._residency.load(model)
            return self._catalog.get(model.name)

        operation = self._operations.running("load", model.name) or await self._operations.start(
            "load", model.name, LoadProgress(), action
        )
        for name, is_set in (("priority", request.priority), ("keep_alive", request.HasField("keep_alive"))):
            warning = f"{name} has no effect in this version"
            if is_set and warning not in operation.warnings:
                operation.warnings.append(warning)
        async for snapshot in self._watch(operation):
            yield pb.LoadModelResponse(operation=snapshot)
        await self._operations.wait(operation)

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Context) -> pb.UnloadModelResponse:
        model = self._find(request.name)
        await self._finish(self._residency.unload(model.name, force=request.force))
        return pb.UnloadModelResponse(model=self._to_proto(model))

    async def GetOperation(
        self, request: pb.GetOperationRequest, context: Context
    ) -> pb.GetOperationResponse:
        return pb.GetOperationResponse(operation=self._operation_to_proto(self._operations.get(request.id)))

    async def ListOperations(
        self, request: pb.ListOperationsRequest, context: Context
    ) -> pb.ListOperationsResponse:
        operations = self._operations.list(include_done=request.include_done)
        offset, size = _token(request.page_token), _page_size(request.page_size)
        page = operations[offset : offset + size]
        return pb.ListOperationsResponse(
            operations=[self._operation_to_proto(operation) for operation in page],
            next_page_token=str(offset + size) if offset + size < len(operations) else "",
        )

    async def WatchOperation(
        self, request: pb.WatchOperationRequest, context: Context
    ) -> AsyncIterator[pb.WatchOperationResponse]:
        async for snapshot in self._watch(self._operations.get(request.id)):
            yield pb.WatchOperationResponse(operation=snapshot)

    async def CancelOperation(
        self, request: pb.CancelOperationRequest, context: Context
    ) -> pb.CancelOperationResponse:
        operation = self._operations.get(request.id)
        was_done = operation.is_done
        await self._operations.cancel(operation)
        if operation.kind == "load" and not was_done and not self._residency.is_loaded(operation.model):
            await self._residency.unload(operation.model, force=True)
        return pb.CancelOperationResponse(operation=self._operation_to_proto(operation))

    async def _finish(self, action: Coroutine[Any, Any, Result]) -> Result:
        """Run what must not stop halfway: it goes on when the caller leaves."""
        task = asyncio.get_running_loop().create_task(action)
        self._unstoppable.add(task)
        task.add_done_callback(self._unstoppable.discard)
        return await asyncio.shield(task)

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
            state = _STATES[resident.state]
        elif self._operations.running("install", model.name):
            state = pb.MODEL_STATE_INSTALLING
        else:
            state = pb.MODEL_STATE_FAILED if model.error_message else pb.MODEL_STATE_UNLOADED
        message = pb.Model(
            id=model.id,
            name=model.name,
            path=str(model.path),
            version=model.revision[:12] or "1.0",
            type=_TYPES.get(model.type, pb.MODEL_TYPE_UNSPECIFIED),
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
            message.load.phase = pb.LoadProgress.Phase.Value(f"PHASE_{progress.phase.upper()}")
            message.load.queue_position = progress.queue_position
            message.load.attempt = progress.attempt
        if operation.is_done and operation.error is not None:
            message.error.CopyFrom(convert.error_to_proto(operation.error))
        elif operation.is_done and operation.result is not None:
            message.success.CopyFrom(self._to_proto(operation.result))
        return message


def _is_local_user(context: Context) -> bool:
    """On the unix socket, where only this user gets; but the bridge there speaks for whoever reaches REST."""
    metadata = dict(context.invocation_metadata() or ())
    return context.peer().startswith("unix:") and "x-mlxgui-rest" not in metadata


def _page_size(size: int) -> int:
    if size < 0:
        raise InvalidRequestError("page_size must not be negative", field="page_size")
    return min(size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def _name_token(token: str) -> str:
    try:
        return bytes.fromhex(token).decode()
    except ValueError:
        raise _foreign_token() from None


def _token(token: str) -> int:
    if not token:
        return 0
    if not token.isascii() or not token.isdigit() or len(token) > 18:
        raise _foreign_token()
    return int(token)


def _foreign_token() -> InvalidRequestError:
    return InvalidRequestError("page_token is none that this server gave", field="page_token")
