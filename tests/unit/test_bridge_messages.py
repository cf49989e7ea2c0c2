"""Anthropic's Messages API as messages of the contract, and back."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from anthropic.types.beta import message_create_params as beta
from anthropic.types.message_create_params import MessageCreateParamsStreaming

from mlxgui.v1 import inference_pb2
from rest_bridge import messages
from rest_bridge.errors import BY_REASON, ApiError, invalid
from rest_bridge.messages.requests import MessageOptions
from tests.support_events import USAGE, Event, call, delta, ending, start

TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object"}}
FORMAT = {"type": "json_schema", "schema": {"type": "object"}}
PNG = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
JsonObject = dict[str, Any]


def user(content: Any) -> JsonObject:
    return {"role": "user", "content": content}


def read(**fields: Any) -> tuple[inference_pb2.ChatRequest, MessageOptions]:
    body = {"model": "demo", "max_tokens": 7, "messages": [user("hi")], **fields}
    return messages.message_request(body)


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(**fields)
    assert caught.value.http_status in (400, 413)
    assert f"`{caught.value.param}`" in caught.value.message
    return caught.value


def events_of(events: list[Event], **fields: Any) -> list[JsonObject]:
    """The stream's payloads; each event is called by its type."""
    return parsed(b"".join(messages.message_stream(events, read(**fields)[1], "test").events))


def parsed(raw: bytes) -> list[JsonObject]:
    found = []
    for event in raw.decode("ascii").removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        payload = json.loads(data.removeprefix("data: "))
        assert name == f"event: {payload['type']}"
        found.append(payload)
    return found


def whole(events: list[Event], **fields: Any) -> JsonObject:
    return messages.message_body(events, read(**fields)[1], "test")


def test_fields_reach_the_server() -> None:
    request, options = read(
        system="Be brief.", stop_sequences=["x", "y"], temperature=0, top_k=3, top_p=0.5, stream=True,
        thinking={"type": "enabled", "budget_tokens": 1024}, tools=[TOOL | {"strict": True}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True}, keep_alive="5m",
    )  # fmt: skip
    sampling = request.sampling
    assert [message.role for message in request.messages] == [
        inference_pb2.ROLE_SYSTEM,
        inference_pb2.ROLE_USER,
    ]
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k) == (7, 0, 3)
    assert (list(sampling.stop), sampling.max_thinking_tokens) == (["x", "y"], 1024)
    assert json.loads(request.template_arguments) == {"enable_thinking": True}
    (tool,) = request.tools
    assert (tool.name, tool.description, tool.strict) == ("f", "d", True)
    assert json.loads(tool.parameters_schema) == {"type": "object"}
    assert request.tool_choice.mode == inference_pb2.ToolChoice.MODE_REQUIRED
    assert request.parallel_tool_calls is False and options.stream and options.warnings == []


def test_thinking_is_the_template_s_when_nothing_is_said() -> None:
    assert read()[0].template_arguments == ""
    disabled = read(thinking={"type": "disabled"}, output_config={"effort": "low"})[0].template_arguments
    assert json.loads(disabled) == {"reasoning_effort": "low", "enable_thinking": False}


def test_a_tool_can_be_named_and_a_format_asked_for() -> None:
    for form in ({"output_config": {"format": FORMAT}}, {"output_format": FORMAT}):
        request, options = read(tools=[TOOL], tool_choice={"type": "tool", "name": "f"}, **form)
        assert request.tool_choice.function == "f" and options.warnings == []
        assert json.loads(request.sampling.json_schema) == {"type": "object"}


@pytest.mark.parametrize("kind", ["create", "continue"])
def test_a_stored_conversation_is_refused_as_the_sdk_understands_it(kind: str) -> None:
    """It sends the whole conversation then; without the refusal a next turn would have its last message only."""
    error = refusal(thread={"type": kind, "previous_message_id": "msg_1"})
    body = messages.error_body(error)["error"]
    details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"], "param": "thread"}
    assert (error.http_status, body["type"], body["details"]) == (400, "invalid_request_error", details)
    assert read(thread=None)[1].warnings == []


