"""The server itself: front page, documentation, health, metrics, status, settings, shutdown."""

from flask import Blueprint, Response, request
from grpc_health.v1 import health_pb2

from mlxgui.v1 import system_pb2
from rest_bridge import native, pages, web

blueprint = Blueprint("system", __name__)

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
}


@blueprint.get("/")
def root() -> Response:
    info = web.ask(web.bridge().backend.system.GetServerInfo, system_pb2.GetServerInfoRequest())
    status = native.message_json(info)["status"] or "running"
    if request.accept_mimetypes.best_match(["application/json", "text/html"]) == "text/html":
        page = pages.front_page(info.version, status, pages.readme())
        response = Response(page, mimetype="text/html", headers=_PAGE_HEADERS)
    else:
        response = web.json_response({"name": "MLX-GUI API", "version": info.version, "status": status})
    response.headers["Vary"] = "Accept"
    return response


@blueprint.get("/docs")
def docs() -> Response:
    return Response(pages.documentation(pages.readme()), mimetype="text/html", headers=_PAGE_HEADERS)


@blueprint.get("/health")
def health() -> Response:
    answer = web.ask(web.bridge().backend.check_health, health_pb2.HealthCheckRequest())
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return web.json_response({"status": "healthy"})
    return web.json_response({"status": "unhealthy", "detail": "The model server is not ready."}, 503)


@blueprint.get("/metrics")
def metrics() -> Response:
    bridge = web.bridge()
    bridge.metrics.live_calls.set(len(bridge.calls))
    answer = web.ask(bridge.backend.system.GetMetrics, system_pb2.GetMetricsRequest())
    return Response(answer.body + bridge.metrics.exposition(), content_type=answer.content_type)


@blueprint.get("/v1/system/status")
def system_status() -> Response:
    answer = web.ask(web.bridge().backend.system.GetSystemStatus, system_pb2.GetSystemStatusRequest())
    return web.json_response(native.system_status(answer))


@blueprint.post("/v1/system/shutdown")
def shutdown() -> Response:
    web.ask(web.bridge().backend.system.Shutdown, system_pb2.ShutdownRequest())
    return web.json_response({"message": "Server shutting down"})


@blueprint.post("/v1/system/restart")
def restart() -> Response:
    web.ask(web.bridge().backend.system.Restart, system_pb2.RestartRequest())
    return web.json_response({"message": "Server restarting with updated settings"})


@blueprint.get("/v1/settings")
def settings() -> Response:
    answer = web.ask(web.bridge().backend.system.GetSettings, system_pb2.GetSettingsRequest())
    return web.json_response(native.settings(answer))


@blueprint.put("/v1/settings/<key>")
def set_setting(key: str) -> Response:
    message = native.setting_request(key, web.json_object())
    answer = web.ask(web.bridge().backend.system.UpdateSettings, message)
    return web.json_response(native.setting_updated(key, answer))
