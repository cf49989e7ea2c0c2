"""Anthropic's Python SDK uses the Messages API: whole and streamed, with tools, counts, and its errors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic.types import Message

from tests.support_calls import END_TOKENS
from tests.support_http import CAPITAL, PARIS, Series, eventually
from tests.support_server import RunningServer

PROMPTS: dict[str, dict[str, Any]] = {
    prompt["id"]: prompt
    for prompt in json.loads((Path(__file__).parent.parent / "demo_prompts.json").read_text(encoding="utf-8"))
}
NEVER_END = {"logit_bias": {str(token): value for token, value in END_TOKENS.items()}}
FUNCTION = PROMPTS["tool-01"]["tools"][0]["function"]
WEATHER: Any = {
    "name": FUNCTION["name"],
    "description": FUNCTION["description"],
    "input_schema": FUNCTION["parameters"],
}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[anthropic.Anthropic]:
    """The SDK adds /v1/messages to the address; it sends the key as x-api-key."""
    with anthropic.Anthropic(
        base_url=server.rest_url,
        api_key="sk-any",
        timeout=120,
        http_client=anthropic.DefaultHttpxClient(trust_env=False),
    ) as client:
        yield client


def user(text: str) -> Any:
    return {"role": "user", "content": text}


def same(message: Message) -> dict[str, Any]:
    """What two answers to one request have in common: not the id, and no field that only one of them names."""
    body = message.to_dict(exclude_none=True)
    body.pop("id")
    return body


def test_create_and_stream_are_the_same_message(client: anthropic.Anthropic) -> None:
    request: dict[str, Any] = {
        "model": "demo",
        "max_tokens": 100,
        "system": "You are a helpful assistant.",
        "messages": [user(CAPITAL)],
    }
    whole = client.messages.create(**request)
    (block,) = whole.content
    assert block.type == "text" and block.text == PARIS
    assert (whole.stop_reason, whole.stop_sequence, whole.role) == ("end_turn", None, "assistant")
    assert whole.id.startswith("msg_") and whole.usage.output_tokens > 3 and whole._request_id
    with client.messages.stream(**request) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(texts) == PARIS and len(texts) > 1
    assert same(final) == same(whole)
    count = client.messages.count_tokens(
        model="demo", system="You are a helpful assistant.", messages=[user(CAPITAL)]
    )
    assert count.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)


def test_thinking_is_a_block_of_its_own(client: anthropic.Anthropic) -> None:
    request: dict[str, Any] = {
        "model": "demo",
        "max_tokens": 2000,
        "messages": [user(CAPITAL)],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    whole = client.messages.create(**request)
    thinking, text = whole.content
    assert thinking.type == "thinking" and thinking.thinking.strip() == PARIS
    assert text.type == "text" and text.text == PARIS
    with client.messages.stream(**request) as stream:
        assert same(stream.get_final_message()) == same(whole)
    conversation: Any = [user(CAPITAL), {"role": "assistant", "content": whole.content}, user("Thank you!")]
    answer = client.messages.create(model="demo", max_tokens=100, messages=conversation)
    assert answer.content[0].type == "text" and answer.content[0].text


def test_a_tool_is_called_and_its_result_answered(client: anthropic.Anthropic) -> None:
    """Streamed and whole; the blocks of the first answer go back as they are."""
    question = user("What is the weather in Paris?")
    whole = client.messages.create(model="demo", max_tokens=100, messages=[question], tools=[WEATHER])
    assert whole.stop_reason == "tool_use"
    (use,) = whole.content
    assert use.type == "tool_use" and (use.name, use.input) == ("get_weather", {"city": "Paris"})
    with client.messages.stream(model="demo", max_tokens=100, messages=[question], tools=[WEATHER]) as stream:
        (streamed,) = stream.get_final_message().content
    assert streamed.type == "tool_use" and (streamed.name, streamed.input) == (use.name, use.input)
    result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}
    answer = client.messages.create(
        model="demo",
        max_tokens=100,
        tools=[WEATHER],
        messages=[
            question,
            {"role": "assistant", "content": whole.content},
            {"role": "user", "content": [result]},
        ],
    )
    (block,) = answer.content
    assert block.type == "text" and block.text == "The weather in Paris is sunny."


def test_the_sdk_runs_the_tools_itself(client: anthropic.Anthropic) -> None:
    """It asks for the conversation to be kept here, is told that none is, and sends all of it with each turn."""
    called = []

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        called.append(city)
        return "sunny"

    runner = client.beta.messages.tool_runner(
        model="demo", max_tokens=100, tools=[get_weather], messages=[user("What is the weather in Paris?")]
    )
    (block,) = runner.until_done().content
    assert called == ["Paris"]
    assert block.type == "text" and block.text == "The weather in Paris is sunny."


def test_why_a_message_ended(client: anthropic.Anthropic) -> None:
    cut = client.messages.create(model="demo", max_tokens=5, messages=[user("Tell me a story.")])
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 5)
    stopped = client.messages.create(
        model="demo", max_tokens=100, messages=[user(CAPITAL)], stop_sequences=["nowhere", " is"]
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " is")
    assert stopped.content[0].type == "text" and stopped.content[0].text == "The capital of France"


def test_errors_are_the_sdk_s_own_types(client: anthropic.Anthropic) -> None:
    """Before the first event of a stream too; the sentence names the caller's own field."""
    for stream in (False, True):
        with pytest.raises(anthropic.NotFoundError) as missing:
            client.messages.create(model="missing", max_tokens=5, messages=[user("hi")], stream=stream)
        assert (missing.value.type, missing.value.error_code) == ("not_found_error", "model_not_found")
        assert "Model 'missing' not found" in str(missing.value.api_message) and missing.value.request_id
        with pytest.raises(anthropic.BadRequestError) as long:
            client.messages.create(model="demo", max_tokens=5, messages=[user("word " * 9000)], stream=stream)
        assert long.value.error_code == "context_length_exceeded"
    with pytest.raises(anthropic.BadRequestError) as search:
        tool: Any = {"type": "web_search_20250305", "name": "web_search"}
        client.messages.create(model="demo", max_tokens=5, messages=[user("hi")], tools=[tool])
    assert search.value.type == "invalid_request_error" and "`tools[0].type`" in search.value.message
    with pytest.raises(anthropic.BadRequestError) as stop:
        client.messages.create(model="demo", max_tokens=5, messages=[user("hi")], stop_sequences=[""])
    assert "stop_sequences" in stop.value.message
    with pytest.raises(anthropic.NotFoundError):
        client.messages.count_tokens(model="missing", messages=[user("hi")])


def test_a_client_that_leaves_ends_its_request(client: anthropic.Anthropic, server: RunningServer) -> None:
    """A stream by closing it; a whole answer by the SDK's timeout."""
    series = Series(server.channel())
    endless: dict[str, Any] = {
        "model": "demo", "max_tokens": 16_384, "messages": [user("x")], "extra_body": NEVER_END,
    }  # fmt: skip
    with client.messages.create(**endless, stream=True) as stream:
        for event in stream:
            if event.type == "content_block_delta":
                break
        assert series.running("demo") == 1
    eventually(lambda: series.running("demo") == 0, "the engine is idle")
    with pytest.raises(anthropic.APITimeoutError):
        client.with_options(max_retries=0, timeout=0.3).messages.create(**endless)
    eventually(lambda: series.running("demo") == 0, "the engine is idle")
