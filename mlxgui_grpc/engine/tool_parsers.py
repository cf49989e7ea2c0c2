"""Bounds what mlx-lm's parsers of tool calls are given: they run on the MLX thread, between two steps of every row."""

import re
from typing import Any

from mlxgui_grpc.engine.reply_format import ParseCalls, ReplyFormat

MAX_CALL_CHARACTERS = 64 * 1024
"""Of a stretch that is parsed at once."""
_GEMMA_MARK = re.compile(r'<\|"\|>|[{}]')
_GEMMA_NAME = re.compile(r"[\w-]+")


def bounded_parser(reply_format: ReplyFormat) -> ParseCalls:
    """The parser of a format; it raises ValueError at a text that is too long or would take it too long."""
    parse_calls = reply_format.parse_calls
    assert parse_calls is not None
    readable = _READABLE.get(reply_format.tool_format, _whole)

    def parse(text: str, tools: list[dict[str, Any]]) -> Any:
        if len(text) > MAX_CALL_CHARACTERS:
            raise ValueError("too long a call")
        return parse_calls(readable(text), tools)

    return parse


def _whole(text: str) -> str:
    return text


def _to_last_brace(text: str) -> str:
    """All that mlx-lm's expression for Function Gemma can match: it looks to the end of the text for a brace."""
    return text[: text.rfind("}") + 1]


def _balanced(text: str) -> str:
    """`text`, whose braces are balanced and belong to calls; else ValueError.

    mlx-lm's expression for Gemma 4 looks from each `call:NAME{` to the end of a text where it does not match.
    """
    depth, is_in_string, start = 0, False, 0
    for mark in _GEMMA_MARK.finditer(text):
        if is_in_string or len(mark[0]) > 1:
            is_in_string ^= len(mark[0]) > 1
            if not depth:
                raise ValueError("a string outside a call")
        elif mark[0] == "}":
            depth -= 1
            start = mark.end()
            if depth < 0:
                raise ValueError("a brace that closes nothing")
        else:
            _, tag, name = text[start : mark.start()].rpartition("call:")
            if not depth and not (tag and _GEMMA_NAME.fullmatch(name)):
                raise ValueError("braces outside a call")
            depth += 1
            start = mark.end()
    if depth:
        raise ValueError("a brace that is not closed")
    return text


_READABLE = {"gemma4": _balanced, "function_gemma": _to_last_brace}
"""What of a text a parser can be given that takes time with the square of any other."""
