"""The Flask application: the wall before every route, and one shape for every failure."""

import logging
import re
import uuid

from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound
from werkzeug.routing import RequestRedirect

from rest_bridge import wall, web
from rest_bridge.errors import ApiError, JsonObject, too_large
from rest_bridge.messages import error_body
from rest_bridge.routes import discover, manager, messages, models, openai, operations, responses, system

_log = logging.getLogger("rest_bridge")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)

# Routes that take more than a few fields.
_INFERENCE_BODIES = frozenset(
    {
        "openai.create_chat_completion",
        "openai.create_completion",
        "openai.create_embedding",
        "openai.create_ranking",
        "openai.audio",
        "responses.create_response",
        "messages.create_message",
        "messages.count_tokens",
        "models.generate",
    }
)


def create_app(bridge: web.Bridge) -> Flask:
    """The application of one bridge."""
    app = Flask("rest_bridge", static_folder=None)
    # Model names and hub ids are taken as they come: no redirect to a tidier path.
    app.url_map.merge_slashes = False
    app.url_map.strict_slashes = False
    # OPTIONS is answered by the wall.
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.extensions["bridge"] = bridge
    for routes in (system, models, manager, operations, discover, openai, responses, messages):
        app.register_blueprint(routes.blueprint)
    app.before_request(_admit)
    app.after_request(_finish)
    app.register_error_handler(Exception, _failed)
    return app


def _admit() -> Response | None:
    config = web.bridge().config
    given = request.headers.get("X-Request-Id", "")
    g.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    host = request.environ.get("HTTP_HOST")
    wall.check_host(host, config)
    if request.method == "OPTIONS":
        return _options()
    wall.check_origin(request.method, request.headers.get("Origin"), host or "", config)
    if request.endpoint != "system.health":
        wall.check_key(request.headers.get("Authorization"), request.headers.get("X-Api-Key"), config)
    _check_body()
    return None


def _options() -> Response:
    response = Response(status=204)
    del response.headers["Content-Type"]
    methods = request.url_rule.methods if request.url_rule is not None else None
    exception = request.routing_exception
    if isinstance(exception, MethodNotAllowed):
        methods = set(exception.valid_methods or ())
    if methods is None:
        raise _no_route()
    response.headers["Allow"] = ", ".join(sorted({*methods, "OPTIONS"}))
    response.headers.update(
        wall.preflight_headers(
            request.headers.get("Origin"),
            request.headers.get("Access-Control-Request-Headers"),
            web.bridge().config,
        )
    )
    return response


def _check_body() -> None:
    # Waitress has taken the body in already, to a file if it is large, and counted it if it was chunked; what is
    # spared here is the memory.
    config = web.bridge().config
    size_bytes = request.content_length or 0
    if request.endpoint in _INFERENCE_BODIES:
        limit_bytes = config.inference_body_limit_bytes
    else:
        limit_bytes = config.body_limit_bytes
    if size_bytes > limit_bytes:
        raise too_large(f"The body has {size_bytes} bytes; this route takes at most {limit_bytes}.")
    encoding = request.headers.get("Content-Encoding", "identity")
    if size_bytes and encoding.lower() != "identity":
        raise ApiError(
            "UNSUPPORTED_MEDIA_TYPE",
            f"Content-Encoding '{encoding[:32]}' is not supported; send the body as it is.",
        )


def _finish(response: Response) -> Response:
    response.headers["X-Request-Id"] = g.request_id
    if request.blueprint == "messages":
        response.headers["Request-Id"] = g.request_id
    if request.method != "OPTIONS":
        for name, value in wall.cors_headers(request.headers.get("Origin"), web.bridge().config).items():
            if name == "Vary":
                response.headers.add(name, value)
            else:
                response.headers[name] = value
    route = request.url_rule.rule if request.url_rule is not None else "other"
    web.bridge().metrics.count(request.method, route, response.status_code)
    return response


def _failed(error: Exception) -> Response:
    match error:
        case ApiError():
            known = error
        case RequestRedirect() | NotFound():
            known = _no_route()
        case MethodNotAllowed():
            allowed = ", ".join(sorted(set(error.valid_methods or ())))
            known = ApiError(
                "METHOD_NOT_ALLOWED",
                f"{request.method} is not possible here; possible are {allowed}.",
                extra_headers={"Allow": allowed},
            )
        case HTTPException(code=code) if code is not None and code < 500:
            known = ApiError("INVALID_PARAMETER", error.description or "The request cannot be read.")
        case _:
            # A path may hold line ends, and is as long as its sender likes.
            _log.error("request %s: %s %r", g.request_id, request.method, request.path[:200], exc_info=error)
            known = ApiError(
                "INTERNAL", f"The bridge failed; its log has the details of request {g.request_id}."
            )
    return web.error_response(known, _error_body(known))


def _error_body(error: ApiError) -> JsonObject:
    """The error in the shape of its route; in OpenAI's where no route of ours was reached."""
    blueprint = request.blueprint
    if blueprint == "messages":
        return {**error_body(error), "request_id": g.request_id}
    if blueprint in (None, "openai", "responses") or error.reason == "UNAUTHENTICATED":
        return error.openai_body()
    return error.native_body()


def _no_route() -> ApiError:
    return ApiError(
        "ROUTE_NOT_FOUND",
        f"There is no route {request.method} {request.path[:200]}; GET / links what there is.",
    )
