"""OpenAI's requests and answers as `mlxgui.v1` messages, and back. Pure: no Flask, no I/O."""

from rest_bridge.openai.answers import chat_completion, completion, finish_reason, usage_json
from rest_bridge.openai.logprobs import chat_logprobs, text_logprobs
from rest_bridge.openai.options import Options
from rest_bridge.openai.prompts import read_prompts
from rest_bridge.openai.requests import (
    chat_request,
    completion_request,
    read_common,
    read_user,
    report_unread,
)
from rest_bridge.openai.sampling import read_sampling, read_scheduling
from rest_bridge.openai.streams import chat_events, completion_events

__all__ = [
    "Options",
    "chat_completion",
    "chat_events",
    "chat_logprobs",
    "chat_request",
    "completion",
    "completion_events",
    "completion_request",
    "finish_reason",
    "read_common",
    "read_prompts",
    "read_sampling",
    "read_scheduling",
    "read_user",
    "report_unread",
    "text_logprobs",
    "usage_json",
]
