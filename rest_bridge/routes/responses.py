"""OpenAI's Responses API."""

from flask import Blueprint, Response

from mlxgui.v1 import inference_pb2
from rest_bridge import responses
from rest_bridge.routes import dialects

blueprint = Blueprint("responses", __name__)

_RESPONSE = dialects.Dialect(
    responses.response_request,
    "Chat",
    inference_pb2.ChatStreamRequest,
    responses.response_body,
    responses.response_stream,
    answers_from_events=True,
)


@blueprint.post("/v1/responses")
def create_response() -> Response:
    return dialects.run(_RESPONSE)
