"""Protobuf to plain nouns and back: pure functions, and the only place that checks the fields of a request."""

import json
import math
import re
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from mlxgui.v1 import common_pb2, inference_pb2
from mlxgui_grpc.engine import frames
from mlxgui_grpc.errors import (
    InvalidRequestError,
    ModelServerError,
    NotImplementedYetError,
    PayloadTooLargeError,
)
from mlxgui_grpc.generation import Delta, Ended, Event, Finished, GenerationRequest, Prefilling, Started

MAX_TOKENS_LIMIT = 16_384
MAX_MESSAGES = 2_048
MAX_PARTS = 256
MAX_TOOLS = 128
MAX_PROMPTS = 128
MAX_STOP = 16
MAX_STOP_BYTES = 1_024
MAX_CHOICES = 16
MAX_LOGIT_BIAS = 1_024
MAX_TEMPLATE_ARGUMENTS_BYTES = 64 * 1_024
MAX_USER_BYTES = 256
MAX_MODEL_BYTES = 512
DEFAULT_JOIN_TOKENS = 32
MAX_JOIN_TOKENS = 256

_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

_RESERVED_TEMPLATE_ARGUMENTS = frozenset(
    [
        "conversation",
        "messages",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    ]
)

_ROLES = {
    inference_pb2.ROLE_SYSTEM: "system",
    inference_pb2.ROLE_DEVELOPER: "system",  # OpenAI's newer name for it; no chat template knows it
    inference_pb2.ROLE_USER: "user",
    inference_pb2.ROLE_ASSISTANT: "assistant",
    inference_pb2.ROLE_TOOL: "tool",
}

_FINISH_REASONS = {"stop": common_pb2.FINISH_REASON_STOP, "length": common_pb2.FINISH_REASON_LENGTH}


# Requests.


def chat_from_proto(request: inference_pb2.ChatRequest) -> GenerationRequest:
    """A chat, checked; raises InvalidRequestError naming the field."""
    warnings: list[str] = []
    return GenerationRequest(
        prompts=[chat_prompt_from_proto(request, warnings)],
        id_prefix="chatcmpl",
        **_common(request, warnings),
    )


def chat_prompt_from_proto(request: inference_pb2.ChatRequest, warnings: list[str]) -> frames.Prompt:
    """The messages, tools and template arguments of a chat."""
    if not request.messages:
        raise InvalidRequestError("messages must not be empty", field="messages")
    if len(request.messages) > MAX_MESSAGES:
        raise InvalidRequestError(f"messages has more than {MAX_MESSAGES} entries", field="messages")
    messages = [_message(message, f"messages[{i}]", warnings) for i, message in enumerate(request.messages)]
    return frames.Prompt(
        messages=_json(messages, "messages"),
        tools=_tools(request, warnings),
        template_arguments=_template_arguments(request.template_arguments),
    )


def completion_from_proto(request: inference_pb2.GenerateRequest) -> GenerationRequest:
    """A completion, checked; raises InvalidRequestError naming the field."""
    if not request.prompts:
        raise InvalidRequestError("prompts must not be empty", field="prompts")
    if len(request.prompts) > MAX_PROMPTS:
        raise InvalidRequestError(f"prompts has more than {MAX_PROMPTS} entries", field="prompts")
    warnings: list[str] = []
    prompts = [prompt_from_proto(prompt, f"prompts[{i}]") for i, prompt in enumerate(request.prompts)]
    if request.echo and any(prompt.text is None for prompt in prompts):
        raise InvalidRequestError("echo needs prompts of text, not of token ids", field="echo")
    return GenerationRequest(prompts=prompts, id_prefix="cmpl", **_common(request, warnings))


def prompt_from_proto(prompt: inference_pb2.Prompt, field: str) -> frames.Prompt:
    """A raw prompt."""
    if prompt.WhichOneof("input") == "text":
        if not prompt.text:
            raise InvalidRequestError(f"{field} must not be empty", field=field)
        return frames.Prompt(text=prompt.text)
    if not prompt.token_ids.ids:
        raise InvalidRequestError(f"{field} must not be empty", field=field)
    return frames.Prompt(token_ids=tuple(prompt.token_ids.ids))


