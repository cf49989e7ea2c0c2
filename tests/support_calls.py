"""Requests and replies of the contract in one line each."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from mlxgui.v1 import common_pb2, inference_pb2, model_pb2

END_TOKENS = {0: -100.0, 2: -100.0}
"""As logit_bias: the demo model, and the tiny ones that share its tokenizer, never end by themselves."""

CALL_SECONDS = 120.0


def sampling(**fields: Any) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(**fields)


def message(
    text: str, role: "inference_pb2.Role.ValueType" = inference_pb2.ROLE_USER
) -> inference_pb2.ChatMessage:
    return inference_pb2.ChatMessage(role=role, content=[inference_pb2.ContentPart(text=text)])


def chat(text: str, model: str = "demo", **params: Any) -> inference_pb2.ChatRequest:
    """A chat of one user message; further arguments are sampling parameters."""
    return inference_pb2.ChatRequest(model=model, messages=[message(text)], sampling=sampling(**params))


def chat_stream(text: str, model: str = "demo", **params: Any) -> inference_pb2.ChatStreamRequest:
    return inference_pb2.ChatStreamRequest(request=chat(text, model, **params))


def endless(model: str = "demo", **params: Any) -> inference_pb2.ChatStreamRequest:
    """A stream that decodes until the context is full, or it is cancelled: the model cannot end it."""
    params = {"max_tokens": 16_384, "logit_bias": END_TOKENS, **params}
    return inference_pb2.ChatStreamRequest(
        request=chat("Tell me a story.", model, **params),
        options=inference_pb2.StreamOptions(max_join_tokens=1),
    )


def completion(*prompts: str, model: str = "demo", **params: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        model=model,
        prompts=[inference_pb2.Prompt(text=text) for text in prompts],
        sampling=sampling(**params),
    )


def text_of(reply: inference_pb2.ChatResponse, index: int = 0) -> str:
    return "".join(part.text for part in reply.choices[index].message.content)


def streamed_text(events: Iterable[inference_pb2.ChatStreamResponse], index: int = 0) -> str:
    return "".join(event.delta.text for event in events if event.delta.index == index)


def until_first_delta(
    events: Iterator[inference_pb2.ChatStreamResponse],
) -> inference_pb2.ChatStreamResponse:
    """Read a stream up to its first text: from then on it decodes."""
    return next(event for event in events if event.HasField("delta"))


@dataclass
class Failure:
    """A status with its details."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    domain: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    fields: list[str] = field(default_factory=list)
    retry_after_seconds: float | None = None


def failure_of(error: Any) -> Failure:
    """Take an RpcError apart."""
    failure = Failure(error.code(), error.details() or "")
    for key, value in error.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        status = status_pb2.Status.FromString(value)
        assert (status.code, status.message) == (failure.code.value[0], failure.message)
        for detail in status.details:
            info, bad, retry = (
                error_details_pb2.ErrorInfo(),
                error_details_pb2.BadRequest(),
                error_details_pb2.RetryInfo(),
            )
            if detail.Unpack(info):
                failure.reason, failure.domain, failure.metadata = (
                    info.reason,
                    info.domain,
                    dict(info.metadata),
                )
            elif detail.Unpack(bad):
                failure.fields = [violation.field for violation in bad.field_violations]
            elif detail.Unpack(retry):
                failure.retry_after_seconds = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return failure


def fails(call: Callable[[], Any]) -> Failure:
    """Make a call that must fail; a stream is read to its end."""
    with pytest.raises(grpc.RpcError) as raised:
        result = call()
        if hasattr(result, "__next__"):
            for _ in result:
                pass
    return failure_of(raised.value)


def last_operation(snapshots: Iterator[Any]) -> model_pb2.Operation:
    """Read an operation to its end, whether or not the call repeats its error as a status."""
    operation = model_pb2.Operation()
    try:
        for snapshot in snapshots:
            operation = snapshot.operation
    except grpc.RpcError:
        if not operation.done:
            raise
    assert operation.done
    return operation


def reason_of(operation: model_pb2.Operation) -> str:
    """The reason an operation ended with, without its prefix; empty when it succeeded."""
    if not operation.HasField("error"):
        return ""
    return common_pb2.ErrorReason.Name(operation.error.reason).removeprefix("ERROR_REASON_")
