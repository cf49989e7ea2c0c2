"""Calls that a grammar enforces: whatever is drawn, mlx-lm's parser of the format reads it and the schema holds."""

import importlib
import json
import random
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from tokenizers import Tokenizer

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.constraints import Grammars
from mlxgui_grpc.engine.reply_format import Opening, ReplyFormat
from mlxgui_grpc.engine.row_guides import GuideMaker
from mlxgui_grpc.errors import InvalidRequestError
from tests.support_models import DEMO, END_TOKEN

TOKENIZER = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
WIDTH = TOKENIZER.get_vocab_size(with_added_tokens=True)
END = frozenset({END_TOKEN})
GRAMMARS = Grammars(TOKENIZER, WIDTH, END)
FORMATS = ["json_tools", "longcat", "mistral", "kimi_k2", "pythonic", "qwen3_coder", "glm47", "minimax_m2"]


def maker(name: str) -> GuideMaker:
    """For a model of this format on the demo model's tokenizer, for which only <tool_call> is a token."""
    module = importlib.import_module(f"mlx_lm.tool_parsers.{name}")
    shape = ReplyFormat(
        tool_format=name,
        tool_call_start=module.tool_call_start,
        tool_call_end=module.tool_call_end,
        parse_calls=module.parse_tool_call,
    )
    return GuideMaker(GRAMMARS, shape, END)


def tool(name: str, properties: dict[str, Any], *, is_strict: bool = True, **keywords: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "additionalProperties": False, **keywords}
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": is_strict}}


CITY = {"type": "string", "maxLength": 12}
TOOLS = [
    tool(
        "get_weather",
        {"city": CITY, "days": {"type": "integer", "minimum": 1, "maximum": 14}},
        required=["city"],
    ),
    tool("stop", {}),
    tool(
        "paint",
        {
            "colour": {"type": "string", "enum": ["red", "green"]},
            "points": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 2},
            "is_filled": {"type": "boolean"},
        },
        required=["colour", "points", "is_filled"],
    ),
]


def reply(
    name: str,
    seed: int,
    use: frames.ToolUse,
    tools: list[dict[str, Any]] | None = None,
    constraint: frames.Constraint | None = None,
    wish: str = "",
) -> str:
    """What a model says that draws among what it may; `wish` is what it says first."""
    submit = frames.Submit(
        (0,),
        frames.Prompt(messages=b"[]", tools=json.dumps(TOOLS if tools is None else tools).encode()),
        frames.Sampling(constraint=constraint),
        tool_use=use,
    )
    (guide,) = maker(name).make(submit, Opening())
    assert guide is not None
    choice = random.Random(seed)
    said: list[int] = []
    wished = list(TOKENIZER.encode(wish, add_special_tokens=False).ids)
    for _ in range(1500):
        bits = (
            np.frombuffer(guide.matcher.compute_bitmask(), np.uint8)
            if guide.matcher
            else np.zeros(1, np.uint8)
        )
        tokens = np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()
        assert tokens and not guide.failure, (guide.failure, TOKENIZER.decode(said))
        is_over = END_TOKEN in tokens and not wished and (len(tokens) == 1 or choice.random() < 0.3)
        token = wished.pop(0) if wished else END_TOKEN if is_over else choice.choice(tokens)
        assert token in tokens, (TOKENIZER.decode([token]), TOKENIZER.decode(said, skip_special_tokens=False))
        guide.consume(token)
        if token == END_TOKEN:
            return TOKENIZER.decode(said, skip_special_tokens=False)
        said.append(token)
    raise AssertionError(f"it never ends: {TOKENIZER.decode(said)}")