def _common(
    request: inference_pb2.ChatRequest | inference_pb2.GenerateRequest, warnings: list[str]
) -> dict[str, Any]:
    sampling = sampling_from_proto(request.sampling)
    if len(request.user.encode()) > MAX_USER_BYTES:
        raise InvalidRequestError(f"user is longer than {MAX_USER_BYTES} bytes", field="user")
    choices = request.sampling.n if request.sampling.HasField("n") else 1
    prompt_count = 1 if isinstance(request, inference_pb2.ChatRequest) else len(request.prompts)
    if choices * prompt_count > MAX_PROMPTS:
        raise InvalidRequestError(f"n times prompts must be at most {MAX_PROMPTS}", field="sampling.n")
    return {
        "model": model_name(request.model, may_be_empty=True),
        "sampling": sampling,
        "choices": choices,
        "priority": priority(request.priority),
        "keep_alive_seconds": keep_alive_seconds(request),
        "require_loaded": request.load_policy == common_pb2.LOAD_POLICY_REQUIRE_LOADED,
        "warnings": warnings,
    }


def priority(value: int) -> int:
    """A place in a queue: larger goes first."""
    if not -100 <= value <= 100:
        raise InvalidRequestError("priority must be between -100 and 100", field="priority")
    return value


def keep_alive_seconds(request: Any) -> float | None:
    """How long a model stays after its last use; infinity: for good. None: the request does not say."""
    if not request.HasField("keep_alive"):
        return None
    seconds: float = request.keep_alive.seconds + request.keep_alive.nanos / 1e9
    return math.inf if seconds < 0 else seconds


def model_name(name: str, field: str = "model", *, may_be_empty: bool = False) -> str:
    """The name of a model as a request gives it; one that `may_be_empty` is for the settings to say."""
    if not name and not may_be_empty:
        raise InvalidRequestError(f"{field} must not be empty", field=field)
    if len(name.encode("utf-8", "replace")) > MAX_MODEL_BYTES:
        raise InvalidRequestError(f"{field} is longer than {MAX_MODEL_BYTES} bytes", field=field)
    return name


def sampling_from_proto(params: common_pb2.SamplingParams) -> frames.Sampling:
    """Sampling parameters, each in its range; raises InvalidRequestError naming the field."""

    def number(name: str, low: float, high: float, *, above: bool = False) -> float | None:
        if not params.HasField(name):  # type: ignore[arg-type]
            return None
        value: float = getattr(params, name)
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            interval = f"more than {low:g} and at most {high:g}" if above else f"between {low:g} and {high:g}"
            raise InvalidRequestError(f"{name} must be {interval}", field=f"sampling.{name}")
        # A float field widened: 0.7 arrives as 0.699999988.
        return value if isinstance(value, int) else round(value, 7)

    for name, most in (("top_logprobs", 20), ("max_thinking_tokens", 16_384), ("prompt_lookup_tokens", 16)):
        if number(name, 0, most) is not None:
            raise _not_yet(name)
    for name in ("adapter", "draft_model"):
        if getattr(params, name):
            raise _not_yet(name)
    constraint = params.WhichOneof("constraint")
    if constraint and getattr(params, constraint):
        raise _not_yet(constraint)
    number("n", 1, MAX_CHOICES)
    top_k = number("top_k", 0, 2**31 - 1)
    window = number("repetition_context_size", 0, MAX_TOKENS_LIMIT)
    return frames.Sampling(
        max_tokens=int(number("max_tokens", 1, MAX_TOKENS_LIMIT) or 0),
        temperature=number("temperature", 0, 2),
        top_p=number("top_p", 0, 1, above=True),
        top_k=None if top_k is None else int(top_k),
        min_p=number("min_p", 0, 1),
        repetition_penalty=number("repetition_penalty", 0, 10, above=True),
        repetition_context_size=20 if window is None else int(window),
        presence_penalty=number("presence_penalty", -2, 2) or 0.0,
        frequency_penalty=number("frequency_penalty", -2, 2) or 0.0,
        seed=params.seed if params.HasField("seed") else None,
        stop=_stop(params),
        logit_bias=_logit_bias(params),
    )


def _not_yet(name: str) -> NotImplementedYetError:
    return NotImplementedYetError(f"{name} is not supported by this version", field=f"sampling.{name}")


def _stop(params: common_pb2.SamplingParams) -> tuple[str, ...]:
    if len(params.stop) > MAX_STOP:
        raise InvalidRequestError(f"stop has more than {MAX_STOP} entries", field="sampling.stop")
    for text in params.stop:
        if not text or len(text.encode("utf-8", "replace")) > MAX_STOP_BYTES:
            raise InvalidRequestError(
                f"each stop must be 1 to {MAX_STOP_BYTES} bytes long", field="sampling.stop"
            )
    return tuple(params.stop)


def _logit_bias(params: common_pb2.SamplingParams) -> dict[int, float]:
    if len(params.logit_bias) > MAX_LOGIT_BIAS:
        raise InvalidRequestError(
            f"logit_bias has more than {MAX_LOGIT_BIAS} entries", field="sampling.logit_bias"
        )
    for token, value in params.logit_bias.items():
        if token < 0 or not math.isfinite(value) or not -100 <= value <= 100:
            raise InvalidRequestError(
                "logit_bias must map token ids to values between -100 and 100", field="sampling.logit_bias"
            )
    return dict(params.logit_bias)


