"""Pieces of a row become deltas of one kind each, and join only with their like."""

from typing import Any

import pytest

from mlxgui_grpc.deltas import Delta, deltas_of
from mlxgui_grpc.engine import frames

PART = frames.ToolCallPart
LOGPROB = frames.Logprob(1, "a", b"a", -1.0)


def piece(count: int, text: str = "", **extra: Any) -> frames.Piece:
    return frames.Piece(1, count, text, extra=frames.PieceExtra(**extra) if extra else None)


def test_a_piece_of_all_kinds_is_a_delta_for_each_and_counts_once() -> None:
    found = deltas_of(
        3,
        piece(
            4,
            "t",
            reasoning="r",
            tool_calls=(PART(0, "i", "n"), PART(0, arguments="{}")),
            logprobs=(LOGPROB,),
        ),
    )
    assert found == [
        Delta(3, 4, reasoning="r", logprobs=(LOGPROB,)),
        Delta(3, 0, "t"),
        Delta(3, 0, tool_call=PART(0, "i", "n")),
        Delta(3, 0, tool_call=PART(0, arguments="{}")),
    ]
    assert deltas_of(0, piece(0)) == [] == deltas_of(0, piece(0, warnings=("w",)))
    assert deltas_of(0, piece(2, reasoning_token_count=2)) == [Delta(0, 2)]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (Delta(0, 1, "a"), Delta(0, 1, "b"), Delta(0, 2, "ab")),
        (Delta(0, 1), Delta(0, 1, "b"), Delta(0, 2, "b")),
        (Delta(0, 1, reasoning="a"), Delta(0, 2, reasoning="b"), Delta(0, 3, reasoning="ab")),
        (Delta(0, 1, reasoning="a"), Delta(0, 1, "b"), None),
        (Delta(0, 1, "a"), Delta(0, 1, reasoning="b"), None),
        (Delta(0, 1, "a"), Delta(0, 1, tool_call=PART(0, "i", "n")), None),
        (Delta(0, 1, tool_call=PART(0, "i", "n")), Delta(0, 1, "b"), None),
        (
            Delta(0, 1, tool_call=PART(0, "i", "n", "{")),
            Delta(0, 1, tool_call=PART(0, arguments="}")),
            Delta(0, 2, tool_call=PART(0, "i", "n", "{}")),
        ),
        (Delta(0, 1, tool_call=PART(0, "i", "n")), Delta(0, 1, tool_call=PART(1, "j", "n")), None),
        (
            Delta(0, 1, "a", logprobs=(LOGPROB,)),
            Delta(0, 1, logprobs=(LOGPROB,)),
            Delta(0, 2, "a", logprobs=(LOGPROB,) * 2),
        ),
        (Delta(0, 1, "a"), Delta(0, 1, "b", prompt_logprobs=(LOGPROB,)), None),
    ],
)  # fmt: skip
def test_only_the_same_kind_joins(first: Delta, second: Delta, expected: Delta | None) -> None:
    before = first.text, first.reasoning, first.token_count
    assert first.join(second) == (expected is not None)
    if expected is not None:
        assert first == expected
    else:
        assert (first.text, first.reasoning, first.token_count) == before
