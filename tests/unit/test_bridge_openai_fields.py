"""The three lists of OpenAI's fields against the readers of requests, and the fields that come with them."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlxgui.v1 import common_pb2, inference_pb2
from rest_bridge import openai
from rest_bridge.errors import ApiError
from rest_bridge.openai.field_lists import HONOURED, REFUSED, WITHOUT_EFFECT, Field, Route

README = Path(__file__).parents[2] / "README.md"
ROUTES: tuple[Route, ...] = ("chat", "completions")
BODIES: dict[Route, dict[str, Any]] = {
    "chat": {"model": "demo", "messages": [{"role": "user", "content": "hi"}]},
    "completions": {"model": "demo", "prompt": "hi"},
}
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
# A value for each honoured field with which it is right by itself.
VALUES: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    "prompt": "hi",
    "logit_bias": {"5": 1},
    "stop": ["x"],
    "stream": True,
    "logprobs": 1,
    "echo": True,
    "tools": TOOLS,
    "parallel_tool_calls": False,
    "tool_choice": "auto",
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "a"},
    "guided_json": {"type": "object"},
    "guided_choice": ["a"],
    "reasoning_effort": "low",
    "enable_thinking": False,
    "chat_template_kwargs": {"a": 1},
    "modalities": ["text"],
    "keep_alive": "5m",
    **dict.fromkeys(("model", "guided_regex", "guided_grammar", "adapter", "draft_model"), "x"),
}


def read(route: Route, **more: Any) -> tuple[Any, openai.Options]:
    reader = openai.chat_request if route == "chat" else openai.completion_request
    return reader({**BODIES[route], **more})


def chat(**more: Any) -> inference_pb2.ChatRequest:
    request: inference_pb2.ChatRequest = read("chat", **more)[0]
    return request


def refusal(route: Route = "chat", **more: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(route, **more)
    return caught.value


def names(fields: tuple[Field, ...], route: Route) -> list[str]:
    return [name for field in fields if route in field.routes for name in field.names]


@pytest.mark.parametrize("route", ROUTES)
def test_each_field_is_in_one_list_and_treated_so(route: Route) -> None:
    """Honoured ones change the request, those without effect bring a warning, refused ones a 400 with their name."""
    listed = [name for fields in (HONOURED, WITHOUT_EFFECT, REFUSED) for name in names(fields, route)]
    assert len(set(listed)) == len(listed)
    plain = read(route)
    for name in names(HONOURED, route):
        more: dict[str, Any] = {name: VALUES.get(name, 1)}
        if route == "chat" and name == "logprobs":
            more = {"logprobs": True}
        if name == "top_logprobs":
            more["logprobs"] = True
        if name == "stream_options":
            more = {"stream": True, "stream_options": {"include_usage": True}}
        request, options = read(route, **more)
        assert options.warnings == [], name
        if name not in ("model", "messages", "prompt", "modalities"):
            assert (request, options) != plain, name
    for name in names(WITHOUT_EFFECT, route):
        _, options = read(route, **{name: "x"})
        assert [warning.startswith(f"`{name}` has no effect: ") for warning in options.warnings] == [True], (
            name
        )
    for name in names(REFUSED, route):
        error = refusal(route, **{name: "x"})
        assert (error.http_status, error.param) == (400, name) and f"`{name}`" in error.message


def test_every_field_of_openai_s_sdk_is_in_a_list() -> None:
    """So that a new version of it which sends a new field fails here first."""
    from openai.types import completion_create_params as completions
    from openai.types.chat import completion_create_params as chats

    sdk: dict[Route, Any] = {
        "chat": chats.CompletionCreateParamsStreaming,
        "completions": completions.CompletionCreateParamsStreaming,
    }
    for route, parameters in sdk.items():
        listed = {name for fields in (HONOURED, WITHOUT_EFFECT, REFUSED) for name in names(fields, route)}
        assert set(parameters.__annotations__) - listed == set()


def test_the_readme_has_the_lists() -> None:
    """Line by line as the code has them; what is missing is in the failure."""
    text = README.read_text(encoding="utf-8")
    for fields in (HONOURED, WITHOUT_EFFECT, REFUSED):
        table = "\n".join(row(field) for field in fields)
        assert f"\n{table}\n\n" in text, table


def row(field: Field) -> str:
    where = "" if len(field.routes) > 1 else f" ({next(iter(field.routes))})"
    return f"| {', '.join(f'`{name}`' for name in field.names)}{where} | {field.about} |"


def test_an_effort_sets_both_variables_of_the_template() -> None:
    """None means no thinking; what a caller says of the template itself wins."""

    def arguments(**more: Any) -> Any:
        return json.loads(chat(**more).template_arguments or "{}")

    assert arguments(reasoning_effort="high") == {"reasoning_effort": "high", "enable_thinking": True}
    assert arguments(reasoning_effort="none") == {"reasoning_effort": "none", "enable_thinking": False}
    assert arguments(reasoning_effort=None) == {}
    assert arguments(enable_thinking=False) == {"enable_thinking": False}
    assert arguments(
        reasoning_effort="low", enable_thinking=True, chat_template_kwargs={"enable_thinking": False, "a": 1}
    ) == {"reasoning_effort": "low", "enable_thinking": False, "a": 1}
    assert refusal(reasoning_effort="enormous").param == "reasoning_effort"
    assert refusal(enable_thinking="no").param == "enable_thinking"


def test_the_thinking_budget_has_two_names() -> None:
    """Two different values would make one of them a lie."""
    assert chat(thinking_budget=7).sampling.max_thinking_tokens == 7
    assert chat(max_thinking_tokens=0).sampling.HasField("max_thinking_tokens")
    assert chat(max_thinking_tokens=7, thinking_budget=7).sampling.max_thinking_tokens == 7
    assert refusal(max_thinking_tokens=7, thinking_budget=8).param == "thinking_budget"


@pytest.mark.parametrize("route", ROUTES)
def test_constraints_in_the_words_of_vllm(route: Route) -> None:
    """A schema as an object or as text, a choice as an expression of its texts."""

    def sampling(**more: Any) -> common_pb2.SamplingParams:
        result: common_pb2.SamplingParams = read(route, **more)[0].sampling
        return result

    assert sampling(guided_json={"type": "object"}).json_schema == '{"type":"object"}'
    assert sampling(guided_json='{"type": "object"}').json_schema == '{"type": "object"}'
    assert sampling(structured_outputs={"regex": "[a-z]+"}).regex == "[a-z]+"
    assert sampling(guided_grammar='start: "a"').grammar == 'start: "a"'
    assert sampling(guided_choice=["a.b", "c|d", "é-"]).regex == r"a\.b|c\|d|é\-"
    for more, param in (
        ({"guided_regex": "a", "guided_grammar": "b"}, "guided_grammar"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs.regex"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", 1]}, "guided_choice[1]"),
        ({"structured_outputs": "a"}, "structured_outputs"),
    ):
        assert refusal(route, **more).param == param
    _, options = read(route, structured_outputs={"regex": "(", "surprise": 1})
    assert options.param("sampling.regex") == "structured_outputs.regex"
    assert options.warnings == ["`structured_outputs.surprise` is unknown and has no effect."]


def test_a_choice_of_tools_names_one_that_is_there() -> None:
    """Allowed tools are the only ones that the model sees."""

    def allowed(mode: str, *tools: str) -> dict[str, Any]:
        chosen = [{"type": "function", "function": {"name": name}} for name in tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": chosen}}

    request = chat(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "g"}})
    assert request.tool_choice.function == "g" and len(request.tools) == 2
    request = chat(tools=TOOLS, tool_choice=allowed("required", "g"))
    assert [tool.name for tool in request.tools] == ["g"]
    assert request.tool_choice.mode == inference_pb2.ToolChoice.MODE_REQUIRED
    for choice, param in (
        ({"type": "function", "function": {"name": "h"}}, "tool_choice.function.name"),
        (allowed("auto", "h"), "tool_choice.allowed_tools.tools[0].function.name"),
        (allowed("none", "f"), "tool_choice.allowed_tools.mode"),
        (allowed("auto"), "tool_choice.allowed_tools.tools"),
        ({"type": "allowed_tools"}, "tool_choice.allowed_tools"),
        ({"type": "custom", "custom": {"name": "f"}}, "tool_choice"),
    ):
        assert refusal(tools=TOOLS, tool_choice=choice).param == param
    for tool in ("f", {"type": "custom", "custom": {"name": "f"}}, {"type": "function", "function": "f"}):
        assert (refusal(tools=[tool]).param or "").startswith("tools[0]")
    schemas: list[Any] = ["{", [], 5]
    for schema in schemas:
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        assert refusal(tools=[tool]).param == "tools[0].function.parameters"


def test_a_choice_that_never_says_anything_has_an_empty_text_streamed_too() -> None:
    """As in the whole answer; beside tool calls there is none."""

    def events(*replies: inference_pb2.ChatStreamResponse) -> list[Any]:
        start = inference_pb2.ChatStreamResponse(start=inference_pb2.StreamStart(id="a"))
        raw = b"".join(openai.chat_events([start, *replies, end], openai.Options("demo"), "fp")).decode()
        chunks = [json.loads(line.removeprefix("data: ")) for line in raw.split("\n\n") if line]
        return [chunk["choices"][0]["delta"] for chunk in chunks]

    end = inference_pb2.ChatStreamResponse(end=inference_pb2.StreamEnd())
    finish = inference_pb2.ChatStreamResponse(finish=inference_pb2.StreamFinish())
    thought = inference_pb2.ChatStreamResponse(delta=inference_pb2.ChatDelta(reasoning="hm"))
    called = inference_pb2.ChatDelta(tool_calls=[inference_pb2.ToolCallDelta(name="f")])
    call = inference_pb2.ChatStreamResponse(delta=called)
    text = inference_pb2.ChatStreamResponse(delta=inference_pb2.ChatDelta(text="x"))
    assert events(thought, finish)[-1] == {"content": ""}
    assert events(call, finish)[-1] == {}
    assert events(text, finish)[-1] == {}


def test_a_token_that_cannot_come_has_a_number() -> None:
    """JSON has no infinity."""
    entry = common_pb2.TokenLogprob(text="a", logprob=float("-inf"))
    assert openai.chat_logprobs([entry])["content"][0]["logprob"] == -9999.0
    assert openai.text_logprobs([entry])[0]["token_logprobs"] == [-9999.0]
