"""The manager's view: what is in memory, what waits to be loaded, and in which order."""

from collections.abc import Iterator
from typing import Any

from flask import Blueprint, Response

from mlxgui.v1 import model_pb2
from rest_bridge import calls, native_system, sse, web
from rest_bridge.json_body import Fields
from rest_bridge.routes.models import all_models

blueprint = Blueprint("manager", __name__)


@blueprint.get("/v1/manager/models")
def manager_models() -> Response:
    fields = web.query()
    include_available = fields.boolean("include_available") or False
    fields.refuse_unread()
    return web.json_response(native_system.manager_models(all_models(include_available=include_available)))


@blueprint.get("/v1/manager/status")
def manager_status() -> Response:
    web.no_query()
    answer = web.ask(web.bridge().backend.models.GetManagerStatus, model_pb2.GetManagerStatusRequest())
    return web.json_response(native_system.manager_status(answer.snapshot))


@blueprint.get("/v1/manager/watch")
def watch_manager() -> Response:
    web.no_query()
    live = web.open_call()
    try:
        # No deadline: it lasts until the client goes.
        first, rest = calls.stream(
            web.bridge().backend.models.WatchManager,
            model_pb2.WatchManagerRequest(),
            live,
            None,
            web.metadata(),
        )
        return web.event_stream(sse.Stream(_snapshots(first, rest)), live)
    except BaseException:
        live.close()
        raise


@blueprint.get("/v1/manager/models/<path:name>/status")
def model_status(name: str) -> Response:
    web.no_query()
    answer = web.ask(web.bridge().backend.models.GetModelStatus, model_pb2.GetModelStatusRequest(name=name))
    return web.json_response(native_system.model_status(answer.status))


@blueprint.post("/v1/manager/models/<path:name>/priority")
def set_priority(name: str) -> Response:
    web.no_query()
    fields = Fields(web.json_object())
    priority = fields.integer_between("priority", -100, 100)
    fields.refuse_unread()
    if priority is None:
        fields.missing("priority")
    message = model_pb2.SetModelPriorityRequest(name=name, priority=priority)
    answer = web.ask(web.bridge().backend.models.SetModelPriority, message)
    return web.json_response(native_system.model_priority(answer))


def _snapshots(first: Any, rest: Iterator[Any]) -> Iterator[bytes]:
    yield sse.event(native_system.manager_status(first.snapshot))
    for message in rest:
        yield sse.event(native_system.manager_status(message.snapshot))
