"""Log-probabilities in the two forms of OpenAI's answers."""

import math
from collections.abc import Iterable

from mlxgui.v1 import common_pb2
from rest_bridge.errors import JsonObject

_IMPOSSIBLE = -9999.0


def chat_logprobs(entries: Iterable[common_pb2.TokenLogprob]) -> JsonObject:
    """Log-probabilities in the form of chat choices."""
    return {
        "content": [
            {**_token(entry), "top_logprobs": [_token(rival) for rival in entry.top]} for entry in entries
        ],
        "refusal": None,
    }


def text_logprobs(entries: Iterable[common_pb2.TokenLogprob], offset: int = 0) -> tuple[JsonObject, int]:
    """Log-probabilities in the form of completions, and the offset in characters of the text after them."""
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for entry in entries:
        tokens.append(entry.text)
        values.append(_finite(entry.logprob) if entry.HasField("logprob") else None)
        # As OpenAI: the token itself is there even if it is not among the likeliest.
        tops.append(
            {rival.text: _finite(rival.logprob) for rival in (*entry.top, entry)} if entry.top else None
        )
        offsets.append(offset)
        offset += len(entry.text)
    body = {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
    return body, offset


def _token(entry: common_pb2.TokenLogprob) -> JsonObject:
    return {"token": entry.text, "logprob": _finite(entry.logprob), "bytes": list(entry.bytes)}


def _finite(logprob: float) -> float:
    """JSON has no infinity: OpenAI's own number for a token that cannot come."""
    return logprob if math.isfinite(logprob) else _IMPOSSIBLE
