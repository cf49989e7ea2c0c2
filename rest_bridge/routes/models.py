"""Installed models: list, show, install, update, load, unload, delete, pin, health, generate.

A name may be a hub id, with a slash; the last segment of a path is the verb.
"""

from collections.abc import Callable
from typing import Any

from flask import Blueprint, Response, request

from mlxgui.v1 import model_pb2
from rest_bridge import calls, native, native_system, web
from rest_bridge.errors import ApiError, JsonObject, from_operation
from rest_bridge.json_body import Fields
from rest_bridge.keep_alive import read_keep_alive

blueprint = Blueprint("models", __name__)


@blueprint.get("/v1/models")
def list_models() -> Response:
    response = web.json_response(native.model_list(all_models()))
    web.report_query(response)
    return response


@blueprint.get("/v1/models/<path:name>")
def show_model(name: str) -> Response:
    answer = web.ask(web.bridge().backend.models.GetModel, model_pb2.GetModelRequest(name=name))
    response = web.json_response(native.model_json(answer.model))
    web.report_query(response)
    return response


@blueprint.delete("/v1/models/<path:name>")
def delete_model(name: str) -> Response:
    fields = web.parameters()
    message = model_pb2.DeleteModelRequest(
        name=name, remove_files=fields.boolean("remove_files"), force=fields.boolean("force") or False
    )
    fields.refuse_unread()
    answer = web.ask_to_change(web.bridge().backend.models.DeleteModel, message)
    return web.json_response(native.deleted(answer))


@blueprint.post("/v1/models/install")
def install_model() -> Response:
    wait = _wait(web.query())
    message = native.install_request(web.json_object())
    method = web.bridge().backend.models.InstallModel
    return _download(method, message, wait, lambda operation: native.installed(operation, message))


@blueprint.post("/v1/models/<path:name>/update")
def update_model(name: str) -> Response:
    stub = web.bridge().backend.models
    fields = web.parameters()
    message = model_pb2.UpdateModelRequest(name=name, revision=fields.text("revision") or "")
    wait = _wait(fields)
    old = web.ask(stub.GetModel, model_pb2.GetModelRequest(name=name)).model.revision
    return _download(stub.UpdateModel, message, wait, lambda operation: native.updated(operation, old))


@blueprint.post("/v1/models/<path:name>/load")
def load_model(name: str) -> Response:
    fields = web.parameters()
    message = model_pb2.LoadModelRequest(
        name=name, priority=fields.integer_between("priority", -100, 100) or 0
    )
    keep_alive = fields.raw("keep_alive")
    if keep_alive is not None:
        message.keep_alive.CopyFrom(read_keep_alive(keep_alive))
    fields.refuse_unread()
    operation = _finished(web.bridge().backend.models.LoadModel, message)
    return web.json_response(native.loaded(operation), warnings=operation.warnings)


@blueprint.get("/v1/models/<path:name>/estimate")
def estimate_load(name: str) -> Response:
    fields = web.query()
    message = model_pb2.EstimateLoadRequest(
        name=name,
        concurrent_request_count=fields.integer("concurrent_requests"),
        tokens_per_request=fields.integer("tokens_per_request"),
    )
    fields.refuse_unread()
    answer = web.ask(web.bridge().backend.models.EstimateLoad, message)
    return web.json_response(native_system.load_estimate(name, answer))


@blueprint.post("/v1/models/<path:name>/unload")
def unload_model(name: str) -> Response:
    fields = web.parameters()
    message = model_pb2.UnloadModelRequest(name=name, force=fields.boolean("force") or False)
    fields.refuse_unread()
    answer = web.ask_to_change(web.bridge().backend.models.UnloadModel, message)
    return web.json_response(native.unloaded(answer.model))


@blueprint.post("/v1/models/<path:name>/pin")
def pin_model(name: str) -> Response:
    web.parameters().refuse_unread()
    answer = web.ask(web.bridge().backend.models.PinModel, model_pb2.PinModelRequest(name=name))
    return web.json_response(native.pinned(answer.model))


@blueprint.post("/v1/models/<path:name>/unpin")
def unpin_model(name: str) -> Response:
    web.parameters().refuse_unread()
    answer = web.ask(web.bridge().backend.models.UnpinModel, model_pb2.UnpinModelRequest(name=name))
    return web.json_response(native.pinned(answer.model))


@blueprint.get("/v1/models/<path:name>/health")
def model_health(name: str) -> Response:
    web.no_query()
    answer = web.ask(
        web.bridge().backend.models.CheckModelHealth, model_pb2.CheckModelHealthRequest(name=name)
    )
    return web.json_response(native.model_health(answer))


@blueprint.post("/v1/models/<path:name>/generate")
def generate(name: str) -> Response:
    web.no_query()
    message = native.generate_request(name, web.json_object())
    bridge = web.bridge()
    answer = web.ask_watched(
        bridge.backend.inference.Generate, message, bridge.config.inference_timeout_seconds
    )
    return web.json_response(native.generated(answer, message), warnings=answer.warnings)


def all_models(*, include_available: bool = False) -> list[model_pb2.Model]:
    """Every installed model, by name; with `include_available` also those that only lie in the hub's cache."""
    models: list[model_pb2.Model] = []
    message = model_pb2.ListModelsRequest(page_size=1000, include_available=include_available)
    while True:
        page = web.ask(web.bridge().backend.models.ListModels, message)
        models.extend(page.models)
        if not page.next_page_token:
            return models
        message.page_token = page.next_page_token


def _wait(fields: Fields) -> bool:
    """Whether the client wants to wait for the end of what it begins."""
    wait = fields.boolean("wait")
    fields.refuse_unread()
    return "respond-async" not in request.headers.get("Prefer", "").lower() if wait is None else wait


def _download(
    method: Any, message: Any, wait: bool, answer: Callable[[model_pb2.Operation], JsonObject]
) -> Response:
    if wait:
        operation = _finished(method, message)
        return web.json_response(answer(operation), warnings=operation.warnings)
    with web.open_call() as live:
        # The first snapshot says that it has begun; leaving the stream only detaches from it.
        first, _ = calls.stream(method, message, live, None, web.metadata())
    response = web.json_response(native.operation_json(first.operation), 202)
    response.headers["Location"] = f"/v1/operations/{first.operation.id}"
    return response


def _finished(method: Any, message: Any) -> model_pb2.Operation:
    """The last snapshot of a streamed operation that succeeded. Raises ApiError with its error otherwise."""
    with web.open_call() as live:
        first, rest = calls.stream(method, message, live, None, web.metadata())
        operation: model_pb2.Operation = first.operation
        with calls.as_api_error(live):
            for snapshot in rest:
                operation = snapshot.operation
    if operation.WhichOneof("result") == "error":
        raise from_operation(operation.error)
    if not operation.done:
        raise ApiError("INTERNAL", "The model server ended the operation's stream before its end.")
    return operation
