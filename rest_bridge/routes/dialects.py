"""Runs one request of any dialect: a body becomes a call, its answer or its events go out in the dialect's form."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from flask import Response, g

from rest_bridge import calls, sse, web
from rest_bridge.calls import LiveCall
from rest_bridge.errors import ApiError, JsonObject
from rest_bridge.openai import Options
from rest_bridge.session import StreamRequest


class Dialect(NamedTuple):
    """What a route does with its body, its one answer and its stream of events."""

    read: Callable[[JsonObject], tuple[Any, Any]]
    """The request and its options."""
    method: str
    """The RPC; the one that streams has the same name and `Stream`."""
    stream_request: type[StreamRequest]
    answer: Callable[[Any, Any, str], JsonObject]
    stream: Callable[[Iterable[Any], Any, str], sse.Stream]
    answers_from_events: bool = False
    """Whether the whole answer too is made of the events, because it has them in their order."""


def run(dialect: Dialect) -> Response:
    """The answer to the request that is being served."""
    message, options = dialect.read(web.json_object())
    bridge = web.bridge()
    with _renaming(options):
        if options.stream:
            return _event_stream(dialect, message, options)
        if dialect.answers_from_events:
            with web.open_call() as live, calls.as_api_error(live):
                first, rest = _open(dialect, message, live)
                body = dialect.answer(itertools.chain((first,), rest), options, bridge.fingerprint)
        else:
            answer = _watched(getattr(bridge.backend.inference, dialect.method), message)
            body = dialect.answer(answer, options, bridge.fingerprint)
    return _whole(body)


def ask(
    read: Callable[[JsonObject], tuple[Any, Any]], method: str, answer: Callable[[Any, Any], JsonObject]
) -> Response:
    """The answer to the request that is being served, by an RPC that has no stream."""
    message, options = read(web.json_object())
    with _renaming(options):
        reply = _watched(getattr(web.bridge().backend.inference, method), message)
    return _whole(answer(reply, options))


@contextmanager
def _renaming(options: Options) -> Iterator[None]:
    """Errors of the model server speak of the caller's fields."""
    try:
        yield
    except ApiError as error:
        options.rename(error)
        raise


def _whole(body: JsonObject) -> Response:
    """One JSON answer, its warnings in a header too."""
    response = web.json_response(body, warnings=body.get("warnings", ()))
    web.report_query(response)
    return response


def _watched(method: Any, message: Any) -> Any:
    """The answer of a call that may take as long as an inference, and ends when its client goes."""
    return web.ask_watched(method, message, web.bridge().config.inference_timeout_seconds)


def _event_stream(dialect: Dialect, message: Any, options: Options) -> Response:
    live = web.open_call()
    try:
        # The first message is awaited before any header is sent: until then a failure is an honest status.
        first, rest = _open(dialect, message, live)
        stream = dialect.stream(itertools.chain((first,), rest), options, web.bridge().fingerprint)
        response = web.event_stream(stream, live)
    except BaseException:
        live.close()
        raise
    web.report(response, options.told(first.start.warnings))
    web.report_query(response)
    return response


def _open(dialect: Dialect, message: Any, live: LiveCall) -> tuple[Any, Iterator[Any]]:
    """A streamed call that has begun well: its first message, and the rest."""
    bridge = web.bridge()
    request: Any = dialect.stream_request(request=message)
    seconds = bridge.config.inference_timeout_seconds
    if len(bridge.calls) < bridge.config.session_from_call_count:
        method = getattr(bridge.backend.inference, dialect.method + "Stream")
        return calls.stream(method, request, live, seconds, web.metadata())
    return calls.session_stream(bridge.backend.session, request, live, seconds, g.request_id)
