"""OpenAI's routes: chat, completions, embeddings, audio."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

from flask import Blueprint, Response, g

from mlxgui.v1 import inference_pb2
from rest_bridge import calls, openai, web
from rest_bridge.errors import ApiError, JsonObject
from rest_bridge.session import StreamRequest

blueprint = Blueprint("openai", __name__)


class _Dialect(NamedTuple):
    """What a route does with its body, its one answer and its stream of events."""

    read: Callable[[JsonObject], tuple[Any, openai.Options]]
    method: str
    """The RPC; the one that streams has the same name and `Stream`."""
    stream_request: type[StreamRequest]
    answer: Callable[[Any, openai.Options, str], JsonObject]
    events: Callable[[Iterable[Any], openai.Options, str], Iterator[bytes]]


_CHAT = _Dialect(
    openai.chat_request,
    "Chat",
    inference_pb2.ChatStreamRequest,
    openai.chat_completion,
    openai.chat_events,
)
_COMPLETION = _Dialect(
    openai.completion_request,
    "Generate",
    inference_pb2.GenerateStreamRequest,
    openai.completion,
    openai.completion_events,
)


@blueprint.post("/v1/chat/completions")
def create_chat_completion() -> Response:
    return _inference(_CHAT)


@blueprint.post("/v1/completions")
def create_completion() -> Response:
    return _inference(_COMPLETION)


@blueprint.post("/v1/embeddings")
def create_embedding() -> Response:
    message, options = openai.embedding_request(web.json_object())
    try:
        answer = _watched(web.bridge().backend.inference.Embed, message)
    except ApiError as error:
        options.rename(error)
        raise
    return _whole(openai.embeddings(answer, options))


@blueprint.post("/v1/audio/transcriptions")
@blueprint.post("/v1/audio/translations")
@blueprint.post("/v1/audio/speech")
def audio() -> NoReturn:
    raise ApiError("NOT_IMPLEMENTED", "Audio is not served by this version yet.")


@blueprint.get("/v1/audio/voices")
def voices() -> NoReturn:
    raise ApiError("NOT_IMPLEMENTED", "Audio is not served by this version yet.")


def _inference(dialect: _Dialect) -> Response:
    message, options = dialect.read(web.json_object())
    stub = web.bridge().backend.inference
    try:
        if options.stream:
            request: Any = dialect.stream_request(request=message)
            return _event_stream(getattr(stub, dialect.method + "Stream"), request, dialect.events, options)
        answer = _watched(getattr(stub, dialect.method), message)
    except ApiError as error:
        options.rename(error)
        raise
    return _whole(dialect.answer(answer, options, web.bridge().fingerprint))


def _whole(body: JsonObject) -> Response:
    response = web.json_response(body, warnings=body.get("warnings", ()))
    web.report_query(response)
    return response


def _watched(method: Any, message: Any) -> Any:
    return web.ask_watched(method, message, web.bridge().config.inference_timeout_seconds)


def _event_stream(method: Any, message: StreamRequest, events: Any, options: openai.Options) -> Response:
    bridge, live = web.bridge(), web.open_call()
    try:
        # The first message is awaited before any header is sent: until then a failure is an honest status.
        seconds = bridge.config.inference_timeout_seconds
        if len(bridge.calls) < bridge.config.session_from_call_count:
            first, rest = calls.stream(method, message, live, seconds, web.metadata())
        else:
            first, rest = calls.session_stream(bridge.backend.session, message, live, seconds, g.request_id)
        chunks = events(itertools.chain((first,), rest), options, bridge.fingerprint)
        response = web.event_stream(chunks, live)
    except BaseException:
        live.close()
        raise
    web.report(response, [*options.warnings, *first.start.warnings])
    web.report_query(response)
    return response
