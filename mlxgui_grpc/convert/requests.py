"""Whole requests of the contract to what the generator takes, checked."""

from typing import Any

from mlxgui.v1 import common_pb2, inference_pb2
from mlxgui_grpc.convert.messages import messages_from_proto
from mlxgui_grpc.convert.sampling import sampling_from_proto
from mlxgui_grpc.convert.tools import tool_use_from_proto, tools_from_proto
from mlxgui_grpc.convert.values import json_bytes, json_object, keep_alive_seconds, model_name, priority
from mlxgui_grpc.engine import frames
from mlxgui_grpc.errors import InvalidRequestError, PayloadTooLargeError
from mlxgui_grpc.generation import GenerationRequest
from mlxgui_grpc.images.sources import ImageSource

MAX_PROMPTS = 128
MAX_TEMPLATE_ARGUMENTS_BYTES = 64 * 1_024
MAX_USER_BYTES = 256
DEFAULT_JOIN_TOKENS = 32
MAX_JOIN_TOKENS = 256

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


def chat_from_proto(request: inference_pb2.ChatRequest) -> GenerationRequest:
    """A chat, checked; raises InvalidRequestError naming the field."""
    prompt, images = chat_prompt_from_proto(request)
    return GenerationRequest(
        prompts=[prompt],
        images=images,
        tool_use=tool_use_from_proto(request),
        id_prefix="chatcmpl",
        **_common(request),
    )


def chat_prompt_from_proto(
    request: inference_pb2.ChatRequest,
) -> tuple[frames.Prompt, tuple[ImageSource, ...]]:
    """The messages, tools and template arguments of a chat, and the images that belong in it."""
    messages, images = messages_from_proto(request.messages)
    prompt = frames.Prompt(
        messages=messages,
        tools=tools_from_proto(request),
        template_arguments=_template_arguments(request.template_arguments),
    )
    return prompt, images


def completion_from_proto(request: inference_pb2.GenerateRequest) -> GenerationRequest:
    """A completion, checked; raises InvalidRequestError naming the field."""
    if not request.prompts:
        raise InvalidRequestError("prompts must not be empty", field="prompts")
    if len(request.prompts) > MAX_PROMPTS:
        raise InvalidRequestError(f"prompts has more than {MAX_PROMPTS} entries", field="prompts")
    prompts = [prompt_from_proto(prompt, f"prompts[{i}]") for i, prompt in enumerate(request.prompts)]
    return GenerationRequest(
        prompts=prompts,
        echo=request.echo,
        # How tools that score texts ask for log-probabilities.
        is_scored_only=request.sampling.HasField("max_tokens") and request.sampling.max_tokens == 0,
        id_prefix="cmpl",
        **_common(request),
    )


def prompt_from_proto(prompt: inference_pb2.Prompt, field: str) -> frames.Prompt:
    """A raw prompt."""
    if prompt.WhichOneof("input") == "text":
        if not prompt.text:
            raise InvalidRequestError(f"{field} must not be empty", field=field)
        return frames.Prompt(text=prompt.text)
    if not prompt.token_ids.ids:
        raise InvalidRequestError(f"{field} must not be empty", field=field)
    return frames.Prompt(token_ids=tuple(prompt.token_ids.ids))


def _common(request: inference_pb2.ChatRequest | inference_pb2.GenerateRequest) -> dict[str, Any]:
    is_echo = isinstance(request, inference_pb2.GenerateRequest) and request.echo
    sampling = sampling_from_proto(request.sampling, may_generate_nothing=is_echo)
    check_user(request.user)
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
    }


def check_user(name: str) -> None:
    """Raise PayloadTooLargeError for a caller's name for its user that is too long for the log."""
    if len(name.encode()) > MAX_USER_BYTES:
        raise PayloadTooLargeError(f"user is longer than {MAX_USER_BYTES} bytes", field="user")


def _template_arguments(text: str) -> bytes:
    if not text:
        return b""
    if len(text.encode("utf-8", "replace")) > MAX_TEMPLATE_ARGUMENTS_BYTES:
        raise PayloadTooLargeError(
            f"template_arguments is longer than {MAX_TEMPLATE_ARGUMENTS_BYTES >> 10} KiB",
            field="template_arguments",
        )
    arguments = json_object(text, "template_arguments")
    if reserved := sorted(arguments.keys() & _RESERVED_TEMPLATE_ARGUMENTS):
        raise InvalidRequestError(
            f"template_arguments must not set '{reserved[0]}'", field="template_arguments"
        )
    return json_bytes(arguments, "template_arguments")


def join_tokens_from_proto(options: inference_pb2.StreamOptions) -> int:
    """Most tokens of one delta."""
    if not 0 <= options.max_join_tokens <= MAX_JOIN_TOKENS:
        raise InvalidRequestError(
            f"max_join_tokens must be between 0 and {MAX_JOIN_TOKENS}", field="options.max_join_tokens"
        )
    return options.max_join_tokens or DEFAULT_JOIN_TOKENS
