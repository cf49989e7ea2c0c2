"""OpenAI's routes: chat, completions, embeddings, audio; and the ranking of documents, which its clients know too."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from flask import Blueprint, Response

from mlxgui.v1 import inference_pb2
from rest_bridge import embeddings, openai, rerank, sse
from rest_bridge.errors import ApiError
from rest_bridge.routes import dialects

blueprint = Blueprint("openai", __name__)


def _chunks(
    events: Callable[[Iterable[Any], openai.Options, str], Iterator[bytes]],
) -> Callable[[Iterable[Any], openai.Options, str], sse.Stream]:
    """A stream as OpenAI's older routes end it: an error is one more event, [DONE] the last."""
    return lambda replies, options, fingerprint: sse.Stream(events(replies, options, fingerprint))


_CHAT = dialects.Dialect(
    openai.chat_request,
    "Chat",
    inference_pb2.ChatStreamRequest,
    openai.chat_completion,
    _chunks(openai.chat_events),
)
_COMPLETION = dialects.Dialect(
    openai.completion_request,
    "Generate",
    inference_pb2.GenerateStreamRequest,
    openai.completion,
    _chunks(openai.completion_events),
)


@blueprint.post("/v1/chat/completions")
def create_chat_completion() -> Response:
    return dialects.run(_CHAT)


@blueprint.post("/v1/completions")
def create_completion() -> Response:
    return dialects.run(_COMPLETION)


@blueprint.post("/v1/embeddings")
def create_embedding() -> Response:
    return dialects.ask(embeddings.embedding_request, "Embed", embeddings.embeddings)


@blueprint.post("/v1/rerank")
def create_ranking() -> Response:
    return dialects.ask(rerank.rerank_request, "Rerank", rerank.ranking)


@blueprint.post("/v1/audio/transcriptions")
@blueprint.post("/v1/audio/translations")
@blueprint.post("/v1/audio/speech")
def audio() -> NoReturn:
    raise ApiError("NOT_IMPLEMENTED", "Audio is not served by this version yet.")


@blueprint.get("/v1/audio/voices")
def voices() -> NoReturn:
    raise ApiError("NOT_IMPLEMENTED", "Audio is not served by this version yet.")
