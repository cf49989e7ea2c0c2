"""The sampling parameters of a request, each in its range."""

import math

from mlxgui.v1 import common_pb2
from mlxgui_grpc.convert.schemas import schema_from_text
from mlxgui_grpc.engine import frames
from mlxgui_grpc.errors import InvalidRequestError, NotImplementedYetError, PayloadTooLargeError

MAX_TOKENS_LIMIT = 16_384
MAX_STOP = 16
MAX_STOP_BYTES = 1_024
MAX_CHOICES = 16
MAX_LOGIT_BIAS = 1_024
MAX_TOP_LOGPROBS = 20
_MAX_TEXT_BYTES = {"regex": 16 * 1_024, "grammar": 64 * 1_024}


def sampling_from_proto(
    params: common_pb2.SamplingParams, *, may_generate_nothing: bool = False
) -> frames.Sampling:
    """Sampling parameters, each in its range; raises InvalidRequestError naming the field.

    `may_generate_nothing` lets max_tokens be 0, of which the answer says nothing.
    """

    def number(name: str, low: float, high: float, *, above: bool = False) -> float | None:
        if not params.HasField(name):  # type: ignore[arg-type]
            return None
        value: float = getattr(params, name)
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            interval = f"more than {low:g} and at most {high:g}" if above else f"between {low:g} and {high:g}"
            raise InvalidRequestError(f"{name} must be {interval}", field=f"sampling.{name}")
        # A float field widened: 0.7 arrives as 0.699999988.
        return value if isinstance(value, int) else round(value, 7)

    if number("prompt_lookup_tokens", 0, 16) is not None:
        raise _not_yet("prompt_lookup_tokens")
    for name in ("adapter", "draft_model"):
        if getattr(params, name):
            raise _not_yet(name)
    top_logprobs = number("top_logprobs", 0, MAX_TOP_LOGPROBS)
    thinking = number("max_thinking_tokens", 0, MAX_TOKENS_LIMIT)
    number("n", 1, MAX_CHOICES)
    top_k = number("top_k", 0, 2**31 - 1)
    window = number("repetition_context_size", 0, MAX_TOKENS_LIMIT)
    return frames.Sampling(
        max_tokens=int(number("max_tokens", 0 if may_generate_nothing else 1, MAX_TOKENS_LIMIT) or 0),
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
        top_logprobs=None if top_logprobs is None else int(top_logprobs),
        max_thinking_tokens=None if thinking is None else int(thinking),
        constraint=_constraint(params),
    )


def _not_yet(name: str) -> NotImplementedYetError:
    return NotImplementedYetError(f"{name} is not supported by this version", field=f"sampling.{name}")


def _constraint(params: common_pb2.SamplingParams) -> frames.Constraint | None:
    kind = params.WhichOneof("constraint")
    if kind is None or (kind == "json_object" and not params.json_object):
        return None
    if kind == "json_object":
        return frames.Constraint("json_object")
    text: str = getattr(params, kind)
    field = f"sampling.{kind}"
    if not text:
        raise InvalidRequestError(f"{kind} must not be empty", field=field)
    if kind == "json_schema":
        schema_from_text(text, field)
    elif len(text.encode("utf-8", "replace")) > _MAX_TEXT_BYTES[kind]:
        raise PayloadTooLargeError(f"{kind} is longer than {_MAX_TEXT_BYTES[kind] >> 10} KiB", field=field)
    return frames.Constraint(kind, text)


def _stop(params: common_pb2.SamplingParams) -> tuple[str, ...]:
    if len(params.stop) > MAX_STOP:
        raise InvalidRequestError(f"stop has more than {MAX_STOP} entries", field="sampling.stop")
    for text in params.stop:
        if not text:
            raise InvalidRequestError("stop has an empty entry", field="sampling.stop")
        if len(text.encode("utf-8", "replace")) > MAX_STOP_BYTES:
            raise PayloadTooLargeError(
                f"stop has an entry that is longer than {MAX_STOP_BYTES} bytes", field="sampling.stop"
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