def read(name: str, text: str, tools: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """The calls in a text that consists of them."""
    shape = maker(name).reply_format
    assert shape.parse_calls is not None and text.startswith(shape.tool_call_start), text
    calls: list[dict[str, Any]] = []
    stretches = [text] if not shape.tool_call_end else text.split(shape.tool_call_end)
    for stretch in stretches:
        if not stretch.strip():
            continue
        between, _, inner = stretch.partition(shape.tool_call_start)
        assert not between.strip(), text
        parsed = shape.parse_calls(inner, TOOLS if tools is None else tools)
        calls += parsed if isinstance(parsed, list) else [parsed]
    return calls


def check(calls: list[dict[str, Any]], tools: list[dict[str, Any]]) -> None:
    schemas = {entry["function"]["name"]: entry["function"]["parameters"] for entry in tools}
    for call in calls:
        jsonschema_rs.validate(schemas[call["name"]], call["arguments"])


@pytest.mark.parametrize("name", FORMATS)
def test_required_calls_are_calls_and_nothing_else(name: str) -> None:
    counts, names = [], set()
    for seed in range(12):
        calls = read(name, reply(name, seed, frames.ToolUse(is_required=True)))
        check(calls, TOOLS)
        counts.append(len(calls))
        names |= {call["name"] for call in calls}
    assert min(counts) >= 1 and max(counts) > 1 and names == {"get_weather", "stop", "paint"}


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_call_alone_is_that_call_once(name: str) -> None:
    use = frames.ToolUse(function="paint", is_parallel=False)
    for seed in range(4):
        (call,) = read(name, reply(name, seed, use))
        assert call["name"] == "paint"
        check([call], TOOLS)


@pytest.mark.parametrize("name", FORMATS)
def test_strict_tools_are_free_to_be_left_alone_and_held_to_their_schema(name: str) -> None:
    """Text before a call, the tag in whatever tokens it takes, and then only what the schema lets through."""
    shape = maker(name).reply_format
    text = reply(name, 3, frames.ToolUse(is_parallel=False), wish=f"Let me look.{shape.tool_call_start}")
    before, tag, _ = text.partition(shape.tool_call_start)
    assert before == "Let me look." and tag
    inner = text[len(before) :]
    if shape.tool_call_end:
        inner = inner[: inner.index(shape.tool_call_end) + len(shape.tool_call_end)]
        check(read(name, inner), TOOLS)
    free = reply(name, 5, frames.ToolUse(), wish="No tool is needed")
    assert free.startswith("No tool is needed")


def test_a_reply_is_calls_or_what_the_constraint_says() -> None:
    constraint = frames.Constraint("json_schema", '{"type": "object", "properties": {"a": {"type": "null"}}}')
    seen = set()
    for seed, wish in enumerate(['{"a"', "<tool_call>"]):
        text = reply("json_tools", seed, frames.ToolUse(), constraint=constraint, wish=wish)
        seen.add(text.startswith("<tool_call>"))
        if not text.startswith("<tool_call>"):
            assert json.loads(text)["a"] is None
        else:
            check(read("json_tools", text), TOOLS)
    assert seen == {True, False}


def test_tools_that_are_not_strict_have_their_schemas_read_as_far_as_they_are_known() -> None:
    tools = [tool("f", {"a": {"type": "integer", "not": {"const": 3}}}, required=["a"], is_strict=False)]
    (call, *_) = read("json_tools", reply("json_tools", 1, frames.ToolUse(is_required=True), tools), tools)
    assert isinstance(call["arguments"]["a"], int)


@pytest.mark.parametrize(
    ("name", "use", "tools", "field", "says"),
    [
        ("function_gemma", frames.ToolUse(is_required=True), TOOLS, "tool_choice", "function_gemma"),
        ("json_tools", frames.ToolUse(function="nope"), TOOLS, "tool_choice", "'nope'"),
        (
            "json_tools",
            frames.ToolUse(),
            [tool(f"f{at}", {"a": {"const": "a" * 120_000}}) for at in range(9)],
            "tools",
            "at most 1048576",
        ),
        (
            "json_tools",
            frames.ToolUse(),
            [TOOLS[1], tool("f", {"a": {"not": {}}})],
            "tools[1].parameters_schema",
            "'not'",
        ),
        (
            "qwen3_coder",
            frames.ToolUse(),
            [tool("f", {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}})],
            "tools[0].parameters_schema",
            "'a'",
        ),
        (
            "glm47",
            frames.ToolUse(),
            [tool("f", {"a": {"type": "string", "pattern": "^a+$"}})],
            "tools[0].parameters_schema",
            "'pattern'",
        ),
        ("pythonic", frames.ToolUse(), [tool("f", {"class": CITY})], "tools[0].parameters_schema", "'class'"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(
    name: str, use: frames.ToolUse, tools: list[dict[str, Any]], field: str, says: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        reply(name, 0, use, tools)
    assert caught.value.field == field and says in caught.value.message
