"""OpenAI's routes: chat, completions, embeddings, audio."""

import itertools
from typing import Any, NoReturn

from flask import Blueprint, Response, g

from mlxgui.v1 import inference_pb2
from rest_bridge import calls, openai, web
from rest_bridge.errors import ApiError
from rest_bridge.session import StreamRequest

blueprint = Blueprint("openai", __name__)


@blueprint.post("/v1/chat/completions")
def create_chat_completion() -> Response:
    message, options = openai.chat_request(web.json_object())
    stub = web.bridge().backend.inference
    try:
        if not options.stream:
            answer = _watched(stub.Chat, message)
            body = openai.chat_completion(answer, options, web.bridge().fingerprint)
            return web.json_response(body, warnings=body.get("warnings", ()))
        return _event_stream(
            stub.ChatStream,
            inference_pb2.ChatStreamRequest(request=message),
            openai.chat_events,
            options,
        )
    except ApiError as error:
        options.rename(error)
        raise


@blueprint.post("/v1/completions")
def create_completion() -> Response:
    message, options = openai.completion_request(web.json_object())
    stub = web.bridge().backend.inference
    try:
        if not options.stream:
            answer = _watched(stub.Generate, message)
            body = openai.completion(answer, options, web.bridge().fingerprint)
            return web.json_response(body, warnings=body.get("warnings", ()))
        return _event_stream(
            stub.GenerateStream,
            inference_pb2.GenerateStreamRequest(request=message),
            openai.completion_events,
            options,
        )
    except ApiError as error:
        options.rename(error)
        raise


@blueprint.post("/v1/embeddings")
def create_embedding() -> Response:
    message, options = openai.embedding_request(web.json_object())
    try:
        answer = _watched(web.bridge().backend.inference.Embed, message)
    except ApiError as error:
        options.rename(error)
        raise
    body = openai.embeddings(answer, options)
    return web.json_response(body, warnings=body.get("warnings", ()))


@blueprint.post("/v1/audio/transcriptions")
@blueprint.post("/v1/audio/translations")
@blueprint.post("/v1/audio/speech")
def audio() -> NoReturn:
    raise ApiError("NOT_IMPLEMENTED", "Audio is not served by this version yet.")


@blueprint.get("/v1/audio/voices")
def voices() -> NoReturn:
    raise ApiError("NOT_IMPLEMENTED", "Audio is not served by this version yet.")


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
    return response
