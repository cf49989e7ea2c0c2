"""What callers say and get: plain Python on one side, the messages of the contract on the other."""

import functools
import json
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypedDict, TypeVar, cast

from google.protobuf.duration_pb2 import Duration

from mlxgui.v1 import common_pb2, inference_pb2, model_pb2
from mlxgui_grpc.errors import InvalidRequestError

MAX_DURATION_SECONDS = 315_576_000_000
"""Ten thousand years: the contract's form of a span has no more."""

P = ParamSpec("P")
T = TypeVar("T")

FinishReason = Literal["stop", "length", "tool_calls", "unspecified"]

Message = str | Mapping[str, str] | inference_pb2.ChatMessage
"""A user's words; or `{"role": ..., "content": ...}`; or the contract's message, for images and tools."""

ChatEvent = (
    inference_pb2.StreamStart
    | inference_pb2.PrefillProgress
    | inference_pb2.ChatDelta
    | inference_pb2.StreamFinish
    | inference_pb2.StreamEnd
)
GenerateEvent = (
    inference_pb2.StreamStart
    | inference_pb2.PrefillProgress
    | inference_pb2.TextDelta
    | inference_pb2.StreamFinish
    | inference_pb2.StreamEnd
)


class Sampling(TypedDict, total=False):
    """The fields of `SamplingParams`, whose comments in the contract give ranges and defaults."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    repetition_context_size: int
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: str | Sequence[str]
    logit_bias: Mapping[int, float]
    n: int
    top_logprobs: int
    max_thinking_tokens: int
    adapter: str
    draft_model: str
    prompt_lookup_tokens: int
    json_object: bool
    json_schema: str
    regex: str
    grammar: str


@dataclass(frozen=True, slots=True)
class ChatReply:
    """A whole reply: the fields of its first choice, and all of them in `choices`."""

    id: str
    model: str
    text: str
    reasoning: str
    tool_calls: tuple[inference_pb2.ToolCall, ...]
    finish_reason: FinishReason
    usage: common_pb2.Usage
    timing: common_pb2.Timing
    warnings: tuple[str, ...]
    choices: tuple[inference_pb2.ChatChoice, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole continuation: the fields of its first choice, and all of them in `choices`."""

    id: str
    model: str
    text: str
    finish_reason: FinishReason
    usage: common_pb2.Usage
    timing: common_pb2.Timing
    warnings: tuple[str, ...]
    choices: tuple[inference_pb2.Choice, ...]


def checked(make: Callable[P, T]) -> Callable[P, T]:
    """`make`, raising InvalidRequestError when an argument does not fit the field that it is for."""

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return make(*args, **kwargs)
        # RuntimeError: nested too deep, or the home of nobody.
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise InvalidRequestError(f"An argument does not fit: {error}") from error

    return made


def finish_reason(value: int) -> FinishReason:
    """The word for a value of the contract's FinishReason; `unspecified` for one that is unknown here."""
    if value not in common_pb2.FinishReason.values():
        return "unspecified"
    name = common_pb2.FinishReason.Name(cast(common_pb2.FinishReason.ValueType, value))
    return cast(FinishReason, name.removeprefix("FINISH_REASON_").lower())


@checked
def chat_message(role: str, text: str, images: Sequence[bytes] = ()) -> inference_pb2.ChatMessage:
    """One message of `system`, `developer`, `user`, `assistant` or `tool`; images are bytes of files."""
    name = f"ROLE_{role}".upper()
    if name not in inference_pb2.Role.keys() or name == "ROLE_UNSPECIFIED":  # noqa: SIM118 (no mapping)
        raise InvalidRequestError(
            f"role '{role}' is none of system, developer, user, assistant, tool", field="messages.role"
        )
    parts = [inference_pb2.ContentPart(image=inference_pb2.Image(data=data)) for data in images]
    parts.append(inference_pb2.ContentPart(text=text))
    return inference_pb2.ChatMessage(role=inference_pb2.Role.Value(name), content=parts)


@checked
def chat_request(
    model: str,
    messages: Message | Sequence[Message],
    sampling: Sampling,
    *,
    tools: Sequence[inference_pb2.Tool] = (),
    tool_choice: inference_pb2.ToolChoice | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    keep_alive_seconds: float | None = None,
    require_loaded: bool = False,
) -> inference_pb2.ChatRequest:
    """The request for those arguments of `Client.chat`."""
    if isinstance(messages, str | Mapping | inference_pb2.ChatMessage):
        messages = [messages]
    return inference_pb2.ChatRequest(
        model=model,
        messages=[_message(message) for message in messages],
        sampling=_sampling_params(sampling),
        tools=tools,
        tool_choice=tool_choice,
        template_arguments=json.dumps(template_arguments) if template_arguments else "",
        keep_alive=duration(keep_alive_seconds),
        load_policy=load_policy(require_loaded),
    )


