"""The hub's catalogue."""

from flask import Blueprint, Response

from mlxgui.v1 import model_pb2
from rest_bridge import native_system, web
from rest_bridge.errors import invalid
from rest_bridge.json_body import Fields
from rest_bridge.message_json import GIB, message_json

blueprint = Blueprint("discover", __name__)

_SORTS = {
    "downloads": model_pb2.CATALOG_SORT_DOWNLOADS,
    "likes": model_pb2.CATALOG_SORT_LIKES,
    "created": model_pb2.CATALOG_SORT_CREATED,
    "updated": model_pb2.CATALOG_SORT_UPDATED,
}
# 2**63 bytes and more are no memory.
_MAX_MEMORY_GB = 2**33 - 1


@blueprint.get("/v1/discover/models")
def search() -> Response:
    fields = web.query()
    sort = fields.text("sort")
    sort = "downloads" if sort is None else sort
    if sort not in _SORTS:
        raise invalid(f"`sort` must be one of {', '.join(_SORTS)}.", "sort")
    return _search(
        fields, model_pb2.SearchCatalogRequest(sort=_SORTS[sort], query=fields.text("query") or "")
    )


@blueprint.get("/v1/discover/popular")
def popular() -> Response:
    return _search(web.query(), model_pb2.SearchCatalogRequest(sort=model_pb2.CATALOG_SORT_DOWNLOADS))


@blueprint.get("/v1/discover/embeddings")
def embeddings() -> Response:
    fields = web.query()
    message = model_pb2.SearchCatalogRequest(
        kind=model_pb2.CATALOG_KIND_EMBEDDING, query=fields.text("query") or ""
    )
    return _search(fields, message)


@blueprint.get("/v1/discover/compatible")
def compatible() -> Response:
    fields = web.query()
    max_memory_gb = fields.number("max_memory_gb")
    if max_memory_gb is not None and not 0 < max_memory_gb <= _MAX_MEMORY_GB:
        raise invalid("`max_memory_gb` must be a number above 0.", "max_memory_gb")
    # The contract's 0 is what the machine has available.
    max_memory_bytes = 0 if max_memory_gb is None else max(1, int(max_memory_gb * GIB))
    message = model_pb2.SearchCatalogRequest(
        max_memory_bytes=max_memory_bytes, query=fields.text("query") or ""
    )
    return _search(fields, message)


@blueprint.get("/v1/discover/categories")
def categories() -> Response:
    web.no_query()
    answer = web.ask(
        web.bridge().backend.models.ListCatalogCategories, model_pb2.ListCatalogCategoriesRequest()
    )
    return web.json_response(native_system.catalog_categories(answer))


@blueprint.get("/v1/discover/models/<path:model_id>")
def show(model_id: str) -> Response:
    web.no_query()
    bridge = web.bridge()
    message = model_pb2.GetCatalogModelRequest(id=model_id)
    answer = web.ask_watched(
        bridge.backend.models.GetCatalogModel, message, bridge.config.catalog_timeout_seconds
    )
    return web.json_response(message_json(answer.model))


def _search(fields: Fields, message: model_pb2.SearchCatalogRequest) -> Response:
    message.page_size = fields.integer_between("limit", 1, 100) or 20
    message.page_token = fields.text("page_token") or ""
    fields.refuse_unread()
    bridge = web.bridge()
    answer = web.ask_watched(
        bridge.backend.models.SearchCatalog, message, bridge.config.catalog_timeout_seconds
    )
    return web.json_response(native_system.catalog_page(answer))
