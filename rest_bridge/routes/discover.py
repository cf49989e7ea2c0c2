"""The hub's catalogue."""

from flask import Blueprint, Response, request

from mlxgui.v1 import model_pb2
from rest_bridge import native, web
from rest_bridge.errors import invalid

blueprint = Blueprint("discover", __name__)

_SORTS = {
    "downloads": model_pb2.CATALOG_SORT_DOWNLOADS,
    "likes": model_pb2.CATALOG_SORT_LIKES,
    "created": model_pb2.CATALOG_SORT_CREATED,
    "updated": model_pb2.CATALOG_SORT_UPDATED,
}


@blueprint.get("/v1/discover/models")
def search() -> Response:
    sort = request.args.get("sort", "downloads")
    if sort not in _SORTS:
        raise invalid(f"`sort` must be one of {', '.join(_SORTS)}.", "sort")
    return _search(model_pb2.SearchCatalogRequest(sort=_SORTS[sort]))


@blueprint.get("/v1/discover/popular")
def popular() -> Response:
    return _search(model_pb2.SearchCatalogRequest(sort=model_pb2.CATALOG_SORT_DOWNLOADS), with_query=False)


@blueprint.get("/v1/discover/embeddings")
def embeddings() -> Response:
    return _search(model_pb2.SearchCatalogRequest(kind=model_pb2.CATALOG_KIND_EMBEDDING))


@blueprint.get("/v1/discover/compatible")
def compatible() -> Response:
    text = request.args.get("max_memory_gb", "0")
    try:
        max_memory_bytes = int(float(text) * native.GIB)
    except (ValueError, OverflowError):
        max_memory_bytes = -1
    if not 0 <= max_memory_bytes < 2**63:
        raise invalid("`max_memory_gb` must be a number, 0 or more.", "max_memory_gb")
    return _search(model_pb2.SearchCatalogRequest(max_memory_bytes=max_memory_bytes))


@blueprint.get("/v1/discover/categories")
def categories() -> Response:
    answer = web.ask(
        web.bridge().backend.models.ListCatalogCategories, model_pb2.ListCatalogCategoriesRequest()
    )
    return web.json_response(native.catalog_categories(answer))


@blueprint.get("/v1/discover/models/<path:model_id>")
def show(model_id: str) -> Response:
    bridge = web.bridge()
    message = model_pb2.GetCatalogModelRequest(id=model_id)
    answer = web.ask_watched(
        bridge.backend.models.GetCatalogModel, message, bridge.config.catalog_timeout_seconds
    )
    return web.json_response(native.message_json(answer.model))


def _search(message: model_pb2.SearchCatalogRequest, *, with_query: bool = True) -> Response:
    if with_query:
        message.query = request.args.get("query", "")
    message.page_size = web.query_integer("limit", 20, 1, 100)
    bridge = web.bridge()
    answer = web.ask_watched(
        bridge.backend.models.SearchCatalog, message, bridge.config.catalog_timeout_seconds
    )
    return web.json_response(native.catalog_page(answer))
