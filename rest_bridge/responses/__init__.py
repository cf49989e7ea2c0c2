"""OpenAI's Responses API as `mlxgui.v1` messages, and back. Stateless. Pure: no Flask, no I/O."""

from rest_bridge.responses.answers import response_body
from rest_bridge.responses.requests import ResponseOptions, response_request
from rest_bridge.responses.streams import response_stream

__all__ = ["ResponseOptions", "response_body", "response_request", "response_stream"]
