"""Whole answers, and what they share with the chunks of a stream."""

from collections.abc import Mapping
from typing import Any

from mlxgui.v1 import common_pb2, inference_pb2
from rest_bridge.errors import JsonObject
from rest_bridge.openai.logprobs import chat_logprobs, text_logprobs
from rest_bridge.openai.messages import ROLE_NAMES
from rest_bridge.openai.options import Options
from rest_bridge.openai.tools import tool_call

FINISH_REASONS: Mapping[int, str | None] = {
    common_pb2.FINISH_REASON_UNSPECIFIED: None,
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}


def chat_completion(response: inference_pb2.ChatResponse, options: Options, fingerprint: str) -> JsonObject:
    """The body of a whole chat answer."""
    body = head("chatcmpl-", response, "chat.completion", options, fingerprint)
    body["choices"] = [
        {
            "index": choice.index,
            "message": assistant_message(choice.message),
            "logprobs": chat_logprobs(choice.logprobs) if options.logprobs else None,
            "finish_reason": FINISH_REASONS.get(choice.finish_reason),
            **stop_reason(choice),
        }
        for choice in response.choices
    ]
    return with_usage(body, response.usage, options.told(response.warnings))


def completion(response: inference_pb2.GenerateResponse, options: Options, fingerprint: str) -> JsonObject:
    """The body of a whole continuation."""
    body = head("cmpl-", response, "text_completion", options, fingerprint)
    body["choices"] = [
        {
            "index": choice.index,
            "text": choice.text,
            "logprobs": text_logprobs([*choice.prompt_logprobs, *choice.logprobs])[0]
            if options.logprobs
            else None,
            "finish_reason": FINISH_REASONS.get(choice.finish_reason),
            **stop_reason(choice),
        }
        for choice in response.choices
    ]
    return with_usage(body, response.usage, options.told(response.warnings))


def usage_json(usage: common_pb2.Usage) -> JsonObject:
    """Token counts as OpenAI writes them."""
    return {
        "prompt_tokens": usage.prompt_token_count,
        "completion_tokens": usage.completion_token_count,
        "total_tokens": usage.total_token_count,
        "prompt_tokens_details": {"cached_tokens": usage.cached_prompt_token_count},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_token_count},
    }


def finish_reason(choice: inference_pb2.Choice) -> str | None:
    """Why a choice ended, in OpenAI's word."""
    return FINISH_REASONS.get(choice.finish_reason)


def head(id_prefix: str, source: Any, kind: str, options: Options, fingerprint: str) -> JsonObject:
    """What an answer and each chunk of a stream begin with."""
    return {
        "id": source.id if source.id.startswith(id_prefix) else id_prefix + source.id,
        "object": kind,
        "created": source.create_time.seconds,
        "model": source.model or options.model,
        "system_fingerprint": fingerprint,
    }


def with_usage(body: JsonObject, usage: common_pb2.Usage, warnings: list[str]) -> JsonObject:
    """The body with its token counts, and with the warnings if there are any."""
    body["usage"] = usage_json(usage)
    if warnings:
        body["warnings"] = warnings
    return body


def assistant_message(message: inference_pb2.ChatMessage) -> JsonObject:
    """A reply as the message of a choice."""
    text = "".join(part.text for part in message.content)
    answer: JsonObject = {
        "role": ROLE_NAMES.get(message.role, "assistant"),
        # As OpenAI: null where the reply only calls tools.
        "content": text if text or not message.tool_calls else None,
        "refusal": None,
    }
    if message.reasoning:
        answer.update(reasoning(message.reasoning))
    if message.tool_calls:
        answer["tool_calls"] = [tool_call(call) for call in message.tool_calls]
    return answer


def reasoning(text: str) -> JsonObject:
    """What the model thought, under both names by which clients look for it."""
    return {"reasoning_content": text, "reasoning": text}


def stop_reason(source: Any) -> JsonObject:
    """The stop sequence that ended a choice, if one did; vLLM's field."""
    return {"stop_reason": source.stop_sequence} if source.HasField("stop_sequence") else {}
