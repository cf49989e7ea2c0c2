"""The RPCs of ModelService about the hub: its catalogue, and updates from it."""

from collections.abc import AsyncIterator

from mlxgui.v1 import model_pb2 as pb
from mlxgui_grpc import convert, discovery_entry
from mlxgui_grpc.discovery import Discovery, Entry, Query
from mlxgui_grpc.discovery_categories import CATEGORIES
from mlxgui_grpc.errors import InvalidRequestError
from mlxgui_grpc.installer import Installer
from mlxgui_grpc.services.model_base import Context, ModelServiceBase

_SORTS = {
    pb.CATALOG_SORT_LIKES: "likes",
    pb.CATALOG_SORT_CREATED: "created_at",
    pb.CATALOG_SORT_UPDATED: "last_modified",
}


class CatalogRpcs(ModelServiceBase):
    """What the hub has. ModelService, a subclass, sets the attributes."""

    _discovery: Discovery
    _installer: Installer

    async def SearchCatalog(
        self, request: pb.SearchCatalogRequest, context: Context
    ) -> pb.SearchCatalogResponse:
        if request.sort not in pb.CatalogSort.values():
            raise InvalidRequestError("sort must be downloads, likes, created or updated", field="sort")
        if request.kind not in pb.CatalogKind.values():
            raise InvalidRequestError("kind must be any or embedding", field="kind")
        query = Query(
            words=request.query.strip(),
            sort=_SORTS.get(request.sort, "downloads"),
            is_embedding=request.kind == pb.CATALOG_KIND_EMBEDDING,
            max_memory_bytes=request.max_memory_bytes if request.HasField("max_memory_bytes") else None,
        )
        page = await self._discovery.search(query, request.page_size, request.page_token)
        return pb.SearchCatalogResponse(
            models=[_entry_to_proto(entry) for entry in page.entries], next_page_token=page.next_token
        )

    async def GetCatalogModel(
        self, request: pb.GetCatalogModelRequest, context: Context
    ) -> pb.GetCatalogModelResponse:
        entry = await self._discovery.show(request.id)
        return pb.GetCatalogModelResponse(model=_entry_to_proto(entry))

    async def ListCatalogCategories(
        self, request: pb.ListCatalogCategoriesRequest, context: Context
    ) -> pb.ListCatalogCategoriesResponse:
        category = pb.ListCatalogCategoriesResponse.Category
        return pb.ListCatalogCategoriesResponse(
            categories=[category(title=title, model_ids=model_ids) for title, model_ids in CATEGORIES]
        )

    async def UpdateModel(
        self, request: pb.UpdateModelRequest, context: Context
    ) -> AsyncIterator[pb.UpdateModelResponse]:
        operation = await self._installer.update(
            self._find(request.name).name, request.revision, request_id=request.request_id
        )
        async for snapshot in self._watch(operation):
            yield pb.UpdateModelResponse(operation=snapshot)
        await self._operations.wait(operation)


def _entry_to_proto(entry: Entry) -> pb.CatalogModel:
    repository = entry.repository
    author, _, name = repository.id.rpartition("/")
    message = pb.CatalogModel(
        id=repository.id,
        name=name,
        author=author,
        download_count=repository.downloads,
        like_count=repository.likes,
        model_type=entry.model_type,
        size_bytes=discovery_entry.size_bytes(repository),
        estimated_memory_bytes=entry.estimated_memory_bytes,
        mlx_compatible=entry.is_loadable,
        has_mlx_version=entry.is_loadable or bool(repository.mlx_repository),
        mlx_repo_id=repository.mlx_repository or None,
        tags=repository.tags,
        description=discovery_entry.description(repository),
        library_name=repository.library_name,
        pipeline_tag=repository.pipeline_tag,
        memory_fit=entry.memory_fit,
        gated=repository.is_gated,
        installed_name=entry.installed_name,
    )
    if repository.create_time is not None:
        message.create_time.CopyFrom(convert.timestamp(repository.create_time))
    if repository.update_time is not None:
        message.update_time.CopyFrom(convert.timestamp(repository.update_time))
    if entry.fit is not None:
        message.compatibility_message = entry.fit.message
        if entry.fit.is_compatible is not None:
            message.system_compatible = entry.fit.is_compatible
    return message
