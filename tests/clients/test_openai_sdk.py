"""OpenAI's Python SDK runs the main job: whole and streamed, blocking and asyncio, with its retries and its errors."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from mlxgui.v1 import model_pb2, model_pb2_grpc
from tests.conftest import TinyModels
from tests.support_calls import END_TOKENS, last_operation
from tests.support_http import (
    CAPITAL,
    PARIS,
    EventReader,
    Series,
    endless_body,
    eventually,
    installed_directory,
)
from tests.support_server import RunningServer

PROMPTS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent.parent / "demo_prompts.json").read_text(encoding="utf-8")
)
NEVER_END = {str(token): int(value) for token, value in END_TOKENS.items()}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    """As the README has it, with any key; no proxies of the environment."""
    with openai.OpenAI(
        base_url=f"{server.rest_url}/v1",
        api_key="sk-any",
        timeout=120,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    ) as client:
        yield client


@pytest.fixture
async def async_client(server: RunningServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{server.rest_url}/v1",
        api_key="sk-any",
        timeout=120,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    ) as client:
        yield client


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=user(CAPITAL))
    assert answer.choices[0].message.content == PARIS
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model == "demo" and answer.object == "chat.completion"
    assert answer._request_id


def test_function_calling(client: openai.OpenAI) -> None:
    """A call, whole and streamed; its result goes back in; nothing of its markup is in the content."""
    asked, answered = (next(p for p in PROMPTS if p["id"] == id) for id in ("tool-01", "tool-02"))
    messages, tools = list(asked["messages"]), asked["tools"]
    answer = client.chat.completions.create(model="demo", messages=messages, tools=tools)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls" and not message.content
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert call.type == "function" and call.id.startswith("call_")
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Paris"}')

    with client.chat.completions.create(model="demo", messages=messages, tools=tools, stream=True) as stream:
        choices = [chunk.choices[0] for chunk in stream]
    parts = [part.function for choice in choices for part in choice.delta.tool_calls or ()]
    assert "".join(part.name or "" for part in parts if part) == call.function.name
    assert "".join(part.arguments or "" for part in parts if part) == call.function.arguments
    assert not any(choice.delta.content for choice in choices)
    assert choices[-1].finish_reason == "tool_calls"

    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    final = client.chat.completions.create(model="demo", messages=messages, tools=tools)
    assert final.choices[0].message.content == answered["expect"]


def test_chat_stream(client: openai.OpenAI) -> None:
    """Role first, then text, one finish, and the usage at the end, which is that of the whole answer."""
    whole = client.chat.completions.create(model="demo", messages=user(CAPITAL))
    with client.chat.completions.create(
        model="demo", messages=user(CAPITAL), stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == PARIS
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


def test_the_sdk_s_own_accumulator_gets_the_whole_message(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="demo", messages=user(CAPITAL)) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == PARIS
    assert final.choices[0].finish_reason == "stop"


async def test_asyncio_chat_and_stream(async_client: openai.AsyncOpenAI) -> None:
    """Sixteen conversations at once, each with its own answer."""
    capitals = [prompt for prompt in PROMPTS if prompt["kind"] == "capital"][:16]

    async def ask(prompt: dict[str, Any], stream: bool) -> str:
        if not stream:
            answer = await async_client.chat.completions.create(model="demo", messages=prompt["messages"])
            return answer.choices[0].message.content or ""
        chunks = await async_client.chat.completions.create(
            model="demo", messages=prompt["messages"], stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    answers = await asyncio.gather(*(ask(prompt, index % 2 == 0) for index, prompt in enumerate(capitals)))
    assert answers == [prompt["expect"] for prompt in capitals]


UNICODE = [prompt for prompt in PROMPTS if prompt["kind"] == "unicode"]


def test_unicode_is_the_same_streamed_and_whole(client: openai.OpenAI) -> None:
    """Characters whose bytes are several tokens, through the SDK's own line decoder."""
    for prompt in UNICODE:
        whole = client.chat.completions.create(model="demo", messages=prompt["messages"])
        assert whole.choices[0].message.content == prompt["expect"], prompt["id"]
        stream = client.chat.completions.create(model="demo", messages=prompt["messages"], stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == prompt["expect"], prompt["id"]


def test_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="demo", prompt="The capital of France is", n=2)
    assert [choice.text for choice in whole.choices] == [" Paris.", " Paris."]
    stream = client.completions.create(model="demo", prompt="The capital of France is", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == " Paris."


async def test_asyncio_completions(async_client: openai.AsyncOpenAI) -> None:
    whole = await async_client.completions.create(model="demo", prompt="The capital of France is")
    assert whole.choices[0].text == " Paris."


def test_models_are_listed_retrieved_and_deleted(
    client: openai.OpenAI, unix_channel: Any, tiny_models: TinyModels
) -> None:
    """`retrieve` keeps the documented number as id; the name is its root."""
    listed = {model.id: model for model in client.models.list()}
    assert listed["demo"].owned_by == "mlx-gui" and listed["demo"].object == "model"
    one = client.models.retrieve("demo")
    assert (one.object, one.owned_by) == ("model", "mlx-gui")
    assert one.to_dict(warnings=False).items() >= {"root": "demo", "name": "demo"}.items()
    request = model_pb2.InstallModelRequest(local_directory=str(tiny_models.llama), name="sdk-model")
    last_operation(model_pb2_grpc.ModelServiceStub(unix_channel).InstallModel(request))
    assert "sdk-model" in {model.id for model in client.models.list()}
    assert client.models.delete("sdk-model").to_dict(warnings=False)["status"] == "deleted"
    assert "sdk-model" not in {model.id for model in client.models.list()}


def test_errors_are_the_sdk_s_own_types(client: openai.OpenAI) -> None:
    """With the sentence, the code and the field that this server said."""
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="missing", messages=user("hi"), stream=stream)
        assert missing.value.code == "model_not_found"
        assert "Model 'missing' not found" in missing.value.message
        assert missing.value.type == "invalid_request_error"
        assert missing.value.request_id
        wizard = [*user("hi"), {"role": "wizard", "content": "x"}]
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="demo", messages=user("hi"), extra_body={"messages": wizard})
    assert bad.value.param == "messages[1].role"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="demo", messages=user("word " * 9000))
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("missing")
    with pytest.raises(openai.PermissionDeniedError):
        client.with_options(default_headers={"Origin": "https://evil.example"}).models.delete("demo")


