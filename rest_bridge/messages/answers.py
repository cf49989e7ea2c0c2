"""Whole messages, and the blocks that their streams are made of."""

import json
from collections.abc import Iterable

from mlxgui.v1 import common_pb2, inference_pb2
from rest_bridge.blocks import Block, Reply
from rest_bridge.errors import ApiError, JsonObject
from rest_bridge.json_body import parse_object
from rest_bridge.messages.requests import MessageOptions

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

UNREADABLE = "INVALID_JSON"
"""The one key of a tool's input where the model has not written a JSON object: its value is what it wrote."""


def message_body(
    events: Iterable[inference_pb2.ChatStreamResponse], options: MessageOptions, fingerprint: str
) -> JsonObject:
    """The body of a whole message, from the events of its chat."""
    reply = Reply().read_all(events)
    body = message_head(reply, options)
    body["content"] = [content_block(block) for block in reply.blocks]
    body.update(ending(reply, options))
    body["usage"] = usage_json(reply.end.usage)
    warnings = options.told(reply.warnings)
    return {**body, "warnings": warnings} if warnings else body


def token_count_body(response: inference_pb2.CountTokensResponse, options: MessageOptions) -> JsonObject:
    """The body of a count."""
    body: JsonObject = {"input_tokens": response.token_count}
    warnings = options.told(response.warnings)
    return {**body, "warnings": warnings} if warnings else body


def error_body(error: ApiError) -> JsonObject:
    """An error in the shape that Anthropic's clients read."""
    kind = _ERROR_TYPES.get(error.http_status, "api_error" if error.http_status >= 499 else _ERROR_TYPES[400])
    details: JsonObject = {"error_code": error.reason.lower()}
    if error.param is not None:
        details["param"] = error.param
    if error.reason == "THREAD_UNSUPPORTED_REQUEST":
        # Anthropic's clients read it as: send everything again, and from now on always.
        details["unsupported"] = ["thread"]
    return {"type": "error", "error": {"type": kind, "message": error.message, "details": details}}


def message_head(reply: Reply, options: MessageOptions) -> JsonObject:
    """What a message is before it has any content."""
    return {
        "id": f"msg_{reply.start.id.rpartition('-')[2]}",
        "type": "message",
        "role": "assistant",
        "model": reply.start.model or options.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def content_block(block: Block) -> JsonObject:
    """A block as it is now."""
    match block.kind:
        case "reasoning":
            # Nobody is to trust this text for having come from here; a signature would have no reader.
            return {"type": "thinking", "thinking": block.content, "signature": ""}
        case "text":
            return {"type": "text", "text": block.content}
    return {
        "type": "tool_use",
        "id": block.call_id,
        "name": block.name,
        "input": json.loads(input_text(block)),
    }


def input_text(block: Block) -> str:
    """The input of a closed call, as the text of a JSON object, which it need not be as the model wrote it."""
    text = block.content.removeprefix("\ufeff")
    if not text.strip():
        return "{}"
    try:
        value = parse_object(text.encode())
        # Readers differ over a number that becomes infinite, and over half of a surrogate pair.
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ApiError, ValueError):
        return json.dumps({UNREADABLE: block.content})
    return text


def ending(reply: Reply, options: MessageOptions) -> JsonObject:
    """Why a message ended."""
    stop = reply.finish.stop_sequence if reply.finish.HasField("stop_sequence") else None
    match reply.finish.finish_reason:
        case common_pb2.FINISH_REASON_LENGTH:
            is_full = reply.end.usage.completion_token_count < options.max_tokens
            reason = "model_context_window_exceeded" if is_full else "max_tokens"
        case common_pb2.FINISH_REASON_TOOL_CALLS:
            reason = "tool_use"
        case _:
            reason = "end_turn" if stop is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": stop}


def usage_json(usage: common_pb2.Usage) -> JsonObject:
    """Token counts as Anthropic writes them: those from the cache are counted apart."""
    return {
        "input_tokens": usage.prompt_token_count - usage.cached_prompt_token_count,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_prompt_token_count,
        "output_tokens": usage.completion_token_count,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_token_count},
    }


def starting_usage(start: inference_pb2.StreamStart) -> JsonObject:
    """What is known of the counts when a stream begins; the last event has them all."""
    return {
        "input_tokens": start.prompt_token_count,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": 0,
    }
