"""Whole responses, and the items that their streams are made of."""

from collections.abc import Iterable

from mlxgui.v1 import common_pb2, inference_pb2
from rest_bridge.blocks import Block, Reply
from rest_bridge.errors import ApiError, JsonObject
from rest_bridge.openai import chat_logprobs
from rest_bridge.responses.requests import ResponseOptions


def response_body(
    events: Iterable[inference_pb2.ChatStreamResponse], options: ResponseOptions, fingerprint: str
) -> JsonObject:
    """The body of a whole response, from the events of its chat."""
    return final_body(Reply().read_all(events), options)


def final_body(reply: Reply, options: ResponseOptions) -> JsonObject:
    """What a response is once its chat has ended."""
    body = running_body(reply, options)
    total = reply.end.timing.total
    body["completed_at"] = None if reply.was_cut else body["created_at"] + total.seconds
    body["status"] = "incomplete" if reply.was_cut else "completed"
    if reply.was_cut:
        body["incomplete_details"] = {"reason": "max_output_tokens"}
    body["output"] = [output_item(block, reply) for block in reply.blocks]
    body["usage"] = _usage(reply.end.usage)
    if reply.finish.HasField("stop_sequence"):
        body["stop_reason"] = reply.finish.stop_sequence
    warnings = options.told(reply.warnings)
    return {**body, "warnings": warnings} if warnings else body


def failed_body(reply: Reply, options: ResponseOptions, error: ApiError) -> JsonObject:
    """What a response is once its chat has failed; it has what came before."""
    body = running_body(reply, options)
    body["status"] = "failed"
    body["error"] = {
        "code": "rate_limit_exceeded" if error.http_status == 429 else "server_error",
        "message": error.message,
    }
    body["output"] = [output_item(block, reply) for block in reply.blocks]
    return body


def running_body(reply: Reply, options: ResponseOptions) -> JsonObject:
    """What a response is before it has any output."""
    return {
        "id": f"resp_{_suffix(reply)}",
        "object": "response",
        "created_at": reply.start.create_time.seconds,
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": reply.start.model or options.model,
        "output": [],
        "usage": None,
        **options.echo,
    }


def output_item(block: Block, reply: Reply) -> JsonObject:
    """A block as it is now."""
    status = "completed" if block.is_whole else "incomplete"
    match block.kind:
        case "reasoning":
            content = [{"type": "reasoning_text", "text": block.content}]
            head: JsonObject = {"type": "reasoning", "summary": [], "content": content}
        case "text":
            head = {"type": "message", "role": "assistant", "content": [text_part(block)]}
        case "call":
            head = {
                "type": "function_call",
                "call_id": block.call_id,
                "name": block.name,
                "arguments": block.content,
            }
    return {"id": item_id(block, reply), **head, "status": status}


def text_part(block: Block) -> JsonObject:
    """The one part of a message."""
    return {
        "type": "output_text",
        "annotations": [],
        "logprobs": logprob_entries(block.logprobs),
        "text": block.content,
    }


def logprob_entries(logprobs: Iterable[common_pb2.TokenLogprob]) -> list[JsonObject]:
    entries: list[JsonObject] = chat_logprobs(logprobs)["content"]
    return entries


def item_id(block: Block, reply: Reply) -> str:
    prefix = {"reasoning": "rs", "text": "msg", "call": "fc"}[block.kind]
    return f"{prefix}_{_suffix(reply)}_{block.index}"


def _suffix(reply: Reply) -> str:
    """What makes the generation's id one of its kind."""
    return reply.start.id.rpartition("-")[2]


def _usage(usage: common_pb2.Usage) -> JsonObject:
    return {
        "input_tokens": usage.prompt_token_count,
        "input_tokens_details": {"cached_tokens": usage.cached_prompt_token_count, "cache_write_tokens": 0},
        "output_tokens": usage.completion_token_count,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_token_count},
        "total_tokens": usage.total_token_count,
    }