class Attempts(openai.DefaultHttpxClient):
    """Notes the answer to each thing that the SDK sends, and calls `after_each`."""

    def __init__(self) -> None:
        super().__init__(trust_env=False)
        self.statuses: list[int] = []
        self.retry_after: list[str | None] = []
        self.after_each: Callable[[], None] = lambda: None

    def send(self, *arguments: Any, **options: Any) -> Any:
        response = super().send(*arguments, **options)
        self.statuses.append(response.status_code)
        self.retry_after.append(response.headers.get("retry-after"))
        self.after_each()
        return response


def counting(server: RunningServer, retries: int) -> tuple[openai.OpenAI, Attempts]:
    attempts = Attempts()
    client = openai.OpenAI(
        base_url=f"{server.rest_url}/v1",
        api_key="sk-any",
        max_retries=retries,
        timeout=120,
        http_client=attempts,
    )
    return client, attempts


def test_what_a_repeat_cannot_mend_is_tried_once(server: RunningServer) -> None:
    """The SDK would send 409 and 5xx three times; the header x-should-retry says not to."""
    client, attempts = counting(server, 2)
    with client:
        with pytest.raises(openai.InternalServerError) as not_yet:
            client.chat.completions.create(
                model="demo", messages=user("hi"), extra_body={"draft_model": "other"}
            )
        assert not_yet.value.status_code == 501
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="missing", messages=user("hi"))
    assert attempts.statuses == [501, 404]


