"""Models installed, in memory and on the hub, blocking."""

from pathlib import Path

from mlxgui.v1 import model_pb2
from mlxgui_grpc.client import management, operations
from mlxgui_grpc.client import messages as conversion
from mlxgui_grpc.client.blocking.connection import Connection, Stream
from mlxgui_grpc.client.management import CatalogKind, CatalogSort


class ModelCalls(Connection):
    """ModelService: what is installed, what is in memory, what the hub has."""

    def models(self, *, include_available: bool = False) -> list[model_pb2.Model]:
        """The installed models, by name; also those of the Hugging Face cache that could be, if asked for."""
        request = conversion.checked(model_pb2.ListModelsRequest)(
            page_size=1000, include_available=include_available
        )
        found: list[model_pb2.Model] = []
        while True:
            page = self._call(self._models.ListModels, request, self._timeout_seconds)
            found.extend(page.models)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def model(self, name: str) -> model_pb2.Model:
        """One installed model."""
        request = conversion.checked(model_pb2.GetModelRequest)(name=name)
        return self._call(self._models.GetModel, request, self._timeout_seconds).model

    def install(
        self,
        source: str | Path,
        name: str = "",
        *,
        revision: str = "",
        force: bool = False,
        request_id: str = "",
    ) -> Stream[model_pb2.Operation]:
        """Install a hub id (text) or a directory on the server's machine (`Path`); streams snapshots.

        The last snapshot has `success`. A failed operation raises. Closing the stream only detaches: see
        `cancel_operation`.
        """
        request = conversion.install_request(source, name, revision, force=force, request_id=request_id)
        return self._stream(self._models.InstallModel, request, operations.snapshot, None)

    def update(self, name: str, *, revision: str = "", request_id: str = "") -> Stream[model_pb2.Operation]:
        """Install a newer revision of a model; streams snapshots, as `install` does.

        The last snapshot's `success` is the model with its revision, which is the old one when nothing is newer.
        """
        request = conversion.checked(model_pb2.UpdateModelRequest)(
            name=name, revision=revision, request_id=request_id
        )
        return self._stream(self._models.UpdateModel, request, operations.snapshot, None)

    def load(
        self, name: str, *, priority: int = 0, keep_alive_seconds: float | None = None
    ) -> Stream[model_pb2.Operation]:
        """Load a model; streams snapshots, the last of which has `success`. A failed operation raises."""
        keep_alive = conversion.duration(keep_alive_seconds)
        request = conversion.checked(model_pb2.LoadModelRequest)(
            name=name, priority=priority, keep_alive=keep_alive
        )
        return self._stream(self._models.LoadModel, request, operations.snapshot, None)

    def unload(
        self, name: str, *, force: bool = False, timeout_seconds: float | None = None
    ) -> model_pb2.Model:
        """Remove a model from memory; `force` ends its requests."""
        request = conversion.checked(model_pb2.UnloadModelRequest)(name=name, force=force)
        return self._call(self._models.UnloadModel, request, timeout_seconds).model

    def delete(
        self,
        name: str,
        *,
        remove_files: bool = True,
        force: bool = False,
        timeout_seconds: float | None = None,
    ) -> model_pb2.DeleteModelResponse:
        """Remove a model from the registry, with the files that the server downloaded for it."""
        request = conversion.checked(model_pb2.DeleteModelRequest)(
            name=name, remove_files=remove_files, force=force
        )
        return self._call(self._models.DeleteModel, request, timeout_seconds)

    def health(self, name: str) -> model_pb2.CheckModelHealthResponse:
        """Whether a model is ready to serve; does not load it."""
        request = conversion.checked(model_pb2.CheckModelHealthRequest)(name=name)
        return self._call(self._models.CheckModelHealth, request, self._timeout_seconds)

    # What is in memory.

    def manager_status(self) -> model_pb2.ManagerSnapshot:
        """What is in memory and what waits."""
        request = model_pb2.GetManagerStatusRequest()
        return self._call(self._models.GetManagerStatus, request, self._timeout_seconds).snapshot

    def watch_manager(self) -> Stream[model_pb2.ManagerSnapshot]:
        """What `manager_status` answers: at once, then on every change, at most twice a second."""
        request = model_pb2.WatchManagerRequest()
        return self._stream(self._models.WatchManager, request, operations.manager_snapshot, None)

    def model_status(self, name: str) -> model_pb2.LoadedModel:
        """What one model does in memory; its state says whether it is there at all."""
        request = conversion.checked(model_pb2.GetModelStatusRequest)(name=name)
        return self._call(self._models.GetModelStatus, request, self._timeout_seconds).status

    def set_priority(self, name: str, priority: int) -> model_pb2.SetModelPriorityResponse:
        """Move a model's queued load, and its later ones: larger goes first, -100 to 100."""
        request = conversion.checked(model_pb2.SetModelPriorityRequest)(name=name, priority=priority)
        return self._call(self._models.SetModelPriority, request, self._timeout_seconds)

    def pin(self, name: str) -> model_pb2.Model:
        """Keep a model in memory once it is loaded; does not load it."""
        request = conversion.checked(model_pb2.PinModelRequest)(name=name)
        return self._call(self._models.PinModel, request, self._timeout_seconds).model

    def unpin(self, name: str) -> model_pb2.Model:
        """Undo `pin`; does not unload the model."""
        request = conversion.checked(model_pb2.UnpinModelRequest)(name=name)
        return self._call(self._models.UnpinModel, request, self._timeout_seconds).model

    def estimate(
        self,
        name: str,
        *,
        concurrent_request_count: int | None = None,
        tokens_per_request: int | None = None,
    ) -> model_pb2.EstimateLoadResponse:
        """What a load would take and evict; one that would be refused is an answer too, with `refusal`."""
        request = conversion.checked(model_pb2.EstimateLoadRequest)(
            name=name,
            concurrent_request_count=concurrent_request_count,
            tokens_per_request=tokens_per_request,
        )
        return self._call(self._models.EstimateLoad, request, self._timeout_seconds)

    # The hub.

    def search(
        self,
        query: str = "",
        *,
        sort: CatalogSort = "downloads",
        kind: CatalogKind = "any",
        max_memory_bytes: int | None = None,
        limit: int = 20,
    ) -> list[model_pb2.CatalogModel]:
        """Models of the hub that MLX can run, at most `limit` of them.

        With `max_memory_bytes` only those that fit so much; 0 is what the server's machine has available.
        """
        request = management.search_request(query, sort, kind, max_memory_bytes, limit)
        found: list[model_pb2.CatalogModel] = []
        # Bounded: where few models fit the memory, page after page may have none of them.
        for _ in range(management.MAX_PAGES):
            page = self._call(self._models.SearchCatalog, request, self._timeout_seconds)
            found.extend(page.models)
            if not page.next_page_token or len(found) >= limit:
                break
            request.page_token = page.next_page_token
        return found[:limit]

    def catalog_model(self, model_id: str) -> model_pb2.CatalogModel:
        """One repository of the hub, and whether the server's machine can run it."""
        request = conversion.checked(model_pb2.GetCatalogModelRequest)(id=model_id)
        return self._call(self._models.GetCatalogModel, request, self._timeout_seconds).model

    def categories(self) -> list[model_pb2.ListCatalogCategoriesResponse.Category]:
        """Groups of models worth trying, in the order to show them."""
        request = model_pb2.ListCatalogCategoriesRequest()
        response = self._call(self._models.ListCatalogCategories, request, self._timeout_seconds)
        return list(response.categories)

    # Long actions.

    def operations(self, *, include_done: bool = False) -> list[model_pb2.Operation]:
        """The long actions that run, newest first; finished ones too, if asked for."""
        request = conversion.checked(model_pb2.ListOperationsRequest)(
            page_size=1000, include_done=include_done
        )
        found: list[model_pb2.Operation] = []
        while True:
            page = self._call(self._models.ListOperations, request, self._timeout_seconds)
            found.extend(page.operations)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def operation(self, operation_id: str) -> model_pb2.Operation:
        """One operation as it stands; a failed one is an answer here, not an exception."""
        request = conversion.checked(model_pb2.GetOperationRequest)(id=operation_id)
        return self._call(self._models.GetOperation, request, self._timeout_seconds).operation

    def watch_operation(self, operation_id: str) -> Stream[model_pb2.Operation]:
        """Snapshots of an operation until it is done. A failed operation raises."""
        request = conversion.checked(model_pb2.WatchOperationRequest)(id=operation_id)
        return self._stream(self._models.WatchOperation, request, operations.snapshot, None)

    def cancel_operation(self, operation_id: str) -> model_pb2.Operation:
        """Cancel an operation for everybody who waits for it; answers it when it has ended."""
        request = conversion.checked(model_pb2.CancelOperationRequest)(id=operation_id)
        return self._call(self._models.CancelOperation, request, self._timeout_seconds).operation
