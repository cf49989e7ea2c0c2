"""ModelService: the registry, installations and operations."""

import asyncio
from collections.abc import AsyncIterator

from mlxgui.v1 import model_pb2 as pb
from mlxgui_grpc import convert
from mlxgui_grpc.catalog import Catalog
from mlxgui_grpc.discovery import Discovery
from mlxgui_grpc.errors import InvalidRequestError
from mlxgui_grpc.installer import Installer
from mlxgui_grpc.operations import Operation, Operations
from mlxgui_grpc.residency import Residency
from mlxgui_grpc.services.catalog_service import CatalogRpcs
from mlxgui_grpc.services.manager_rpcs import ManagerRpcs
from mlxgui_grpc.services.model_base import Context

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1_000


class ModelService(ManagerRpcs, CatalogRpcs):
    """Dropping a stream of a long action detaches from it; CancelOperation ends it."""

    def __init__(
        self,
        catalog: Catalog,
        residency: Residency,
        installer: Installer,
        operations: Operations,
        discovery: Discovery,
        draining: asyncio.Event,
    ) -> None:
        """`draining` is set when the server ends."""
        super().__init__(catalog, residency, operations, draining)
        self._installer = installer
        self._discovery = discovery

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
                convert.model_name(request.name, "name"),
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
        await self._finish(self._cancel(operation))
        return pb.CancelOperationResponse(operation=self._operation_to_proto(operation))

    async def _cancel(self, operation: Operation) -> None:
        was_done = operation.is_done
        await self._operations.cancel(operation)
        resident = self._residency.find(operation.model)
        is_loading = resident is not None and resident.load is not None and not resident.load.done()
        if operation.kind == "load" and not was_done and is_loading:
            await self._residency.unload(operation.model, force=True)  # For everybody who waits for it.


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
