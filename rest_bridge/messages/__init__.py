"""Anthropic's Messages API as `mlxgui.v1` messages, and back. Pure: no Flask, no I/O."""

from rest_bridge.messages.answers import error_body, message_body, token_count_body
from rest_bridge.messages.requests import message_request, token_count_request
from rest_bridge.messages.streams import error_event, message_stream

__all__ = [
    "error_body",
    "error_event",
    "message_body",
    "message_request",
    "message_stream",
    "token_count_body",
    "token_count_request",
]
