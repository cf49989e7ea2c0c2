"""OpenAI's Responses API as messages of the contract, and back."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming

from mlxgui.v1 import inference_pb2
from rest_bridge import responses
from rest_bridge.errors import ApiError, invalid
from rest_bridge.responses import ResponseOptions
from tests.support_events import Event, call, delta, ending, logprob, start

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a":1}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}
JsonObject = dict[str, Any]


def read(**fields: Any) -> tuple[inference_pb2.ChatRequest, ResponseOptions]:
    return responses.response_request({"model": "demo", "input": "hi", **fields})


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(**fields)
    assert caught.value.http_status in (400, 413)
    assert f"`{caught.value.param}`" in caught.value.message
    return caught.value


def events_of(events: list[Event], **fields: Any) -> list[tuple[str, JsonObject]]:
    """The stream's event names and payloads, which agree about the type and are numbered."""
    raw = b"".join(responses.response_stream(events, read(**fields)[1], "test").events)
    return parsed(raw)


def parsed(raw: bytes) -> list[tuple[str, JsonObject]]:
    found = []
    for number, event in enumerate(raw.decode("ascii").removesuffix("\n\n").split("\n\n")):
        name, data = event.split("\n")
        payload = json.loads(data.removeprefix("data: "))
        assert name == f"event: {payload['type']}" and payload["sequence_number"] == number
        found.append((payload["type"], payload))
    return found


def whole(events: list[Event], **fields: Any) -> JsonObject:
    return responses.response_body(events, read(**fields)[1], "test")


def test_a_text_is_a_user_s_message_and_sets_nothing_that_was_not_sent() -> None:
    request, options = read()
    (message,) = request.messages
    assert (message.role, message.content[0].text) == (inference_pb2.ROLE_USER, "hi")
    assert not request.sampling.ListFields() and not options.warnings and not options.stream


def test_fields_reach_the_server() -> None:
    request, options = read(
        instructions="Be brief.", max_output_tokens=7, temperature=0, top_p=0.5, top_k=3, seed=4, stop="x",
        reasoning={"effort": "none"}, tools=[TOOL], tool_choice="required", parallel_tool_calls=False,
        include=["message.output_text.logprobs"], top_logprobs=2, priority=3, stream=True,
        stream_options={"include_obfuscation": False}, text={"format": {"type": "json_object"}},
    )  # fmt: skip
    sampling = request.sampling
    assert [message.role for message in request.messages] == [
        inference_pb2.ROLE_SYSTEM,
        inference_pb2.ROLE_USER,
    ]
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.seed) == (7, 0, 3, 4)
    assert (list(sampling.stop), sampling.top_logprobs, sampling.json_object) == (["x"], 2, True)
    assert json.loads(request.template_arguments) == {"reasoning_effort": "none", "enable_thinking": False}
    assert (
        request.tools[0].name == "f" and json.loads(request.tools[0].parameters_schema) == TOOL["parameters"]
    )
    assert request.tool_choice.mode == inference_pb2.ToolChoice.MODE_REQUIRED
    assert request.parallel_tool_calls is False and request.priority == 3
    assert options.stream and options.logprobs
    assert [warning for warning in options.warnings if "obfuscation" not in warning] == []


def test_a_schema_stands_flat_in_the_format() -> None:
    form = {"type": "json_schema", "name": "n", "strict": True, "schema": {"type": "object"}}
    request, options = read(text={"format": form})
    assert json.loads(request.sampling.json_schema) == {"type": "object"}
    assert options.param("sampling.json_schema") == "text.format"
    assert options.echo["text"]["format"]["name"] == "n"


def test_one_turn_of_the_assistant_is_one_message() -> None:
    """An answer's items come back as they were given, and its calls meet their results."""
    reasoning = {
        "type": "reasoning",
        "id": "r",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "hm"}],
    }
    said = {
        "type": "message", "role": "assistant", "id": "m", "status": "completed",
        "content": [{"type": "output_text", "text": "One moment.", "annotations": [], "logprobs": []}],
    }  # fmt: skip
    parts = [{"type": "input_text", "text": "look"}, {"type": "input_image", "image_url": "https://x/y.png"}]
    request, options = read(
        input=[
            {"role": "user", "content": "Weather?"},
            reasoning,
            said,
            CALL,
            RESULT,
            {"role": "user", "content": parts},
        ]
    )
    user, turn, result, last = request.messages
    assert user.content[0].text == "Weather?"
    assert (turn.role, turn.reasoning, turn.content[0].text) == (
        inference_pb2.ROLE_ASSISTANT,
        "hm",
        "One moment.",
    )
    assert (turn.tool_calls[0].id, turn.tool_calls[0].arguments) == ("c1", '{"a":1}')
    assert (result.role, result.tool_call_id, result.content[0].text) == (
        inference_pb2.ROLE_TOOL,
        "c1",
        "sunny",
    )
    assert last.content[1].image.url == "https://x/y.png"
    assert options.warnings == []