@checked
def generate_request(
    model: str,
    prompts: str | Sequence[str],
    sampling: Sampling,
    *,
    echo: bool = False,
    keep_alive_seconds: float | None = None,
    require_loaded: bool = False,
) -> inference_pb2.GenerateRequest:
    """The request for those arguments of `Client.generate`."""
    texts = [prompts] if isinstance(prompts, str) else prompts
    return inference_pb2.GenerateRequest(
        model=model,
        prompts=[inference_pb2.Prompt(text=text) for text in texts],
        sampling=_sampling_params(sampling),
        echo=echo,
        keep_alive=duration(keep_alive_seconds),
        load_policy=load_policy(require_loaded),
    )


@checked
def count_request(model: str, prompt: str | Sequence[Message]) -> inference_pb2.CountTokensRequest:
    """A text is counted as a prompt, a sequence of messages as a chat."""
    if isinstance(prompt, str):
        return inference_pb2.CountTokensRequest(model=model, prompt=inference_pb2.Prompt(text=prompt))
    return inference_pb2.CountTokensRequest(model=model, chat=chat_request(model, prompt, {}))


@checked
def install_request(
    source: str | Path, name: str, revision: str, *, force: bool, request_id: str
) -> model_pb2.InstallModelRequest:
    """A `Path` is a directory on the server's machine, text a hub id."""
    request = model_pb2.InstallModelRequest(name=name, revision=revision, force=force, request_id=request_id)
    if isinstance(source, Path):
        request.local_directory = str(source.expanduser().absolute())
    else:
        request.model_id = source
    return request


def chat_reply(response: inference_pb2.ChatResponse) -> ChatReply:
    """The reply that a response is."""
    first = response.choices[0] if response.choices else inference_pb2.ChatChoice()
    return ChatReply(
        id=response.id,
        model=response.model,
        text="".join(part.text for part in first.message.content),
        reasoning=first.message.reasoning,
        tool_calls=tuple(first.message.tool_calls),
        finish_reason=finish_reason(first.finish_reason),
        usage=response.usage,
        timing=response.timing,
        warnings=tuple(response.warnings),
        choices=tuple(response.choices),
    )


def completion(response: inference_pb2.GenerateResponse) -> Completion:
    """The continuation that a response is."""
    first = response.choices[0] if response.choices else inference_pb2.Choice()
    return Completion(
        id=response.id,
        model=response.model,
        text=first.text,
        finish_reason=finish_reason(first.finish_reason),
        usage=response.usage,
        timing=response.timing,
        warnings=tuple(response.warnings),
        choices=tuple(response.choices),
    )


def chat_event(response: inference_pb2.ChatStreamResponse) -> ChatEvent | None:
    """What happened; None for an event that this version does not know."""
    kind = response.WhichOneof("event")
    return getattr(response, kind) if kind else None


def generate_event(response: inference_pb2.GenerateStreamResponse) -> GenerateEvent | None:
    """What happened; None for an event that this version does not know."""
    kind = response.WhichOneof("event")
    return getattr(response, kind) if kind else None


@checked
def duration(seconds: float | None, field: str = "keep_alive") -> Duration | None:
    """The contract's form of a span, which `field` wants; raises InvalidRequestError for what has none."""
    if seconds is None:
        return None
    if not math.isfinite(seconds) or abs(seconds) > MAX_DURATION_SECONDS:
        raise InvalidRequestError(
            f"{field} must be a number of seconds up to {MAX_DURATION_SECONDS}, not {seconds}", field=field
        )
    whole = math.trunc(seconds)
    return Duration(seconds=whole, nanos=round((seconds - whole) * 1e9))


def _message(message: Message) -> inference_pb2.ChatMessage:
    if isinstance(message, str):
        return chat_message("user", message)
    if isinstance(message, Mapping):
        for key in ("role", "content"):
            if key not in message:
                raise InvalidRequestError(f"A message has no {key}", field=f"messages.{key}")
        return chat_message(message["role"], message["content"])
    return message


def _sampling_params(sampling: Sampling) -> common_pb2.SamplingParams:
    stop = sampling.get("stop", ())
    fields = {**sampling, "stop": [stop] if isinstance(stop, str) else stop}
    params = common_pb2.SamplingParams()
    for name, value in fields.items():
        try:
            params.MergeFrom(common_pb2.SamplingParams(**{name: value}))  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidRequestError(
                f"{name} cannot be {reprlib.repr(value)}: {error}", field=f"sampling.{name}"
            ) from error
    return params


def load_policy(require_loaded: bool) -> common_pb2.LoadPolicy.ValueType:
    """What to do about a model that is not in memory."""
    return common_pb2.LOAD_POLICY_REQUIRE_LOADED if require_loaded else common_pb2.LOAD_POLICY_AUTO