def test_a_full_server_is_429_and_the_sdk_comes_back(
    server: RunningServer, unix_channel: Any, tiny_models: TinyModels
) -> None:
    """With every place taken the SDK waits as Retry-After says; it is served once one is free."""
    series = Series(server.channel())
    with installed_directory(unix_channel, tiny_models.long, "sdk-endless") as name:
        holding = [
            EventReader(server.rest_url, "/v1/chat/completions", endless_body(name, stream=True))
            for _ in range(56)
        ]
        try:
            for reader in holding:
                assert reader.open().status == 200
            client, attempts = counting(server, 0)
            with client, pytest.raises(openai.RateLimitError) as full:
                client.chat.completions.create(model="demo", messages=user(CAPITAL))
            assert full.value.code == "queue_full"
            assert attempts.statuses == [429] and attempts.retry_after == ["1"]
            client, attempts = counting(server, 20)

            def free_places_after_a_refusal() -> None:
                if attempts.statuses == [429]:
                    for reader in holding:
                        reader.close()

            attempts.after_each = free_places_after_a_refusal
            with client:
                answer = client.chat.completions.create(model="demo", messages=user(CAPITAL))
            assert answer.choices[0].message.content == PARIS
            assert attempts.statuses[0] == 429 and attempts.statuses[-1] == 200
        finally:
            for reader in holding:
                reader.close()
            eventually(lambda: series.running(name) == 0, "the engine is idle")


def test_breaking_off_a_stream_ends_the_request(
    client: openai.OpenAI, server: RunningServer, unix_channel: Any, tiny_models: TinyModels
) -> None:
    """Leaving the block is enough; and a timeout of the SDK ends a whole answer on the server too."""
    series = Series(server.channel())
    with installed_directory(unix_channel, tiny_models.long, "sdk-broken") as name:
        with client.chat.completions.create(
            model=name, messages=user("x"), max_tokens=16_384, logit_bias=NEVER_END, stream=True
        ) as stream:
            for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
            assert series.running(name) == 1
        eventually(lambda: series.running(name) == 0, "the engine is idle")
        with pytest.raises(openai.APITimeoutError):
            client.with_options(max_retries=0, timeout=1).chat.completions.create(
                model=name, messages=user("x"), max_tokens=16_384, logit_bias=NEVER_END
            )
        eventually(lambda: series.running(name) == 0, "the engine is idle")
        assert series.finished(name) == 0


def test_an_error_in_the_middle_of_a_stream_is_raised(
    client: openai.OpenAI, unix_channel: Any, tiny_models: TinyModels
) -> None:
    """The model is taken away while it answers: the SDK raises what the error event says."""
    with installed_directory(unix_channel, tiny_models.long, "sdk-taken") as name:
        stream = client.chat.completions.create(
            model=name, messages=user("x"), max_tokens=16_384, logit_bias=NEVER_END, stream=True
        )
        with pytest.raises(openai.APIError) as taken:
            for chunk in stream:
                if chunk.choices[0].delta.content:
                    model_pb2_grpc.ModelServiceStub(unix_channel).UnloadModel(
                        model_pb2.UnloadModelRequest(name=name, force=True)
                    )
        assert taken.value.code == "cancelled"
        assert "unloaded" in taken.value.message


def test_sampling_fields_of_the_sdk_reach_the_model(client: openai.OpenAI) -> None:
    """seed, n, stop, max_completion_tokens, logit_bias; and keys beyond the SDK's by extra_body."""
    hot: dict[str, Any] = {"temperature": 1.5, "max_completion_tokens": 16}
    texts = [
        client.chat.completions.create(model="demo", messages=user("Tell me a story."), seed=seed, **hot)
        .choices[0]
        .message.content
        for seed in (5, 5, 6)
    ]
    assert texts[0] == texts[1] != texts[2]
    answer = client.chat.completions.create(
        model="demo", messages=user(CAPITAL), n=2, stop=[" is"], extra_body={"top_k": 1, "min_p": 0.1}
    )
    assert [choice.message.content for choice in answer.choices] == ["The capital of France"] * 2
    cut = client.chat.completions.create(model="demo", messages=user(CAPITAL), max_completion_tokens=2)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage is not None and cut.usage.completion_tokens == 2
