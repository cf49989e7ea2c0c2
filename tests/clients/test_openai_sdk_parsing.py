"""The SDK's own typed parsing: schemas of pydantic, its streaming helper, tools and log-probabilities.

A model with random weights will do: what its answer has to be is enforced while it decodes.
"""

import json
from collections.abc import Iterator
from enum import Enum
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.conftest import TinyModels
from tests.support_http import CAPITAL, PARIS, installed_directory
from tests.support_server import RunningServer


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Flag(BaseModel):
    """What the answer has to be; every field has few values, so that random weights come to an end."""

    colour: Colour
    is_large: bool
    stripes: Colour | None


class Paint(BaseModel):
    """Paints a thing."""

    colour: Colour
    is_dry: bool


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.rest_url}/v1",
        api_key="sk-any",
        timeout=120,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    ) as client:
        yield client


@pytest.fixture(scope="module")
def random_model(unix_channel: Any, tiny_models: TinyModels) -> Iterator[str]:
    with installed_directory(unix_channel, tiny_models.qwen3, "sdk-parsing") as name:
        yield name


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


HOT: dict[str, Any] = {"temperature": 1.0, "max_completion_tokens": 400}


def test_parse_answers_with_the_model_of_the_caller(client: openai.OpenAI, random_model: str) -> None:
    """Whatever it samples is an instance; several choices too."""
    for seed in (1, 2):
        answer = client.chat.completions.parse(
            model=random_model, messages=user("A flag?"), response_format=Flag, seed=seed, n=2, **HOT
        )
        for choice in answer.choices:
            assert isinstance(choice.message.parsed, Flag)
            assert choice.finish_reason == "stop" and choice.message.refusal is None


def test_the_streaming_helper_comes_to_the_same(client: openai.OpenAI, random_model: str) -> None:
    """Its accumulated snapshot is what `parse` answers: the text, the parsed object, the reasons."""
    asked: dict[str, Any] = {"model": random_model, "messages": user("A flag?"), "seed": 3, **HOT}
    whole = client.chat.completions.parse(response_format=Flag, **asked)
    kinds = set()
    with client.chat.completions.stream(response_format=Flag, **asked) as stream:
        for event in stream:
            kinds.add(event.type)
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    first, second = final.choices[0], whole.choices[0]
    assert isinstance(first.message.parsed, Flag)
    assert first.message.parsed == second.message.parsed
    assert first.message.content == second.message.content
    assert first.finish_reason == second.finish_reason == "stop"


def test_a_plain_answer_is_the_same_streamed_and_whole(client: openai.OpenAI) -> None:
    """The whole message of the helper, log-probabilities included, and its usage."""
    asked: dict[str, Any] = {
        "model": "demo",
        "messages": user(CAPITAL),
        "logprobs": True,
        "top_logprobs": 3,
    }
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.stream(stream_options={"include_usage": True}, **asked) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content == PARIS
    streamed, answered = final.choices[0].logprobs, whole.choices[0].logprobs
    assert streamed is not None and answered is not None and answered.content and streamed.content
    assert [one.token for one in streamed.content] == [one.token for one in answered.content]
    # End tokens have no text.
    text = b"".join(bytes(one.bytes or []) for one in answered.content).decode()
    assert text.startswith(PARIS)
    for one in answered.content:
        assert len(one.top_logprobs) == 3 and one.logprob <= 0
        assert one.top_logprobs == sorted(one.top_logprobs, key=lambda top: -top.logprob)
    assert final.usage == whole.usage


def test_completions_logprobs(client: openai.OpenAI) -> None:
    """Columns of one length, with offsets into the text; `echo` has the prompt's too."""
    answer = client.completions.create(
        model="demo", prompt="The capital of France is", logprobs=2, echo=True, max_tokens=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.token_logprobs
    assert logprobs.text_offset and logprobs.top_logprobs
    count = len(logprobs.tokens)
    assert len(logprobs.token_logprobs) == len(logprobs.text_offset) == len(logprobs.top_logprobs) == count
    # The SDK's type knows of no null, which the first token has: nothing predicts it.
    values: list[Any] = list(logprobs.token_logprobs)
    assert values[0] is None and None not in values[1:]
    assert "".join(logprobs.tokens).startswith("The capital of France is")
    assert answer.usage is not None and count == answer.usage.total_tokens


def test_tools_of_pydantic_go_there_and_back(client: openai.OpenAI, random_model: str) -> None:
    """A tool that has to be called is called with arguments that parse; its result goes back in."""
    tools: list[Any] = [openai.pydantic_function_tool(Paint)]
    asked: dict[str, Any] = {"model": random_model, "tools": tools, "seed": 4, **HOT}
    messages = user("Paint it.")
    choices: list[Any] = ["required", {"type": "function", "function": {"name": "Paint"}}]
    for choice in choices:
        answer = client.chat.completions.parse(
            messages=messages, tool_choice=choice, parallel_tool_calls=False, **asked
        )
        message = answer.choices[0].message
        assert answer.choices[0].finish_reason == "tool_calls"
        assert message.tool_calls is not None and message.content is None
        (call,) = message.tool_calls
        assert call.function.name == "Paint" and isinstance(call.function.parsed_arguments, Paint)
        assert json.loads(call.function.arguments)["colour"] in ("red", "blue")
    messages = [
        *messages,
        message.model_dump(mode="json", exclude={"parsed"}, exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": '{"done": true}'},
    ]
    after = client.chat.completions.create(messages=messages, tool_choice="none", **asked)
    assert after.choices[0].message.tool_calls is None


def test_tool_calls_stream_into_the_same_message(client: openai.OpenAI, random_model: str) -> None:
    """`id`, type and name in the first part only, arguments after; the helper's snapshot is the whole answer."""
    asked: dict[str, Any] = {
        "model": random_model,
        "messages": user("Paint it."),
        "tools": [openai.pydantic_function_tool(Paint)],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "seed": 5,
        **HOT,
    }
    whole = client.chat.completions.create(**asked)
    parts: list[Any] = []
    with client.chat.completions.stream(**asked) as stream:
        for event in stream:
            if event.type == "chunk":
                for chosen in event.chunk.choices:
                    parts += chosen.delta.tool_calls or []
        final = stream.get_final_completion()
    assert parts[0].id and parts[0].type == "function" and parts[0].function.name == "Paint"
    assert all(part.id is None and part.function.name is None for part in parts[1:])
    first, second = final.choices[0], whole.choices[0]
    assert first.finish_reason == second.finish_reason == "tool_calls"
    assert first.message.content is None and second.message.content is None
    streamed, answered = first.message.tool_calls, second.message.tool_calls
    assert streamed and answered
    assert [call.function.arguments for call in streamed] == [call.function.arguments for call in answered]
