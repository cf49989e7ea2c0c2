"""The fields of a request that say how to decode and when."""

from mlxgui.v1 import common_pb2, inference_pb2
from rest_bridge.errors import invalid
from rest_bridge.json_body import INT64_LIMIT, Fields, number_value, text_value, type_name
from rest_bridge.keep_alive import read_keep_alive


def read_sampling(fields: Fields, sampling: common_pb2.SamplingParams) -> None:
    """The sampling fields that OpenAI's routes and the native one share. Ranges are the server's to check."""
    for key in (
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ):
        number = fields.number(key)
        if number is not None:
            setattr(sampling, key, number)
    for key in (
        "max_tokens",
        "top_k",
        "repetition_context_size",
        "max_thinking_tokens",
        "prompt_lookup_tokens",
    ):
        integer = fields.integer(key)
        if integer is not None:
            setattr(sampling, key, integer)
    for key in ("adapter", "draft_model"):
        text = fields.text(key)
        if text is not None:
            setattr(sampling, key, text)
    seed = fields.integer("seed", INT64_LIMIT)
    if seed is not None:
        sampling.seed = seed
    match fields.raw("stop"):
        case None:
            pass
        case str() as stop:
            sampling.stop.append(text_value(stop, "stop"))
        case list() as stops:
            sampling.stop.extend(text_value(stop, f"stop[{index}]") for index, stop in enumerate(stops))
        case other:
            raise invalid(f"`stop` must be a string or an array of strings, not {type_name(other)}.", "stop")
    bias = fields.raw("logit_bias")
    if bias is not None:
        _read_logit_bias(bias, sampling)


def read_scheduling(
    fields: Fields,
    request: inference_pb2.ChatRequest
    | inference_pb2.GenerateRequest
    | inference_pb2.EmbedRequest
    | inference_pb2.RerankRequest,
) -> None:
    """Where the request goes in the queue, and how long its model stays after it."""
    priority = fields.integer("priority")
    if priority is not None:
        request.priority = priority
    keep_alive = fields.raw("keep_alive")
    if keep_alive is not None:
        request.keep_alive.CopyFrom(read_keep_alive(keep_alive))


def _read_logit_bias(bias: object, sampling: common_pb2.SamplingParams) -> None:
    if not isinstance(bias, dict):
        raise invalid(f"`logit_bias` must be an object, not {type_name(bias)}.", "logit_bias")
    for token, value in bias.items():
        # isdecimal() alone also takes other scripts' digits.
        if not (token.isascii() and token.isdecimal() and len(token) <= 10 and int(token) < 2**31):
            raise invalid(f"`logit_bias` has the key {token[:32]!r}, which is no token id.", "logit_bias")
        sampling.logit_bias[int(token)] = number_value(value, f"logit_bias.{token}")
