"""Protobuf to plain nouns and back: pure functions, and the only place that checks the fields of a request."""

from mlxgui_grpc.convert.messages import MAX_MESSAGES, MAX_PARTS
from mlxgui_grpc.convert.replies import (
    chat_event_to_proto,
    chat_reply_to_proto,
    finish_to_proto,
    start_to_proto,
    text_event_to_proto,
    text_reply_to_proto,
    timing_to_proto,
    usage_to_proto,
)
from mlxgui_grpc.convert.requests import (
    MAX_PROMPTS,
    chat_from_proto,
    chat_prompt_from_proto,
    completion_from_proto,
    join_tokens_from_proto,
    prompt_from_proto,
)
from mlxgui_grpc.convert.sampling import MAX_STOP, MAX_TOKENS_LIMIT, sampling_from_proto
from mlxgui_grpc.convert.tools import MAX_TOOLS
from mlxgui_grpc.convert.values import (
    duration,
    error_to_proto,
    keep_alive_seconds,
    model_name,
    priority,
    timestamp,
)

__all__ = [
    "MAX_MESSAGES",
    "MAX_PARTS",
    "MAX_PROMPTS",
    "MAX_STOP",
    "MAX_TOKENS_LIMIT",
    "MAX_TOOLS",
    "chat_event_to_proto",
    "chat_from_proto",
    "chat_prompt_from_proto",
    "chat_reply_to_proto",
    "completion_from_proto",
    "duration",
    "error_to_proto",
    "finish_to_proto",
    "join_tokens_from_proto",
    "keep_alive_seconds",
    "model_name",
    "priority",
    "prompt_from_proto",
    "sampling_from_proto",
    "start_to_proto",
    "text_event_to_proto",
    "text_reply_to_proto",
    "timestamp",
    "timing_to_proto",
    "usage_to_proto",
]
