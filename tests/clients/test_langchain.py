"""LangChain's OpenAI classes against the server: invoke, stream, tools, structured output."""

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from tests.conftest import TinyModels
from tests.support_http import CAPITAL, PARIS, installed_directory
from tests.support_server import RunningServer


class Light(BaseModel):
    """Switches a light."""

    is_on: bool
    is_dim: bool


@pytest.fixture(scope="module")
def random_model(unix_channel: Any, tiny_models: TinyModels) -> Iterator[str]:
    with installed_directory(unix_channel, tiny_models.qwen3, "langchain") as name:
        yield name


def model(server: RunningServer, name: str, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model=name, base_url=f"{server.rest_url}/v1", api_key=lambda: "any", max_retries=0, **more
    )


def test_invoke_and_stream(server: RunningServer) -> None:
    """The same text; usage in both."""
    demo = model(server, "demo", stream_usage=True)
    answer = demo.invoke(CAPITAL)
    assert answer.content == PARIS and answer.usage_metadata is not None
    chunks = list(demo.stream(CAPITAL))
    joined = chunks[0]
    for chunk in chunks[1:]:
        joined = joined + chunk
    assert joined.content == PARIS
    assert joined.usage_metadata is not None
    assert joined.usage_metadata["total_tokens"] == answer.usage_metadata["total_tokens"]


def test_bound_tools_are_called(server: RunningServer, random_model: str) -> None:
    """And what they answered goes back in."""
    chat = model(server, random_model, temperature=1, seed=6, max_tokens=200)
    bound = chat.bind_tools([Light], tool_choice="any", parallel_tool_calls=False, strict=True)
    answer = bound.invoke("Light, please.")
    assert isinstance(answer, AIMessage)
    (call,) = answer.tool_calls
    assert call["name"] == "Light" and Light.model_validate(call["args"])
    result = ToolMessage("done", tool_call_id=str(call["id"]))
    after = chat.bind_tools([Light], tool_choice="none").invoke([HumanMessage("Light."), answer, result])
    assert after.type == "ai"


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(server: RunningServer, random_model: str, method: Any) -> None:
    chat = model(server, random_model, temperature=1, seed=7, max_tokens=200)
    assert isinstance(chat.with_structured_output(Light, method=method).invoke("Light?"), Light)
