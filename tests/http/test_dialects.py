"""Responses and Messages over HTTP: the grammar of their streams, their errors, and their warnings."""

from typing import Any

import grpc
import pytest

from mlxgui.v1 import model_pb2, model_pb2_grpc
from tests.conftest import RestSession, TinyModels
from tests.support_http import (
    CAPITAL,
    END_BIAS,
    PARIS,
    EventReader,
    JsonObject,
    anthropic_error,
    installed_directory,
    openai_error,
    parse_named_events,
)

RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"


def response_body(**fields: Any) -> JsonObject:
    return {"model": "demo", "input": CAPITAL, **fields}


def message_body(**fields: Any) -> JsonObject:
    return {
        "model": "demo",
        "max_tokens": 100,
        "messages": [{"role": "user", "content": CAPITAL}],
        **fields,
    }


def test_a_stream_s_events_are_named_and_nothing_comes_after_the_last(http: RestSession) -> None:
    """Neither dialect has a [DONE]."""
    for path, body, first, last in (
        (RESPONSES, response_body(stream=True), "response.created", "response.completed"),
        (MESSAGES, message_body(stream=True), "message_start", "message_stop"),
    ):
        response = http.post(path, json=body)
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["X-Accel-Buffering"] == "no"
        events = parse_named_events(response.content)
        assert (events[0]["type"], events[-1]["type"]) == (first, last)
        deltas = [event["delta"] for event in events if event["type"].endswith("_text.delta")]
        deltas += [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
        assert "".join(deltas) == PARIS


def test_what_has_no_effect_is_in_the_answer_and_in_a_header(http: RestSession) -> None:
    for path, body in ((RESPONSES, response_body()), (MESSAGES, message_body()), (COUNT, message_body())):
        answer = http.post(path, json={**body, "metadata": {"a": "b"}, "surprise": 1})
        assert answer.status_code == 200, answer.text
        told = answer.json()["warnings"]
        assert [warning.split("`")[1] for warning in told] == ["metadata", "surprise"]
        assert answer.headers["X-MLXGUI-Warnings"] == " ".join(told)


def test_what_a_count_leaves_out_is_told_too(http: RestSession) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    words = {"type": "text", "text": CAPITAL}
    plain = http.post(COUNT, json=message_body()).json()
    answer = http.post(COUNT, json=message_body(messages=[{"role": "user", "content": [image, words]}]))
    warnings = answer.json().pop("warnings")
    assert warnings == ["images were left out: 'demo' is a text model"]
    assert answer.headers["X-MLXGUI-Warnings"] == warnings[0]
    assert answer.json()["input_tokens"] == plain["input_tokens"]


@pytest.mark.parametrize("path", [MESSAGES, COUNT])
def test_errors_of_messages_are_in_anthropic_s_form(http: RestSession, path: str) -> None:
    for raw, status, kind in (
        (b"", 400, "invalid_request_error"),
        (b"{", 400, "invalid_request_error"),
        (b'{"model": "demo", "max_tokens": 5, "messages": [5]}', 400, "invalid_request_error"),
        (
            b'{"model": "missing", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}',
            404,
            "not_found_error",
        ),
        (b" " * (64 * 1024 * 1024 + 1), 413, "request_too_large"),
    ):
        assert anthropic_error(http.post(path, data=raw), status)["type"] == kind
    refused = http.post(path, json=message_body(), headers={"Origin": "https://evil.example"})
    assert anthropic_error(refused, 403)["type"] == "permission_error"


def test_a_failure_before_the_first_event_is_an_honest_status(http: RestSession) -> None:
    """And names the caller's field."""
    limits: list[tuple[str, int]] = [("temperature", 5), ("max_output_tokens", 0)]
    for name, value in limits:
        answer = http.post(RESPONSES, json=response_body(stream=True, **{name: value}))
        assert openai_error(answer, 400)["param"] == name
    parts: list[JsonObject] = [{"type": "text", "text": "x"}] * 300
    refused: list[tuple[JsonObject, str]] = [
        ({"temperature": 5}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"system": "s", "messages": [{"role": "user", "content": parts}]}, "messages[0].content"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
    ]
    for fields, param in refused:
        error = anthropic_error(http.post(MESSAGES, json=message_body(stream=True, **fields)), 400)
        assert error["details"]["param"] == param and param in error["message"]


UNKNOWN: JsonObject = {"not": {}}
LONG_LINK = "http://a.example/" + "x" * 8192


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": [{"type": "function_call_output", "call_id": "zz", "output": "x"}]}, "input[0].call_id"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": LONG_LINK}]}]},
            "input[0].content[0].image_url",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"a":"\\ud800"}'}]},
            "input[0].arguments",
        ),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": UNKNOWN}}}, "text.format"),
        (
            {
                "tools": [{"type": "function", "name": name, "parameters": UNKNOWN, "strict": True} for name in "ab"],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "required",
                    "tools": [{"type": "function", "name": "b"}],
                },
            },
            "tools[1].parameters",
        ),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "zz", "content": "x"}
            ]}]},
            "messages[0].content[0].tool_use_id",
        ),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "text", "text": "x"},
                {"type": "image", "source": {"type": "url", "url": LONG_LINK}},
            ]}]},
            "messages[0].content[1].source.url",
        ),
        ({"tools": [{"name": "f", "input_schema": UNKNOWN, "strict": True}]}, "tools[0].input_schema"),
        ({"output_config": {"format": {"type": "json_schema", "schema": UNKNOWN}}}, "output_config.format"),
        ({"output_format": {"type": "json_schema", "schema": UNKNOWN}}, "output_format"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_the_model_server_refuses_has_the_caller_s_name(
    http: RestSession, fields: JsonObject, param: str
) -> None:
    """In `param` and in the sentence, which has no word of the contract."""
    if {"input", "text", "tool_choice"} & set(fields):
        answer = http.post(RESPONSES, json=response_body(**fields))
        error = openai_error(answer, answer.status_code)
        said = error["param"]
    else:
        answer = http.post(MESSAGES, json=message_body(**fields))
        error = anthropic_error(answer, answer.status_code)
        said = error["details"]["param"]
    assert (said, answer.status_code) == (param, 413 if "url" in param else 400)
    assert param in error["message"]
    for word in ("tool_call_id", "parameters_schema", "sampling", "image.url", "json_schema"):
        assert word not in error["message"]


def test_a_failure_in_the_middle_ends_each_stream_in_its_own_way(
    http: RestSession, unix_channel: grpc.Channel, tiny_models: TinyModels
) -> None:
    """The model is taken away while it answers two clients."""
    endless = {"model": "dialects-taken", "stream": True, "logit_bias": END_BIAS}
    with installed_directory(unix_channel, tiny_models.long, "dialects-taken"):
        response = EventReader(http.base_url, RESPONSES, response_body(max_output_tokens=16_384, **endless))
        message = EventReader(http.base_url, MESSAGES, message_body(**{**endless, "max_tokens": 16_384}))
        for reader in (response, message):
            assert reader.open().status == 200
        unload = model_pb2.UnloadModelRequest(name="dialects-taken", force=True)
        model_pb2_grpc.ModelServiceStub(unix_channel).UnloadModel(unload)
        lines = response.read_rest()
        assert [line for line in lines if line.startswith(b"event")][-2:] == [
            b"event: error",
            b"event: response.failed",
        ]
        assert b'"status":"failed"' in lines[-1] and b"unloaded" in lines[-1]
        lines = message.read_rest()
        assert lines[-2] == b"event: error" and b'"type":"error"' in lines[-1] and b"unloaded" in lines[-1]
        for reader in (response, message):
            reader.close()
