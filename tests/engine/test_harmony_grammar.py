"""What is asked of gpt-oss's replies, enforced by the grammar of the whole reply, and read back."""

import json
import random
from typing import Any

import numpy as np
import pytest

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.constraints import Grammars
from mlxgui_grpc.engine.guide import BatchGuide
from mlxgui_grpc.engine.row_guides import GuideMaker
from mlxgui_grpc.errors import InvalidRequestError
from tests.engine.test_harmony import BACKEND, CALL, ENDS, FINAL, FORMAT, OPENING, read
from tests.engine.test_reply import WEATHER, Reply

GRAMMARS = Grammars(BACKEND, BACKEND.get_vocab_size(with_added_tokens=True), ENDS)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
FORM = frames.Constraint("json_schema", json.dumps(SCHEMA))
STRICT = json.loads(json.dumps(WEATHER))
STRICT["function"] |= {"strict": True, "parameters": {**SCHEMA}}


def draw(
    sampling: frames.Sampling,
    tool_use: frames.ToolUse | None = None,
    *,
    tool: Any = STRICT,
    seed: int = 0,
    wish: str = "",
) -> tuple[str, Reply]:
    """A reply whose model wants `wish` as long as it may, and then anything; what it wrote, and how it reads."""
    tools = [tool] if tool_use else None
    prompt = frames.Prompt(messages=b"[]", tools=json.dumps(tools).encode() if tools else b"")
    maker = GuideMaker(GRAMMARS, FORMAT, ENDS)
    submit = frames.Submit((1,), prompt, sampling, tool_use=tool_use)
    assert maker.is_slow(submit)
    (guide,) = maker.make(submit, OPENING)
    wished, choice = BACKEND.encode(wish).ids, random.Random(seed)
    said: list[int] = []
    for _ in range(600):
        batch = BatchGuide([guide])
        mask = batch.mask(GRAMMARS.width)
        assert mask is not None
        allowed = np.flatnonzero(np.array(mask[0]))
        markup = [token for token in allowed if token in FORMAT.markup_tokens]
        if wished and wished[0] in allowed:
            token = wished.pop(0)
        else:
            wished = []
            token = int(choice.choice(markup or list(allowed)))
        batch.consume([token])
        assert guide is not None and not guide.failure
        if token in ENDS:
            text = BACKEND.decode(said, skip_special_tokens=False)
            constrained = sampling.constraint is not None
            return text, read([text], tools=tools, is_constrained=constrained)
        said.append(token)
    raise AssertionError(f"it never ends: {BACKEND.decode(said, skip_special_tokens=False)}")


THOUGHT = "<|channel|>analysis<|message|>abcdefgh"


def test_an_answer_of_a_given_form_comes_after_the_thinking() -> None:
    for seed in range(4):
        _, reply = draw(frames.Sampling(constraint=FORM), seed=seed, wish=THOUGHT)
        assert reply.reasoning.startswith("abcdefgh") and json.loads(reply.text)["a"] in (1, 2)
    text, reply = draw(frames.Sampling(constraint=FORM), wish=FINAL + '{"a":2}')
    assert text == FINAL + '{"a":2}' and reply.text == '{"a":2}'


@pytest.mark.parametrize(("budget", "thought"), [(0, ""), (3, "abc")])
@pytest.mark.parametrize("constraint", [None, FORM])
def test_the_budget_of_the_thinking(budget: int, thought: str, constraint: frames.Constraint | None) -> None:
    sampling = frames.Sampling(max_thinking_tokens=budget, constraint=constraint)
    text, reply = draw(sampling, wish=THOUGHT)
    assert reply.reasoning == thought and FINAL.removesuffix("<|message|>") in text
    assert constraint is None or json.loads(reply.text)


def test_calls_are_enforced_in_either_place_of_the_recipient() -> None:
    required = frames.ToolUse(is_required=True)
    for wish in (
        CALL,
        " to=functions.get_weather<|channel|>commentary json<|message|>",
        THOUGHT,
        FINAL + "No.",
    ):
        text, reply = draw(frames.Sampling(), required, wish=wish)
        ((name, arguments),) = reply.calls
        assert name == "get_weather" and json.loads(arguments)["a"] in (1, 2) and not reply.text
        assert text.startswith(wish) or wish.startswith(FINAL)
    named = frames.ToolUse(function="get_weather")
    assert draw(frames.Sampling(), named, tool=WEATHER)[1].calls[0][0] == "get_weather"
    with pytest.raises(InvalidRequestError, match="'nope'"):
        draw(frames.Sampling(), frames.ToolUse(function="nope"))


def test_strict_tools_and_a_form_leave_the_choice() -> None:
    assert draw(frames.Sampling(), frames.ToolUse(), wish=FINAL + "No.")[1].text.startswith("No.")
    said = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + CALL
    _, reply = draw(frames.Sampling(), frames.ToolUse(), wish=said)
    assert reply.text == "I look." and json.loads(reply.calls[0][1])["a"] in (1, 2)
    both = frames.Sampling(constraint=FORM)
    assert draw(both, frames.ToolUse(), wish=CALL)[1].calls
    assert json.loads(draw(both, frames.ToolUse(), wish=FINAL)[1].text)
