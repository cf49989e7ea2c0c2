"""Errors of the model server speak of the caller's own fields, whichever dialect that is."""

from collections.abc import Callable
from typing import Any

import pytest

from rest_bridge import messages, openai, responses
from rest_bridge.errors import invalid
from rest_bridge.openai import Options

PNG = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
LINK = "https://a.example/a.png"
USER = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object"}
CHOICE = {"tools": ["a", "b", "c"], "allowed": ["b", "c"]}


def chat() -> Options:
    """The second and third of three tools are allowed."""

    def tool(name: str) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "parameters": SCHEMA}}

    call = {"id": "c1", "type": "function", "function": {"name": "a", "arguments": "{}"}}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    body = {
        "messages": [
            USER,
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "x"}, image]},
        ],
        "tools": [tool(name) for name in CHOICE["tools"]],
        "tool_choice": {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto", "tools": [tool(name) for name in CHOICE["allowed"]]},
        },
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
        "max_completion_tokens": 5,
        "thinking_budget": 5,
    }
    return openai.chat_request(body)[1]


def guided() -> Options:
    return openai.completion_request({"prompt": "x", "guided_regex": "a", "logprobs": 1})[1]


def response() -> Options:
    seen = {"type": "input_image", "image_url": LINK}
    body = {
        "instructions": "s",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, seen]},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "function_call", "call_id": "c1", "name": "a", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "a", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": [seen]},
        ],
        "tools": [{"type": "function", "name": name, "parameters": SCHEMA} for name in CHOICE["tools"]],
        "tool_choice": {
            "type": "allowed_tools",
            "mode": "auto",
            "tools": [{"type": "function", "name": name} for name in CHOICE["allowed"]],
        },
        "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
    }
    return responses.response_request(body)[1]


def message(**fields: Any) -> Options:
    body = {
        "max_tokens": 5,
        "system": "s",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "source": PNG}]},
            {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": LINK}}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "a"},
                    {"type": "tool_use", "id": "c1", "name": "a", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "a"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "c1",
                        "content": [
                            {"type": "image", "source": {"type": "url", "url": "data:image/png;base64,AAAA"}}
                        ],
                    },
                ],
            },
        ],
        "tools": [{"name": "a", "input_schema": SCHEMA}],
        **fields,
    }
    return messages.message_request(body)[1]


def older_message() -> Options:
    return message(output_format={"type": "json_schema", "schema": SCHEMA})


@pytest.mark.parametrize(
    ("read", "path", "name"),
    [
        (chat, "messages[2].content[1].image.data", "messages[2].content[1].image_url.url"),
        (chat, "messages[2].tool_call_id", "messages[2].tool_call_id"),
        (chat, "messages[1].tool_calls[0].arguments", "messages[1].tool_calls[0].function.arguments"),
        (chat, "tools[0].name", "tools[1].function.name"),
        (chat, "tools[1].parameters_schema", "tools[2].function.parameters"),
        (chat, "sampling.json_schema", "response_format"),
        (chat, "request.sampling.max_tokens", "max_completion_tokens"),
        (chat, "sampling.max_thinking_tokens", "thinking_budget"),
        (chat, "sampling.temperature", "temperature"),
        (guided, "sampling.regex", "guided_regex"),
        (guided, "sampling.top_logprobs", "logprobs"),
        (guided, "prompts[0]", "prompt"),
        (response, "messages", "input"),
        (response, "messages[0].content[0]", "instructions"),
        (response, "messages[1].content[1].image.url", "input[0].content[1].image_url"),
        (response, "messages[2].tool_calls[0].arguments", "input[2].arguments"),
        (response, "messages[2].tool_calls[1].arguments", "input[3].arguments"),
        (response, "messages[3].tool_call_id", "input[4].call_id"),
        (response, "messages[3].content[0].image.url", "input[4].output[0].image_url"),
        (response, "messages[3].content", "input[4].output"),
        (response, "tools[0].parameters_schema", "tools[1].parameters"),
        (response, "sampling.json_schema", "text.format"),
        (response, "sampling.max_tokens", "max_output_tokens"),
        (message, "messages[0].content", "system"),
        (message, "messages[1].content[1].image.data", "messages[0].content[1].source.data"),
        (message, "messages[1].content[2].image.url", "messages[1].content[0].source.url"),
        (message, "messages[1].content[2]", "messages[1].content[0]"),
        (message, "messages[2].tool_calls[0].arguments", "messages[2].content[1].input"),
        (message, "messages[4].tool_call_id", "messages[3].content[1].tool_use_id"),
        (message, "messages[4].content[0].image.data", "messages[3].content[1].content[0].source.url"),
        (message, "messages[4].content", "messages[3].content[1].content"),
        (message, "tools[0].parameters_schema", "tools[0].input_schema"),
        (message, "sampling.stop", "stop_sequences"),
        (message, "sampling.json_schema", "output_config.format"),
        (message, "sampling.max_thinking_tokens", "thinking.budget_tokens"),
        (older_message, "sampling.json_schema", "output_format"),
    ],
)  # fmt: skip
def test_an_error_names_the_caller_s_field(read: Callable[[], Options], path: str, name: str) -> None:
    """In `param` and in its sentence, which has the path whole or without what it is in."""
    options = read()
    for said in (path, path.removeprefix("request."), path.rpartition("sampling.")[2]):
        error = invalid(f"{said}: 'x' is wrong, so {said} is", path)
        options.rename(error)
        assert (error.param, error.message) == (name, f"{name}: 'x' is wrong, so {name} is")


def test_a_warning_names_the_caller_s_field() -> None:
    """Behind those of the request itself."""
    for options, path, name in (
        (chat(), "messages[2].content[1]", "messages[2].content[1]"),
        (response(), "messages[1].content[1]", "input[0].content[1]"),
        (message(), "messages[1].content[2]", "messages[1].content[0]"),
    ):
        options.warnings = ["`x` has no effect."]
        told = options.told([f"the image in {path} was made smaller", "images were left out"])
        assert told == ["`x` has no effect.", f"the image in {name} was made smaller", "images were left out"]


def test_only_the_field_is_renamed() -> None:
    """A word of which it is a part, or that is a part of it, stays."""
    options = response()
    error = invalid("max_tokens is less than max_tokens_of and no.max_tokens", "sampling.max_tokens")
    options.rename(error)
    assert error.message == "max_output_tokens is less than max_tokens_of and no.max_tokens"
    unknown = invalid("It failed.", None)
    options.rename(unknown)
    assert (unknown.message, unknown.param) == ("It failed.", None)
