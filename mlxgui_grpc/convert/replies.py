"""The events of a generation to messages of the contract: streamed, and joined to one reply."""

from collections.abc import Iterable
from typing import Any

from mlxgui.v1 import common_pb2, inference_pb2
from mlxgui_grpc.convert.values import duration, timestamp
from mlxgui_grpc.deltas import Delta
from mlxgui_grpc.engine import frames
from mlxgui_grpc.generation import Ended, Event, Finished, Prefilling, Started

_FINISH_REASONS = {
    "stop": common_pb2.FINISH_REASON_STOP,
    "length": common_pb2.FINISH_REASON_LENGTH,
    "tool_calls": common_pb2.FINISH_REASON_TOOL_CALLS,
}


def usage_to_proto(ended: Ended) -> common_pb2.Usage:
    """Token counts."""
    return common_pb2.Usage(
        prompt_token_count=ended.prompt_token_count,
        completion_token_count=ended.completion_token_count,
        total_token_count=ended.prompt_token_count + ended.completion_token_count,
        reasoning_token_count=ended.reasoning_token_count,
    )


def timing_to_proto(ended: Ended) -> common_pb2.Timing:
    """Where the time went."""
    return common_pb2.Timing(
        queue=duration(ended.queue_seconds),
        load=duration(ended.load_seconds) if ended.load_seconds else None,
        prefill=duration(ended.prefill_seconds),
        first_token=duration(ended.first_token_seconds),
        decode=duration(ended.decode_seconds),
        total=duration(ended.total_seconds),
        tokens_per_second=ended.tokens_per_second,
    )


def start_to_proto(event: Started) -> inference_pb2.StreamStart:
    """The first event of a stream."""
    return inference_pb2.StreamStart(
        id=event.id,
        model=event.model,
        create_time=timestamp(event.create_time),
        prompt_token_count=event.prompt_token_count,
        warnings=event.warnings,
    )


def finish_to_proto(event: Finished) -> inference_pb2.StreamFinish:
    """The end of one choice."""
    return inference_pb2.StreamFinish(
        index=event.index,
        finish_reason=_FINISH_REASONS[event.reason],
        stop_sequence=event.stop_match or None,
    )


def chat_event_to_proto(event: Event) -> inference_pb2.ChatStreamResponse:
    """One event of a chat stream."""
    if type(event) is Delta:
        call = event.tool_call
        return inference_pb2.ChatStreamResponse(
            delta=inference_pb2.ChatDelta(
                index=event.index,
                text=event.text,
                reasoning=event.reasoning,
                tool_calls=[_call_part_to_proto(call)] if call is not None else None,
                token_count=event.token_count,
                logprobs=_logprobs_to_proto(event.logprobs),
            )
        )
    return inference_pb2.ChatStreamResponse(**_other_event(event))


def text_event_to_proto(event: Event) -> inference_pb2.GenerateStreamResponse:
    """One event of a completion stream."""
    if type(event) is Delta:
        return inference_pb2.GenerateStreamResponse(
            delta=inference_pb2.TextDelta(
                index=event.index,
                text=event.text,
                token_count=event.token_count,
                logprobs=_logprobs_to_proto(event.logprobs),
                prompt_logprobs=_logprobs_to_proto(event.prompt_logprobs),
            )
        )
    return inference_pb2.GenerateStreamResponse(**_other_event(event))


def _call_part_to_proto(part: frames.ToolCallPart) -> inference_pb2.ToolCallDelta:
    return inference_pb2.ToolCallDelta(index=part.index, id=part.id, name=part.name, arguments=part.arguments)


def _logprobs_to_proto(logprobs: Iterable[frames.Logprob]) -> list[common_pb2.TokenLogprob]:
    return [
        common_pb2.TokenLogprob(
            token_id=each.token,
            text=each.text,
            bytes=each.bytes,
            logprob=each.logprob,
            top=_logprobs_to_proto(each.top),
        )
        for each in logprobs
    ]


def _other_event(event: Event) -> dict[str, Any]:
    if isinstance(event, Started):
        return {"start": start_to_proto(event)}
    if isinstance(event, Finished):
        return {"finish": finish_to_proto(event)}
    if isinstance(event, Prefilling):
        progress = inference_pb2.PrefillProgress(
            prompt_index=event.prompt_index,
            processed_token_count=event.done_token_count,
            total_token_count=event.total_token_count,
        )
        return {"prefill": progress}
    assert isinstance(event, Ended)
    end = inference_pb2.StreamEnd(
        usage=usage_to_proto(event), timing=timing_to_proto(event), warnings=event.warnings
    )
    return {"end": end}


def chat_reply_to_proto(events: list[Event], choices: int) -> inference_pb2.ChatResponse:
    """A whole stream as one reply."""
    reply = inference_pb2.ChatResponse()
    for index in range(choices):
        deltas, finished = _choice(events, index)
        text = "".join(delta.text for delta in deltas)
        calls = _joined_calls(deltas)
        reply.choices.add(
            index=index,
            message=inference_pb2.ChatMessage(
                role=inference_pb2.ROLE_ASSISTANT,
                content=[inference_pb2.ContentPart(text=text)] if text or not calls else None,
                tool_calls=calls,
                reasoning="".join(delta.reasoning for delta in deltas),
            ),
            finish_reason=_FINISH_REASONS[finished.reason],
            stop_sequence=finished.stop_match or None,
            logprobs=[each for delta in deltas for each in _logprobs_to_proto(delta.logprobs)],
        )
    _fill_reply(reply, events)
    return reply


def text_reply_to_proto(events: list[Event], choices: int) -> inference_pb2.GenerateResponse:
    """A whole stream as one reply."""
    reply = inference_pb2.GenerateResponse()
    for index in range(choices):
        deltas, finished = _choice(events, index)
        reply.choices.add(
            index=index,
            text="".join(delta.text for delta in deltas),
            finish_reason=_FINISH_REASONS[finished.reason],
            stop_sequence=finished.stop_match or None,
            logprobs=[each for delta in deltas for each in _logprobs_to_proto(delta.logprobs)],
            prompt_logprobs=[each for delta in deltas for each in _logprobs_to_proto(delta.prompt_logprobs)],
        )
    _fill_reply(reply, events)
    return reply


def _choice(events: list[Event], index: int) -> tuple[list[Delta], Finished]:
    deltas = [event for event in events if isinstance(event, Delta) and event.index == index]
    finished = next(event for event in events if isinstance(event, Finished) and event.index == index)
    return deltas, finished


def _joined_calls(deltas: list[Delta]) -> list[inference_pb2.ToolCall]:
    calls: list[inference_pb2.ToolCall] = []
    arguments: list[list[str]] = []
    for delta in deltas:
        if (part := delta.tool_call) is None:
            continue
        if part.index == len(calls):
            calls.append(inference_pb2.ToolCall(id=part.id, name=part.name))
            arguments.append([])
        arguments[part.index].append(part.arguments)
    for call, parts in zip(calls, arguments, strict=True):
        call.arguments = "".join(parts)
    return calls


def _fill_reply(
    reply: inference_pb2.ChatResponse | inference_pb2.GenerateResponse, events: list[Event]
) -> None:
    started = next(event for event in events if isinstance(event, Started))
    ended = events[-1]
    assert isinstance(ended, Ended)
    reply.id, reply.model = started.id, started.model
    reply.create_time.CopyFrom(timestamp(started.create_time))
    reply.usage.CopyFrom(usage_to_proto(ended))
    reply.timing.CopyFrom(timing_to_proto(ended))
    reply.warnings.extend([*started.warnings, *ended.warnings])
