"""The server itself: front page, documentation, health, metrics, status, settings, shutdown."""

import json
from typing import NamedTuple

from flask import Blueprint, Response, current_app, request
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2

from mlxgui.v1 import system_pb2
from rest_bridge import native_system, pages, web
from rest_bridge.errors import invalid
from rest_bridge.message_json import message_json

blueprint = Blueprint("system", __name__)

_MAX_GRACE_SECONDS = 3600

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
}


@blueprint.get("/")
def root() -> Response:
    info = web.ask(web.bridge().backend.system.GetServerInfo, system_pb2.GetServerInfoRequest())
    status = message_json(info)["status"] or "running"
    if request.accept_mimetypes.best_match(["application/json", "text/html"]) == "text/html":
        page = pages.front_page(info.version, status, pages.readme())
        response = Response(page, mimetype="text/html", headers=_PAGE_HEADERS)
    else:
        response = web.json_response({"name": "MLX-GUI API", "version": info.version, "status": status})
    response.headers["Vary"] = "Accept"
    return response


@blueprint.get("/docs")
def docs() -> Response:
    page = pages.documentation(pages.readme(), _described().reference)
    return Response(page, mimetype="text/html", headers=_PAGE_HEADERS)


@blueprint.get("/openapi.json")
def openapi() -> Response:
    return Response(_described().document, mimetype="application/json")


@blueprint.get("/health")
def health() -> Response:
    answer = web.ask(web.bridge().backend.check_health, health_pb2.HealthCheckRequest())
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return web.json_response({"status": "healthy"})
    response = web.json_response({"status": "unhealthy", "detail": "The model server is not ready."}, 503)
    response.headers["Retry-After"] = "1"
    return response


@blueprint.get("/metrics")
def metrics() -> Response:
    bridge = web.bridge()
    bridge.metrics.live_calls.set(len(bridge.calls))
    answer = web.ask(bridge.backend.system.GetMetrics, system_pb2.GetMetricsRequest())
    return Response(answer.body + bridge.metrics.exposition(), content_type=answer.content_type)


@blueprint.get("/v1/system/status")
def system_status() -> Response:
    web.no_query()
    answer = web.ask(web.bridge().backend.system.GetSystemStatus, system_pb2.GetSystemStatusRequest())
    return web.json_response(native_system.system_status(answer))


@blueprint.post("/v1/system/shutdown")
def shutdown() -> Response:
    message = system_pb2.ShutdownRequest(grace=_grace())
    web.ask(web.bridge().backend.system.Shutdown, message)
    return web.json_response({"message": "Server shutting down"})


@blueprint.post("/v1/system/restart")
def restart() -> Response:
    message = system_pb2.RestartRequest(grace=_grace())
    web.ask(web.bridge().backend.system.Restart, message)
    return web.json_response({"message": "Server restarting with updated settings"})


@blueprint.get("/v1/settings")
def settings() -> Response:
    fields = web.query()
    details = fields.boolean("details")
    fields.refuse_unread()
    answer = web.ask(web.bridge().backend.system.GetSettings, system_pb2.GetSettingsRequest())
    body = native_system.settings_in_detail(answer) if details else native_system.settings(answer)
    return web.json_response(body)


@blueprint.put("/v1/settings/<key>")
def set_setting(key: str) -> Response:
    web.no_query()
    return _change(key, native_system.setting_request(key, web.json_object()))


@blueprint.delete("/v1/settings/<key>")
def reset_setting(key: str) -> Response:
    web.parameters().refuse_unread()
    return _change(key, native_system.reset_request(key))


class _Description(NamedTuple):
    """The API's description, as JSON and as a part of a page."""

    document: bytes
    reference: str


def _described() -> _Description:
    """Made for the first who asks: it takes half a second, and pydantic, which nothing else here needs."""
    made: _Description | None = current_app.extensions.get("description")
    if made is None:
        from rest_bridge.schema.document import document
        from rest_bridge.schema.page import reference

        described = document(current_app.url_map, web.bridge().fingerprint)
        made = _Description(json.dumps(described).encode(), reference(described))
        current_app.extensions["description"] = made
    return made


def _change(key: str, message: system_pb2.UpdateSettingsRequest) -> Response:
    answer = web.ask(web.bridge().backend.system.UpdateSettings, message)
    return web.json_response(native_system.setting_updated(key, message, answer))


def _grace() -> duration_pb2.Duration | None:
    """How long running requests may go on. None: the server's own time."""
    fields = web.parameters()
    seconds = fields.number("grace_seconds")
    fields.refuse_unread()
    if seconds is None:
        return None
    if not 0 <= seconds <= _MAX_GRACE_SECONDS:
        raise invalid(f"`grace_seconds` must be between 0 and {_MAX_GRACE_SECONDS}.", "grace_seconds")
    grace = duration_pb2.Duration()
    grace.FromMilliseconds(round(seconds * 1000))
    return grace
