"""Installed models: list, show, load, unload, delete, health, generate; and the manager's view of them.

A name may be a hub id, with a slash; the last segment of a path is the verb.
"""

from typing import Any

from flask import Blueprint, Response, request

from mlxgui.v1 import model_pb2
from rest_bridge import calls, native, web
from rest_bridge.errors import ApiError, from_operation, invalid
from rest_bridge.json_body import Fields
from rest_bridge.keep_alive import read_keep_alive

blueprint = Blueprint("models", __name__)


@blueprint.get("/v1/models")
def list_models() -> Response:
    return web.json_response(native.model_list(_all_models()))


@blueprint.get("/v1/manager/models")
def manager_models() -> Response:
    return web.json_response(native.manager_models(_all_models()))


@blueprint.get("/v1/models/<path:name>")
def show_model(name: str) -> Response:
    answer = web.ask(web.bridge().backend.models.GetModel, model_pb2.GetModelRequest(name=name))
    return web.json_response(native.model_json(answer.model))


@blueprint.delete("/v1/models/<path:name>")
def delete_model(name: str) -> Response:
    message = model_pb2.DeleteModelRequest(
        name=name,
        remove_files=web.query_boolean("remove_files", True),
        force=web.query_boolean("force", False),
    )
    answer = web.ask_to_change(web.bridge().backend.models.DeleteModel, message)
    return web.json_response(native.deleted(answer))


@blueprint.post("/v1/models/<path:name>/load")
def load_model(name: str) -> Response:
    message = model_pb2.LoadModelRequest(name=name, priority=web.query_integer("priority", 0, -100, 100))
    keep_alive = request.args.get("keep_alive")
    if keep_alive is not None:
        message.keep_alive.CopyFrom(read_keep_alive(keep_alive))
    operation = _finished(web.bridge().backend.models.LoadModel, message)
    return web.json_response(native.loaded(operation), warnings=operation.warnings)


@blueprint.post("/v1/models/<path:name>/unload")
def unload_model(name: str) -> Response:
    message = model_pb2.UnloadModelRequest(name=name, force=web.query_boolean("force", False))
    answer = web.ask_to_change(web.bridge().backend.models.UnloadModel, message)
    return web.json_response(native.unloaded(answer.model))


@blueprint.get("/v1/models/<path:name>/health")
def model_health(name: str) -> Response:
    answer = web.ask(
        web.bridge().backend.models.CheckModelHealth, model_pb2.CheckModelHealthRequest(name=name)
    )
    return web.json_response(native.model_health(answer))


@blueprint.post("/v1/models/<path:name>/generate")
def generate(name: str) -> Response:
    message = native.generate_request(name, web.json_object())
    bridge = web.bridge()
    answer = web.ask_watched(
        bridge.backend.inference.Generate, message, bridge.config.inference_timeout_seconds
    )
    return web.json_response(native.generated(answer, message), warnings=answer.warnings)


@blueprint.post("/v1/models/install")
def install_model() -> Response:
    message = native.install_request(web.json_object())
    stub = web.bridge().backend.models
    if web.query_boolean("wait", "respond-async" not in request.headers.get("Prefer", "").lower()):
        operation = _finished(stub.InstallModel, message)
        return web.json_response(native.installed(operation, message), warnings=operation.warnings)
    with web.open_call() as live:
        # The first snapshot says that it has begun; leaving the stream only detaches from it.
        first, _ = calls.stream(stub.InstallModel, message, live, None, web.metadata())
    response = web.json_response(native.operation_json(first.operation), 202)
    response.headers["Location"] = f"/v1/operations/{first.operation.id}"
    return response


@blueprint.get("/v1/manager/status")
def manager_status() -> Response:
    answer = web.ask(web.bridge().backend.models.GetManagerStatus, model_pb2.GetManagerStatusRequest())
    return web.json_response(native.manager_status(answer))


@blueprint.get("/v1/manager/models/<path:name>/status")
def model_status(name: str) -> Response:
    answer = web.ask(web.bridge().backend.models.GetModelStatus, model_pb2.GetModelStatusRequest(name=name))
    return web.json_response(native.model_status(answer))


@blueprint.post("/v1/manager/models/<path:name>/priority")
def set_priority(name: str) -> Response:
    fields = Fields(web.json_object())
    priority = fields.integer("priority")
    fields.refuse_unread()
    if priority is None:
        raise invalid("`priority` is missing.", "priority")
    message = model_pb2.SetModelPriorityRequest(name=name, priority=priority)
    return web.json_response(
        native.model_priority(web.ask(web.bridge().backend.models.SetModelPriority, message))
    )


def _all_models() -> list[model_pb2.Model]:
    models: list[model_pb2.Model] = []
    message = model_pb2.ListModelsRequest(page_size=1000)
    while True:
        page = web.ask(web.bridge().backend.models.ListModels, message)
        models.extend(page.models)
        if not page.next_page_token:
            return models
        message.page_token = page.next_page_token


def _finished(method: Any, message: Any) -> model_pb2.Operation:
    """The last snapshot of a streamed operation that succeeded. Raises ApiError with its error otherwise."""
    with web.open_call() as live:
        first, rest = calls.stream(method, message, live, None, web.metadata())
        operation: model_pb2.Operation = first.operation
        with calls.as_api_error():
            for snapshot in rest:
                operation = snapshot.operation
    if operation.WhichOneof("result") == "error":
        raise from_operation(operation.error)
    if not operation.done:
        raise ApiError("INTERNAL", "The model server ended the operation's stream before its end.")
    return operation