def _message(message: inference_pb2.ChatMessage, field: str, warnings: list[str]) -> dict[str, Any]:
    role = _ROLES.get(message.role)
    if role is None:
        raise InvalidRequestError(
            f"{field}.role must be system, developer, user, assistant or tool", field=f"{field}.role"
        )
    if len(message.content) > MAX_PARTS:
        raise InvalidRequestError(
            f"{field}.content has more than {MAX_PARTS} parts", field=f"{field}.content"
        )
    texts: list[str] = []
    for index, part in enumerate(message.content):
        kind = part.WhichOneof("part")
        if kind == "text":
            texts.append(part.text)
        elif kind == "image":
            if role not in ("user", "tool"):
                raise InvalidRequestError(
                    f"{field}.content[{index}] is an image: only user and tool messages may have them",
                    field=f"{field}.content[{index}]",
                )
            warning = "images are ignored: this model reads text only"
            if warning not in warnings:
                warnings.append(warning)
        else:
            raise InvalidRequestError(f"{field}.content[{index}] is empty", field=f"{field}.content[{index}]")
    result: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
    if message.tool_calls:
        if role != "assistant":
            raise InvalidRequestError(
                f"{field}.tool_calls belong to assistant messages only", field=f"{field}.tool_calls"
            )
        result["tool_calls"] = [
            {
                "type": "function",
                "id": call.id,
                "function": {
                    "name": call.name,
                    "arguments": _arguments(call.arguments, f"{field}.tool_calls[{index}].arguments"),
                },
            }
            for index, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id and role != "tool":
        raise InvalidRequestError(
            f"{field}.tool_call_id belongs to tool messages only", field=f"{field}.tool_call_id"
        )
    for name in ("name", "tool_call_id", "reasoning"):
        if value := getattr(message, name):
            result["reasoning_content" if name == "reasoning" else name] = value
    return result


def _arguments(text: str, field: str) -> Any:
    """Templates want the arguments of a call as an object; what does not parse stays text, as the model wrote it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    _json(value, field)
    return value


def _tools(request: inference_pb2.ChatRequest, warnings: list[str]) -> bytes:
    if len(request.tools) > MAX_TOOLS:
        raise InvalidRequestError(f"tools has more than {MAX_TOOLS} entries", field="tools")
    choice = request.tool_choice
    if choice.function or choice.mode == inference_pb2.ToolChoice.MODE_REQUIRED:
        raise NotImplementedYetError(
            "tool_choice 'required' or a named function is not supported by this version", field="tool_choice"
        )
    if not request.tools or choice.mode == inference_pb2.ToolChoice.MODE_NONE:
        return b""
    tools = []
    names: set[str] = set()
    for index, tool in enumerate(request.tools):
        field = f"tools[{index}]"
        if not _TOOL_NAME.fullmatch(tool.name):
            raise InvalidRequestError(
                f"{field}.name must be 1 to 64 letters, digits, underscores or dashes", field=f"{field}.name"
            )
        if tool.name in names:
            raise InvalidRequestError(
                f"{field}.name '{tool.name}' is the name of another tool too", field=f"{field}.name"
            )
        names.add(tool.name)
        schema = _object(tool.parameters_schema or "{}", f"{field}.parameters_schema")
        function = {"name": tool.name, "description": tool.description, "parameters": schema}
        tools.append({"type": "function", "function": function})
        if tool.strict:
            raise NotImplementedYetError(
                f"{field}.strict is not supported by this version", field=f"{field}.strict"
            )
    warnings.append(
        "tool calls are returned as the model writes them, in the text: this version does not parse them"
    )
    if request.HasField("parallel_tool_calls"):
        warnings.append("parallel_tool_calls has no effect in this version")
    return _json(tools, "tools")


def _template_arguments(text: str) -> bytes:
    if not text:
        return b""
    if len(text.encode("utf-8", "replace")) > MAX_TEMPLATE_ARGUMENTS_BYTES:
        raise PayloadTooLargeError(
            f"template_arguments is longer than {MAX_TEMPLATE_ARGUMENTS_BYTES >> 10} KiB",
            field="template_arguments",
        )
    arguments = _object(text, "template_arguments")
    if reserved := sorted(arguments.keys() & _RESERVED_TEMPLATE_ARGUMENTS):
        raise InvalidRequestError(
            f"template_arguments must not set '{reserved[0]}'", field="template_arguments"
        )
    return _json(arguments, "template_arguments")


def _object(text: str, field: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{field} is not JSON: {error}", field=field) from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{field} must be a JSON object", field=field)
    _json(value, field)
    return value


def _json(value: Any, field: str) -> bytes:
    """JSON, which an escape like `\\ud800` in a caller's own JSON cannot be a part of: it is no character."""
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        raise InvalidRequestError(
            f"{field} has half of a surrogate pair in it, or is nested too deeply", field=field
        ) from None


def join_tokens_from_proto(options: inference_pb2.StreamOptions) -> int:
    """Most tokens of one delta."""
    if not 0 <= options.max_join_tokens <= MAX_JOIN_TOKENS:
        raise InvalidRequestError(
            f"max_join_tokens must be between 0 and {MAX_JOIN_TOKENS}", field="options.max_join_tokens"
        )
    return options.max_join_tokens or DEFAULT_JOIN_TOKENS


# Replies.


def with_echo(events: list[Event], request: GenerationRequest) -> list[Event]:
    """The events with each prompt as the first text of its choices."""
    echoes: list[Event] = [
        Delta(index * request.choices + choice, prompt.text or "", 0)
        for index, prompt in enumerate(request.prompts)
        for choice in range(request.choices)
    ]
    result: list[Event] = []
    for event in events:
        result += [event, *echoes] if isinstance(event, Started) else [event]
    return result


def usage_to_proto(ended: Ended) -> common_pb2.Usage:
    """Token counts."""
    return common_pb2.Usage(
        prompt_token_count=ended.prompt_token_count,
        completion_token_count=ended.completion_token_count,
        total_token_count=ended.prompt_token_count + ended.completion_token_count,
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
        return inference_pb2.ChatStreamResponse(
            delta=inference_pb2.ChatDelta(index=event.index, text=event.text, token_count=event.token_count)
        )
    return inference_pb2.ChatStreamResponse(**_other_event(event))


def text_event_to_proto(event: Event) -> inference_pb2.GenerateStreamResponse:
    """One event of a completion stream."""
    if type(event) is Delta:
        return inference_pb2.GenerateStreamResponse(
            delta=inference_pb2.TextDelta(index=event.index, text=event.text, token_count=event.token_count)
        )
    return inference_pb2.GenerateStreamResponse(**_other_event(event))


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
    return {"end": inference_pb2.StreamEnd(usage=usage_to_proto(event), timing=timing_to_proto(event))}


def chat_reply_to_proto(events: list[Event], choices: int) -> inference_pb2.ChatResponse:
    """A whole stream as one reply."""
    reply = inference_pb2.ChatResponse()
    for index in range(choices):
        text, finished = _choice(events, index)
        reply.choices.add(
            index=index,
            message=inference_pb2.ChatMessage(
                role=inference_pb2.ROLE_ASSISTANT, content=[inference_pb2.ContentPart(text=text)]
            ),
            finish_reason=_FINISH_REASONS[finished.reason],
            stop_sequence=finished.stop_match or None,
        )
    _fill_reply(reply, events)
    return reply


def text_reply_to_proto(events: list[Event], choices: int) -> inference_pb2.GenerateResponse:
    """A whole stream as one reply."""
    reply = inference_pb2.GenerateResponse()
    for index in range(choices):
        text, finished = _choice(events, index)
        reply.choices.add(
            index=index,
            text=text,
            finish_reason=_FINISH_REASONS[finished.reason],
            stop_sequence=finished.stop_match or None,
        )
    _fill_reply(reply, events)
    return reply


def _choice(events: list[Event], index: int) -> tuple[str, Finished]:
    text = "".join(event.text for event in events if isinstance(event, Delta) and event.index == index)
    finished = next(event for event in events if isinstance(event, Finished) and event.index == index)
    return text, finished


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
    reply.warnings.extend(started.warnings)


# Values.


def timestamp(seconds: float) -> Timestamp:
    """Unix seconds."""
    whole = math.floor(seconds)
    return Timestamp(seconds=whole, nanos=int((seconds - whole) * 1e6) * 1_000)


def duration(seconds: float) -> Duration:
    """A span that is not negative."""
    microseconds = max(0, round(seconds * 1e6))
    return Duration(seconds=microseconds // 1_000_000, nanos=microseconds % 1_000_000 * 1_000)


def error_to_proto(error: ModelServerError) -> common_pb2.OperationError:
    """An error inside an operation or a session."""
    return common_pb2.OperationError(
        code=error.status.value[0],
        reason=common_pb2.ErrorReason.Value(f"ERROR_REASON_{error.reason}"),
        message=error.message,
        metadata=error.metadata,
        field=error.field,
        retry_after=None if error.retry_after_seconds is None else duration(error.retry_after_seconds),
    )
