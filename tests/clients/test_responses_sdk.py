"""OpenAI's Python SDK uses the Responses API: whole and streamed, with tools, and its errors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from tests.support_calls import END_TOKENS
from tests.support_http import CAPITAL, PARIS, Series, eventually
from tests.support_server import RunningServer

PROMPTS: dict[str, dict[str, Any]] = {
    prompt["id"]: prompt
    for prompt in json.loads((Path(__file__).parent.parent / "demo_prompts.json").read_text(encoding="utf-8"))
}
NEVER_END = {"logit_bias": {str(token): value for token, value in END_TOKENS.items()}}
WEATHER: Any = {"type": "function", **PROMPTS["tool-01"]["tools"][0]["function"], "strict": False}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.rest_url}/v1",
        api_key="sk-any",
        timeout=120,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    ) as client:
        yield client


def same(response: Response) -> dict[str, Any]:
    """What two answers to one request have in common: neither ids nor times."""
    body: dict[str, Any] = response.to_dict(warnings=False)
    for key in ("id", "created_at", "completed_at"):
        body.pop(key)
    items: list[dict[str, Any]] = body["output"]
    for item in items:
        item.pop("id")
        # The SDK's own, on what its streams accumulate.
        item.pop("parsed_arguments", None)
        for part in item.get("content", ()):
            part.pop("parsed", None)
    return body


def test_create_and_stream_are_the_same_answer(client: openai.OpenAI) -> None:
    """With the log-probabilities of the text, whose tokens are the text."""
    request: dict[str, Any] = {
        "model": "demo",
        "instructions": "You are a helpful assistant.",
        "input": CAPITAL,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
    }
    whole = client.responses.create(**request)
    assert (whole.output_text, whole.status, whole.model) == (PARIS, "completed", "demo")
    assert whole.usage is not None and whole.usage.output_tokens > 3
    assert whole.instructions == "You are a helpful assistant." and whole.store is False
    (message,) = whole.output
    assert message.type == "message" and message.content[0].type == "output_text"
    logprobs = message.content[0].logprobs
    assert logprobs and "".join(entry.token for entry in logprobs).startswith(PARIS)
    with client.responses.stream(**request) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(texts) == PARIS and len(texts) > 1
    assert same(final) == same(whole)


def test_thinking_is_an_item_of_its_own(client: openai.OpenAI) -> None:
    thinking: Any = {"chat_template_kwargs": {"enable_thinking": True}}
    whole = client.responses.create(model="demo", input=CAPITAL, extra_body=thinking)
    reasoning, message = whole.output
    assert reasoning.type == "reasoning" and reasoning.content
    assert reasoning.content[0].text.strip() == PARIS
    assert message.type == "message" and whole.output_text == PARIS
    assert whole.usage is not None and whole.usage.output_tokens_details.reasoning_tokens > 3
    with client.responses.stream(model="demo", input=CAPITAL, extra_body=thinking) as stream:
        thought = "".join(event.delta for event in stream if event.type == "response.reasoning_text.delta")
        assert same(stream.get_final_response()) == same(whole)
    assert thought == reasoning.content[0].text


def test_a_tool_is_called_and_its_result_answered(client: openai.OpenAI) -> None:
    """Streamed and whole; the items of the first answer go back as they are."""
    question: Any = {"role": "user", "content": "What is the weather in Paris?"}
    whole = client.responses.create(model="demo", input=[question], tools=[WEATHER])
    (call,) = whole.output
    assert call.type == "function_call" and call.name == "get_weather"
    assert json.loads(call.arguments) == {"city": "Paris"}
    with client.responses.stream(model="demo", input=[question], tools=[WEATHER]) as stream:
        pieces = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        (streamed,) = stream.get_final_response().output
    assert streamed.type == "function_call" and "".join(pieces) == streamed.arguments == call.arguments
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    conversation: Any = [question, *[item.to_dict() for item in whole.output], result]
    answer = client.responses.create(model="demo", input=conversation, tools=[WEATHER])
    assert answer.output_text == "The weather in Paris is sunny."


def test_what_is_cut_is_incomplete(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="demo", input="Tell me a story.", max_output_tokens=5)
    assert answer.status == "incomplete" and answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None and answer.usage.output_tokens == 5


def test_errors_are_the_sdk_s_own_types(client: openai.OpenAI) -> None:
    """Before the first event of a stream too."""
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as missing:
            client.responses.create(model="missing", input="hi", stream=stream)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            client.responses.create(model="demo", input="word " * 9000, stream=stream)
        assert (long.value.code, long.value.param) == ("context_length_exceeded", "input")
    with pytest.raises(openai.BadRequestError) as stateful:
        client.responses.create(model="demo", input="hi", previous_response_id="resp_1")
    assert stateful.value.param == "previous_response_id" and "stored" in stateful.value.message
    with pytest.raises(openai.BadRequestError) as search:
        client.responses.create(model="demo", input="hi", tools=[{"type": "web_search"}])
    assert search.value.param == "tools[0].type"
    with pytest.raises(openai.BadRequestError) as hot:
        client.responses.create(model="demo", input="hi", max_output_tokens=99_999)
    assert hot.value.param == "max_output_tokens" and "max_output_tokens" in hot.value.message


def test_a_client_that_leaves_ends_its_request(client: openai.OpenAI, server: RunningServer) -> None:
    """A stream by closing it; a whole answer by the SDK's timeout."""
    series = Series(server.channel())
    endless: dict[str, Any] = {
        "model": "demo", "input": "x", "max_output_tokens": 16_384, "extra_body": NEVER_END,
    }  # fmt: skip
    with client.responses.create(**endless, stream=True) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                break
        assert series.running("demo") == 1
    eventually(lambda: series.running("demo") == 0, "the engine is idle")
    with pytest.raises(openai.APITimeoutError):
        client.with_options(max_retries=0, timeout=0.3).responses.create(**endless)
    eventually(lambda: series.running("demo") == 0, "the engine is idle")
