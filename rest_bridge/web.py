"""What all routes share: the bridge's state, reading a request, and writing an answer."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from flask import Response, current_app, g, request

from rest_bridge import calls, errors, sse
from rest_bridge.backend import Backend
from rest_bridge.calls import LiveCall, LiveCalls, Metadata
from rest_bridge.config import BridgeConfig
from rest_bridge.errors import ApiError, JsonObject
from rest_bridge.json_body import Fields, parse_object
from rest_bridge.metrics import BridgeMetrics
from rest_bridge.query import Query

_log = logging.getLogger("rest_bridge")

_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True)
class Bridge:
    """Everything a route needs."""

    config: BridgeConfig
    backend: Backend
    calls: LiveCalls
    metrics: BridgeMetrics
    fingerprint: str
    """What OpenAI calls the system fingerprint: which program and version answered."""


def bridge() -> Bridge:
    """The bridge that serves this request."""
    found: Bridge = current_app.extensions["bridge"]
    return found


def metadata() -> Metadata:
    """Metadata for the calls of this request: its id, for the server's log, and that it came over REST.

    The server trusts callers on its unix socket with any directory; who reaches REST is not one of them.
    """
    return (("x-request-id", g.request_id), ("x-mlxgui-rest", "1"))


def open_call() -> LiveCall:
    """A place for this request's long call, which is ended when its client goes."""
    return bridge().calls.open(request.environ.get("waitress.client_disconnected", _never))


def ask(method: Callable[..., Any], message: Any, timeout_seconds: float | None = None) -> Any:
    """The answer of a quick call."""
    return calls.unary(method, message, timeout_seconds or bridge().config.status_timeout_seconds, metadata())


def ask_watched(method: Any, message: Any, timeout_seconds: float) -> Any:
    """The answer of a long call, which ends early if the client goes."""
    with open_call() as live:
        return calls.watched(method, message, live, timeout_seconds, metadata())


def ask_to_change(method: Any, message: Any) -> Any:
    """The answer of a removal, which goes on to its end though the client goes."""
    with bridge().calls.open(_never) as live:
        return calls.watched(method, message, live, bridge().config.removal_timeout_seconds, metadata())


def json_object() -> JsonObject:
    """The request's body. Its size has been checked."""
    return parse_object(request.get_data(cache=False))


def query() -> Query:
    """The request's query string."""
    return Query(request.args.items(multi=True))


def no_query() -> None:
    """Refuses every parameter of the query string, for a route that has none."""
    query().refuse_unread()


def parameters() -> Fields:
    """What a request without a documented body was told: in its query string, or as a JSON object."""
    raw = request.get_data(cache=False)
    if not raw.strip():
        return query()
    no_query()
    return Fields(parse_object(raw))


def report_query(response: Response) -> None:
    """Tells of the query's parameters, on a route of OpenAI's, which has none and whose clients may send any."""
    report(response, (f"`{name[:64]}` is unknown and has no effect." for name in request.args))


def json_response(body: JsonObject, status: int = 200, warnings: Iterable[str] = ()) -> Response:
    """A JSON answer; the warnings go into a header too."""
    # A key of the caller's, named in a warning, may hold half of a surrogate pair, which UTF-8 does not have.
    response = Response(_ENCODE(body).encode("utf-8", "replace"), status, mimetype="application/json")
    report(response, warnings)
    return response


def error_response(error: ApiError, body: JsonObject) -> Response:
    """The answer to a request that failed; the body says it in the shape of its route."""
    response = json_response(body, error.http_status)
    response.headers.update(error.headers())
    return response


def report(response: Response, warnings: Iterable[str]) -> None:
    """Puts warnings into the response's header, in the characters that a header may have."""
    told = response.headers.get("X-MLXGUI-Warnings")
    text = " ".join([*([told] if told else []), *warnings])
    if text:
        text = "".join(char if " " <= char <= "~" else "?" for char in text)
        response.headers["X-MLXGUI-Warnings"] = text[:1024]


def event_stream(stream: sse.Stream, live: LiveCall) -> Response:
    """Server-sent events, ended as their dialect ends them, whether or not an error came in between."""
    # direct_passthrough: Werkzeug would wrap every event in two more generators.
    response = Response(_EventBody(stream, live), headers=sse.HEADERS, direct_passthrough=True)
    return response


class _EventBody:
    """The body of an event stream; the server closes it, however the client leaves and even if it never began."""

    def __init__(self, stream: sse.Stream, live: LiveCall) -> None:
        self._stream = stream
        self._live = live

    def __iter__(self) -> Iterator[bytes]:
        failure = self._stream.failure
        try:
            yield from self._stream.events
        except grpc.RpcError as error:
            yield failure(self._live.blame(errors.from_rpc(error)))
        except ApiError as error:
            yield failure(self._live.blame(error))
        except Exception:
            _log.exception("an event stream failed")
            yield failure(ApiError("INTERNAL", "The bridge failed; its log has the details."))
        if self._stream.end:
            yield self._stream.end

    def close(self) -> None:
        self._live.close()


def _never() -> bool:
    return False