def test_a_conversation_with_tools_and_images() -> None:
    """Results of tools are messages of their own, turns of one role are one."""
    seen = [{"type": "text", "text": "sunny"}, {"type": "image", "source": PNG}]
    request, options = read(
        system=[{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}],
        messages=[
            user("Weather?"),
            user([{"type": "image", "source": PNG}, {"type": "image", "source": {"type": "url", "url": "https://x/y"}}]),
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "text", "text": "One moment."},
                    {"type": "tool_use", "id": "t1", "name": "f", "input": {"b": 1, "a": 2}},
                    {"type": "tool_use", "id": "t2", "name": "f", "input": {}},
                ],
            },
            user([
                {"type": "tool_result", "tool_use_id": "t1", "content": seen},
                {"type": "tool_result", "tool_use_id": "t2", "content": "no", "is_error": True},
                {"type": "text", "text": "Go on."},
            ]),
        ],
    )  # fmt: skip
    roles = [inference_pb2.Role.Name(message.role).removeprefix("ROLE_") for message in request.messages]
    assert roles == ["SYSTEM", "USER", "ASSISTANT", "TOOL", "TOOL", "USER"]
    system, asked, turn, first, second, last = request.messages
    assert [part.text for part in system.content] == ["a", "b"]
    assert (asked.content[0].text, asked.content[1].image.data) == ("Weather?", b"\0\0\0")
    assert asked.content[2].image.url == "https://x/y"
    assert (turn.reasoning, turn.content[0].text) == ("hm", "One moment.")
    assert [(use.id, use.arguments) for use in turn.tool_calls] == [("t1", '{"b":1,"a":2}'), ("t2", "{}")]
    assert (first.tool_call_id, first.content[1].image.media_type) == ("t1", "image/png")
    assert [part.text for part in second.content] == ["Error:", "no"]
    assert last.content[0].text == "Go on."
    assert options.warnings == ["`cache_control` has no effect: prompts are matched by content."]
    for path, name in (
        ("messages[1].content[2].image.url", "messages[1].content[1].source.url"),
        ("messages[3].content[1]", "messages[3].content[0].content[1]"),
        ("messages[4].tool_call_id", "messages[3].content[1].tool_use_id"),
        ("messages[5].content[0]", "messages[3].content[2]"),
    ):
        assert options.param(path) == name
        error = invalid(f"{path} is wrong", path)
        options.rename(error)
        assert error.message == f"{name} is wrong"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [user([])]}, "messages[0].content"),
        ({"messages": [user("x"), {"role": "assistant", "content": "The"}]}, "messages[1]"),
        ({"system": 5}, "system"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "maybe"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "often"}}, "thinking.type"),
        ({"stop_sequences": [5]}, "stop_sequences[0]"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"compaction": {"type": "summarize"}}, "compaction"),
        ({"output_format": {"type": "xml"}}, "output_format.type"),
        ({"output_format": FORMAT, "output_config": {"format": FORMAT}}, "output_format"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(fields: JsonObject, param: str) -> None:
    assert refusal(**fields).param == param


DOCUMENT = {"type": "document"}


@pytest.mark.parametrize(
    ("role", "block", "param"),
    [
        ("user", DOCUMENT, "type"),
        ("user", {"type": "text"}, "text"),
        ("user", {"type": "tool_use"}, "type"),
        ("user", {"type": "image"}, "source"),
        ("user", {"type": "image", "source": {"type": "file"}}, "source.type"),
        ("user", {"type": "image", "source": PNG | {"media_type": "image/svg+xml"}}, "source.media_type"),
        ("user", {"type": "image", "source": PNG | {"data": "!"}}, "source.data"),
        ("user", {"type": "tool_result"}, "tool_use_id"),
        ("user", {"type": "tool_result", "tool_use_id": "t", "content": [DOCUMENT]}, "content[0].type"),
        ("assistant", {"type": "server_tool_use"}, "type"),
        ("assistant", {"type": "tool_use", "id": "t"}, "name"),
        ("assistant", {"type": "tool_use", "id": "t", "name": "f", "input": "{}"}, "input"),
    ],
)
def test_a_wrong_block_is_named(role: str, block: JsonObject, param: str) -> None:
    error = refusal(messages=[{"role": role, "content": [block]}])
    assert error.param == f"messages[0].content[0].{param}"


def test_what_has_no_effect_is_reported_once() -> None:
    cached = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    _, options = read(
        metadata={"user_id": "u"}, service_tier="auto", surprise=1, mcp_servers=[],
        messages=[user([cached, cached | {"odd": 1}])],
    )  # fmt: skip
    assert [warning.split("`")[1] for warning in options.warnings] == [
        "metadata", "service_tier", "surprise", "cache_control", "messages[0].content[1].odd",
    ]  # fmt: skip


# The SDK sends `betas` as a header.
BETA_FIELDS = set(beta.MessageCreateParamsStreaming.__annotations__) - {"betas"}


@pytest.mark.parametrize("name", sorted({*MessageCreateParamsStreaming.__annotations__, *BETA_FIELDS}))
def test_no_field_of_the_sdk_is_unknown(name: str) -> None:
    """It is honoured, without effect for a reason, or refused by name."""
    try:
        _, options = read(**{name: {"x": 1}})
    except ApiError as error:
        assert error.param is not None and error.param.startswith(name)
    else:
        assert f"`{name}` is unknown" not in " ".join(options.warnings)


def test_a_count_takes_the_body_of_a_message() -> None:
    body = {"model": "demo", "messages": [user("hi")], "system": "s", "tools": [TOOL], "max_tokens": 5}
    body["compaction"] = {"type": "summarize"}
    request, options = messages.token_count_request(body)
    assert (request.model, len(request.chat.messages), len(request.chat.tools)) == ("demo", 2, 1)
    assert options.warnings == []
    answer = inference_pb2.CountTokensResponse(token_count=9)
    assert messages.token_count_body(answer, options) == {"input_tokens": 9}
    answer.warnings.append("images were left out")
    options.warnings.append("`surprise` is unknown and has no effect.")
    assert messages.token_count_body(answer, options)["warnings"] == [*options.warnings, *answer.warnings]


MIXED = [
    start(),
    delta(reasoning="h"),
    delta(reasoning="m"),
    delta(text="Hel"),
    delta(text="lo"),
    call(0, name="f"),
    call(0, '{"a"'),
    call(0, ": 1}"),
    call(1, name="g"),
    *ending("tool_calls"),
]


def test_a_whole_message() -> None:
    assert whole(MIXED) == {
        "id": "msg_abc",
        "type": "message",
        "role": "assistant",
        "model": "demo",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "text", "text": "Hello"},
            {"type": "tool_use", "id": "call_0", "name": "f", "input": {"a": 1}},
            {"type": "tool_use", "id": "call_1", "name": "g", "input": {}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 8,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 4,
            "output_tokens": 7,
            "output_tokens_details": {"thinking_tokens": 2},
        },
    }