def test_messages_of_the_assistant_stay_apart_unless_a_call_is_between() -> None:
    said = {"role": "assistant", "content": "a"}
    assert len(read(input=[said, said])[0].messages) == 2
    assert len(read(input=[said, CALL, said])[0].messages) == 1
    assert len(read(input=[CALL, RESULT, CALL, RESULT])[0].messages) == 4


def test_errors_name_the_caller_s_items() -> None:
    """One item more or less on the way makes no difference."""
    parts = [{"type": "input_text", "text": "look"}, {"type": "input_image", "image_url": "https://x/y.png"}]
    items = [{"role": "user", "content": "a"}, CALL, CALL, RESULT, {"role": "user", "content": parts}]
    _, options = read(
        instructions="x", input=items, tools=[TOOL], tool_choice={"type": "function", "name": "f"}
    )
    assert options.param("messages[0].content[0]") == "instructions"
    assert options.param("request.messages[4].content[1].image.url") == "input[4].content[1].image_url"
    error = invalid("messages[4].content[1] is no image", "messages[4].content[1]")
    options.rename(error)
    assert (error.message, error.param) == ("input[4].content[1] is no image", "input[4].content[1]")


def with_part(part: JsonObject) -> JsonObject:
    return {"input": [{"role": "user", "content": [part]}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "some"}, "truncation"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": []}]}, "input[0].content"),
        (with_part({"type": "input_file"}), "input[0].content[0].type"),
        (with_part({"type": "input_image", "file_id": "f"}), "input[0].content[0].file_id"),
        (with_part({"type": "input_image", "image_url": "ftp://x"}), "input[0].content[0].image_url"),
        (with_part({"type": "input_image"}), "input[0].content[0].image_url"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name"),
        ({"tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"stream_options": {}}, "stream_options"),
        ({"max_output_tokens": "5"}, "max_output_tokens"),
        ({"max_output_tokens": 5, "max_tokens": 6}, "max_tokens"),
        ({"metadata": {"a": float("nan")}}, "metadata"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(fields: JsonObject, param: str) -> None:
    assert refusal(**fields).param == param


def test_what_has_no_effect_is_reported() -> None:
    _, options = read(
        store=True, user="u", metadata={"a": "b"}, truncation="auto", surprise=1, text={"verbosity": "low"},
        reasoning={"summary": "auto"}, include=["reasoning.encrypted_content"], previous_response_id=None,
    )  # fmt: skip
    words = " ".join(options.warnings)
    names = ("store", "user", "metadata", "truncation", "surprise", "verbosity", "summary", "include")
    assert all(f"`{name}`" in words for name in names) and len(options.warnings) == len(names)
    assert read(store=False, truncation="disabled", background=False)[1].warnings == []


@pytest.mark.parametrize("name", ResponseCreateParamsStreaming.__annotations__)
def test_no_field_of_the_sdk_is_unknown(name: str) -> None:
    """It is honoured, without effect for a reason, or refused by name."""
    try:
        _, options = read(**{name: {"x": 1}})
    except ApiError as error:
        assert error.param is not None and error.param.startswith(name)
    else:
        assert f"`{name}` is unknown" not in " ".join(options.warnings)


def test_allowed_tools_are_all_that_the_model_sees() -> None:
    tools = [TOOL | {"name": name} for name in "abc"]
    allowed = [{"type": "function", "name": name} for name in "bc"]
    request, options = read(
        tools=tools, tool_choice={"type": "allowed_tools", "mode": "required", "tools": allowed}
    )
    assert [tool.name for tool in request.tools] == ["b", "c"]
    assert options.param("tools[0].name") == "tools[1].name"
    assert len(options.echo["tools"]) == 3


MIXED = [
    start(),
    delta(reasoning="h"),
    delta(reasoning="m"),
    delta(text="Hel", logprobs=[logprob("Hel")]),
    delta(text="lo", logprobs=[logprob("lo")]),
    call(0, name="f"),
    call(0, '{"a"'),
    call(0, ": 1}"),
    call(1, "{}", name="g"),
    *ending("tool_calls"),
]


def test_the_events_of_a_stream_come_in_openai_s_order() -> None:
    names = [name.removeprefix("response.") for name, _ in events_of(MIXED)]

    def item(kind: str, delta_count: int, *, has_part: bool = True) -> list[str]:
        events = [f"{kind}.delta"] * delta_count + [f"{kind}.done"]
        if has_part:
            events = ["content_part.added", *events, "content_part.done"]
        return ["output_item.added", *events, "output_item.done"]

    assert names == [
        *("created", "in_progress"),
        *item("reasoning_text", 2),
        *item("output_text", 2),
        *item("function_call_arguments", 2, has_part=False),
        *item("function_call_arguments", 1, has_part=False),
        "completed",
    ]


def test_the_last_event_is_the_whole_answer() -> None:
    events = events_of(MIXED)
    assert events[-1][1]["response"] == whole(MIXED)
    assert [payload["item"] for name, payload in events if name.endswith("item.done")] == whole(MIXED)[
        "output"
    ]


def test_a_whole_answer() -> None:
    body = whole(MIXED)
    assert [item["type"] for item in body["output"]] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    assert len({item["id"] for item in body["output"]}) == 4 and body["id"] == "resp_abc"
    assert {item["status"] for item in body["output"]} == {"completed"}
    (text,) = body["output"][1]["content"]
    assert (text["text"], [entry["token"] for entry in text["logprobs"]]) == ("Hello", ["Hel", "lo"])
    assert text["logprobs"][0]["top_logprobs"] == [{"token": "x", "logprob": -2.0, "bytes": [120]}]
    assert body["usage"]["input_tokens_details"]["cached_tokens"] == 4
    assert body["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}
    assert (body["status"], body["created_at"], body["completed_at"]) == (
        "completed",
        1_700_000_000,
        1_700_000_003,
    )


def test_an_answer_that_was_cut_says_where() -> None:
    events = [start(), delta(reasoning="hm"), delta(text="Hel"), *ending("length")]
    body = whole(events)
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [item["status"] for item in body["output"]] == ["completed", "incomplete"]
    assert events_of(events)[-1][0] == "response.incomplete"


def test_an_answer_of_nothing_is_an_empty_text() -> None:
    (item,) = whole([start(), *ending()])["output"]
    assert item["content"][0]["text"] == ""


def test_text_after_a_call_is_an_item_of_its_own() -> None:
    events = [start(), delta(text="a"), call(0, "{}", name="f"), delta(text="b"), *ending("tool_calls")]
    assert [item["type"] for item in whole(events)["output"]] == ["message", "function_call", "message"]


def test_log_probabilities_without_text_go_to_the_text_or_nowhere() -> None:
    """Those of tokens that only open or close reasoning or a call are not the text's."""
    events = [
        start(), delta(logprobs=[logprob("<think>")]), delta(reasoning="hm", logprobs=[logprob("hm")]),
        delta(logprobs=[logprob("a")]), delta(text="ab", logprobs=[logprob("b")]), delta(logprobs=[logprob("c")]),
        call(0, "{}", name="f"), delta(logprobs=[logprob("</call>")]), *ending("tool_calls"),
    ]  # fmt: skip
    (text,) = whole(events)["output"][1]["content"]
    assert [entry["token"] for entry in text["logprobs"]] == ["a", "b", "c"]
    deltas = [payload for name, payload in events_of(events) if name == "response.output_text.delta"]
    assert [entry["token"] for payload in deltas for entry in payload["logprobs"]] == ["a", "b", "c"]


def test_a_failure_in_the_middle_ends_the_stream_with_what_there_was() -> None:
    def broken() -> Iterator[Event]:
        yield from [start(), delta(text="Hel")]
        raise ApiError("ENGINE_DEAD", "The worker ended.")

    stream = responses.response_stream(broken(), read()[1], "test")
    raw = b""
    with pytest.raises(ApiError) as caught:
        for chunk in stream.events:
            raw += chunk
    *_, (name, error), (last, payload) = parsed(raw + stream.failure(caught.value) + stream.end)
    assert (name, error["code"], error["message"]) == ("error", "engine_dead", "The worker ended.")
    assert (last, payload["response"]["status"]) == ("response.failed", "failed")
    (item,) = payload["response"]["output"]
    assert (item["status"], item["content"][0]["text"]) == ("incomplete", "Hel")


def test_warnings_are_at_both_ends_of_a_stream() -> None:
    events = [start("early"), delta(text="a"), *ending("stop", None, "late")]
    stream = events_of(events, store=True)
    first, last = stream[0][1]["response"]["warnings"], stream[-1][1]["response"]["warnings"]
    assert (len(first), first[1]) == (2, "early") and last == [*first, "late"]
    assert whole(events, store=True)["warnings"] == last
