"""Anthropic's Messages API."""

from flask import Blueprint, Response

from mlxgui.v1 import inference_pb2
from rest_bridge import messages
from rest_bridge.routes import dialects

blueprint = Blueprint("messages", __name__)

_MESSAGE = dialects.Dialect(
    messages.message_request,
    "Chat",
    inference_pb2.ChatStreamRequest,
    messages.message_body,
    messages.message_stream,
    answers_from_events=True,
)


@blueprint.post("/v1/messages")
def create_message() -> Response:
    return dialects.run(_MESSAGE)


@blueprint.post("/v1/messages/count_tokens")
def count_tokens() -> Response:
    return dialects.ask(messages.token_count_request, "CountTokens", messages.token_count_body)