def test_the_blocks_of_a_stream_come_one_after_the_other() -> None:
    names = [event["type"] for event in events_of(MIXED)]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    two = [block[0], block[1], *block[1:]]
    assert names == ["message_start", *two, *two, *block, *block, "message_delta", "message_stop"]
    starts = [event for event in events_of(MIXED) if event["type"] == "content_block_start"]
    assert [event["index"] for event in starts] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "arguments",
    [
        '{"a": ', "[1]", "5", '"x"', "nonsense", '{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud800"}',
        '{"a": 1, "a": 2}', '{"a":' + "[" * 200 + "]" * 200 + "}",
    ],
)  # fmt: skip
def test_arguments_that_are_no_object_are_given_as_they_were_written(arguments: str) -> None:
    """An empty input would be a call that the model has not made."""
    events = [start(), call(0, arguments, name="f"), *ending("tool_calls")]
    (block,) = whole(events)["content"]
    assert block["input"] == {"INVALID_JSON": arguments}
    (piece,) = (event["delta"] for event in events_of(events) if event["type"] == "content_block_delta")
    assert json.loads(piece["partial_json"]) == {"INVALID_JSON": arguments}


@pytest.mark.parametrize(
    ("reason", "stop", "max_tokens", "expected"),
    [
        ("stop", None, 100, "end_turn"),
        ("stop", "x", 100, "stop_sequence"),
        ("tool_calls", None, 100, "tool_use"),
        ("length", None, USAGE.completion_token_count, "max_tokens"),
        ("length", None, 100, "model_context_window_exceeded"),
    ],
)
def test_why_a_message_ended(reason: str, stop: str | None, max_tokens: int, expected: str) -> None:
    events = [start(), delta(text="a"), *ending(reason, stop)]
    body = whole(events, max_tokens=max_tokens)
    assert (body["stop_reason"], body["stop_sequence"]) == (expected, stop)
    last = events_of(events, max_tokens=max_tokens)[-2]
    assert last["delta"] == {"stop_reason": expected, "stop_sequence": stop}
    assert last["usage"] == body["usage"]


def test_an_answer_of_nothing_is_an_empty_text() -> None:
    assert whole([start(), *ending()])["content"] == [{"type": "text", "text": ""}]


def test_a_failure_in_the_middle_is_the_last_event() -> None:
    def broken() -> Iterator[Event]:
        yield from [start(), delta(text="Hel")]
        raise ApiError("QUEUE_FULL", "Too much.")

    stream = messages.message_stream(broken(), read()[1], "test")
    raw = b""
    with pytest.raises(ApiError) as caught:
        for chunk in stream.events:
            raw += chunk
    last = parsed(raw + stream.failure(caught.value) + stream.end)[-1]
    assert last["type"] == "error"
    assert (last["error"]["type"], last["error"]["message"]) == ("rate_limit_error", "Too much.")


def test_a_part_of_a_call_that_is_over_is_a_fault() -> None:
    """Blocks do not open again; what would be lost is an error instead."""
    events = [start(), call(0, "{", name="f"), delta(text="a"), call(0, "}"), *ending("tool_calls")]
    with pytest.raises(ApiError) as caught:
        whole(events)
    assert caught.value.reason == "INTERNAL"


@pytest.mark.parametrize("reason", BY_REASON)
def test_every_error_has_a_type_of_anthropic_s(reason: str) -> None:
    error = ApiError(reason, "What happened.", "messages[0]")
    body = messages.error_body(error)
    assert body["type"] == "error" and body["error"]["message"] == "What happened."
    more = {"unsupported": ["thread"]} if reason == "THREAD_UNSUPPORTED_REQUEST" else {}
    assert body["error"]["details"] == {"error_code": reason.lower(), "param": "messages[0]", **more}
    kinds = {
        400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
        404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
        503: "overloaded_error", 504: "timeout_error",
    }  # fmt: skip
    status = error.http_status
    assert body["error"]["type"] == kinds.get(
        status, "api_error" if status >= 499 else "invalid_request_error"
    )
