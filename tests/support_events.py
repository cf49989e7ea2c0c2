"""A chat's events as the bridge gets them, for tests of what it makes of them."""

from typing import Any

from mlxgui.v1 import common_pb2, inference_pb2

Event = inference_pb2.ChatStreamResponse
FINISH = {
    "stop": common_pb2.FINISH_REASON_STOP,
    "length": common_pb2.FINISH_REASON_LENGTH,
    "tool_calls": common_pb2.FINISH_REASON_TOOL_CALLS,
}
USAGE = common_pb2.Usage(
    prompt_token_count=12,
    completion_token_count=7,
    total_token_count=19,
    cached_prompt_token_count=4,
    reasoning_token_count=2,
)


def start(*warnings: str) -> Event:
    begun = inference_pb2.StreamStart(
        id="chatcmpl-abc", model="demo", prompt_token_count=12, warnings=warnings
    )
    begun.create_time.seconds = 1_700_000_000
    return Event(start=begun)


def delta(**fields: Any) -> Event:
    return Event(delta=inference_pb2.ChatDelta(**fields))


def call(index: int, arguments: str = "", name: str = "") -> Event:
    """A part of a call; with a name it is the first one."""
    call_id = f"call_{index}" if name else ""
    part = inference_pb2.ToolCallDelta(index=index, id=call_id, name=name, arguments=arguments)
    return delta(tool_calls=[part])


def ending(reason: str = "stop", stop: str | None = None, *warnings: str) -> list[Event]:
    """How the stream of a choice ends."""
    finish = inference_pb2.StreamFinish(finish_reason=FINISH[reason], stop_sequence=stop)
    end = inference_pb2.StreamEnd(usage=USAGE, warnings=warnings)
    end.timing.total.seconds = 3
    return [Event(finish=finish), Event(end=end)]


def logprob(text: str) -> common_pb2.TokenLogprob:
    rival = common_pb2.TokenLogprob(text="x", bytes=b"x", logprob=-2.0)
    return common_pb2.TokenLogprob(text=text, bytes=text.encode(), logprob=-0.5, top=[rival])
