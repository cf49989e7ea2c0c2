"""The typed client does the main job, blocking and on asyncio."""

import shutil
from pathlib import Path

import pytest

from mlxgui.v1 import inference_pb2
from mlxgui_grpc.client import AsyncClient, Client
from mlxgui_grpc.errors import InvalidRequestError, ModelNotFoundError
from tests.support_models import DEMO
from tests.support_server import RunningServer

CAPITAL = "What is the capital of France?"
ANSWER = "The capital of France is Paris."


def test_the_blocking_client_installs_chats_and_removes(server: RunningServer, tmp_path: Path) -> None:
    """Found by the state folder, over the unix socket."""
    shutil.copytree(DEMO, tmp_path / "mine")
    with Client(home=server.home) as client:
        *_, last = client.install(tmp_path / "mine", "client-mine")
        assert last.success.name == "client-mine"
        *_, last = client.load("client-mine")
        assert last.done
        assert client.health("client-mine").healthy
        assert client.is_serving()

        reply = client.chat("client-mine", CAPITAL)
        assert (reply.text, reply.finish_reason) == (ANSWER, "stop")
        assert reply.usage.prompt_token_count == client.count_tokens("client-mine", [CAPITAL])

        with client.stream_chat("client-mine", CAPITAL, max_tokens=2) as stream:
            events = list(stream)
        assert isinstance(events[0], inference_pb2.StreamStart)
        assert isinstance(events[-1], inference_pb2.StreamEnd)
        assert events[-1].usage.completion_token_count == 2

        assert "".join(client.stream_generate("client-mine", "The capital", max_tokens=4).texts()) == (
            client.generate("client-mine", "The capital", max_tokens=4).text
        )
        client.unload("client-mine")
        assert not client.delete("client-mine").removed_files
        assert "client-mine" not in {model.name for model in client.models()}


async def test_the_asyncio_client_chats_and_streams(server: RunningServer) -> None:
    """Over TCP."""
    async with AsyncClient(server.grpc_address) as client:
        assert (await client.chat("demo", CAPITAL)).text == ANSWER
        async with client.stream_chat("demo", CAPITAL) as stream:
            assert "".join([text async for text in stream.texts()]) == ANSWER
        *_, last = [operation async for operation in client.load("demo")]
        assert last.success.name == "demo"
        assert (await client.server_info()).process_id == server.process.pid


def test_closing_a_stream_ends_it_and_the_client_goes_on(server: RunningServer) -> None:
    """The call is cancelled; later calls are not touched."""
    with Client(home=server.home) as client:
        stream = client.stream_chat("demo", "Count from 1 to 20")
        next(stream)
        stream.close()
        assert list(stream) == []
        assert client.chat("demo", CAPITAL).text == ANSWER


async def test_closing_an_asyncio_stream_ends_it(server: RunningServer) -> None:
    """Without cancelling the task that reads it."""
    async with AsyncClient(server.grpc_address) as client:
        stream = client.stream_chat("demo", "Count from 1 to 20")
        await anext(stream)
        await stream.close()
        assert [event async for event in stream] == []


async def test_failures_are_those_of_the_server(server: RunningServer) -> None:
    """Same class, same message, same field, from unary calls and from streams."""
    with Client(home=server.home) as client:
        with pytest.raises(ModelNotFoundError, match="Model 'no-such-model' not found") as missing:
            client.model("no-such-model")
        assert missing.value.metadata["model"] == "no-such-model"
        with pytest.raises(InvalidRequestError) as invalid:
            list(client.stream_chat("demo", "Hi", temperature=7))
        assert invalid.value.field.endswith("temperature")
    async with AsyncClient(home=server.home) as other:
        with pytest.raises(ModelNotFoundError):
            await other.chat("no-such-model", "Hi")
        with pytest.raises(InvalidRequestError):
            async for _ in other.stream_chat("demo", "Hi", temperature=7):
                pass
