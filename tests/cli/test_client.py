"""The typed client does the main job, blocking and on asyncio."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxgui.v1 import inference_pb2, model_pb2
from mlxgui_grpc.client import AsyncClient, Client, ServerUnreachableError
from mlxgui_grpc.errors import InvalidRequestError, ModelNotFoundError
from tests.loopback_hub import LoopbackHub
from tests.support_http import eventually
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


def test_the_blocking_client_manages_models_and_settings(server: RunningServer, hub: LoopbackHub) -> None:
    """What is in memory, pins and priorities, the hub's catalogue, settings and the machine."""
    hub.add("client-search/haystack", DEMO, downloads=3)
    with Client(home=server.home) as client:
        list(client.load("demo"))
        with client.watch_manager() as snapshots:
            assert "demo" in {model.name for model in next(snapshots).loaded_models}
        status = client.model_status("demo")
        assert (status.name, status.state) == ("demo", model_pb2.MODEL_STATE_LOADED)
        assert client.estimate("demo", concurrent_request_count=1, tokens_per_request=64).already_loaded
        assert client.pin("DEMO").pinned and not client.unpin("demo").pinned
        moved = client.set_priority("demo", -7)
        assert (moved.name, moved.priority, moved.HasField("queue_position")) == ("demo", -7, False)
        client.set_priority("demo", 0)

        (found,) = client.search("haystack", sort="likes", max_memory_bytes=2**40)
        assert found.id == "client-search/haystack" and found.memory_fit
        assert client.catalog_model(found.id).compatibility_message
        assert client.categories()[0].model_ids

        changed = client.set_settings(default_model="demo", model_inactivity_timeout_minutes=31)
        assert (changed.settings.default_model, len(changed.details)) == ("demo", 2)
        assert client.settings().settings.model_inactivity_timeout_minutes == 31
        client.reset_settings("default_model", "model_inactivity_timeout_minutes")
        assert client.settings().settings.default_model == ""
        with pytest.raises(InvalidRequestError, match="max_concurrent_models must be between 1 and 64"):
            client.set_settings(max_concurrent_models=65)
        machine = client.system_status()
        assert machine.system.memory.total_bytes > machine.system.memory.available_bytes > 0
        assert machine.model_manager.loaded_model_count >= 1


async def test_the_asyncio_client_manages_models_and_settings(
    server: RunningServer, hub: LoopbackHub
) -> None:
    """The same, awaited."""
    hub.add("client-search/thimble", DEMO, downloads=3)
    async with AsyncClient(server.grpc_address) as client:
        async for _ in client.load("demo"):
            pass
        async with client.watch_manager() as snapshots:
            assert "demo" in {model.name for model in (await anext(snapshots)).loaded_models}
        assert (await client.model_status("demo")).state == model_pb2.MODEL_STATE_LOADED
        assert (await client.estimate("demo")).already_loaded
        assert (await client.pin("demo")).pinned and not (await client.unpin("demo")).pinned
        assert (await client.set_priority("demo", 0)).priority == 0
        assert [model.id for model in await client.search("thimble")] == ["client-search/thimble"]
        assert (await client.catalog_model("client-search/thimble")).name == "thimble"
        assert await client.categories()
        assert (await client.set_settings(log_level="INFO")).settings.log_level == "INFO"
        assert (await client.reset_settings("log_level")).details[0].key == "log_level"
        assert len((await client.settings()).details) > 10
        assert (await client.system_status()).system.platform


async def test_both_clients_end_a_server(start_server: Callable[..., RunningServer]) -> None:
    """Restart in the same process, then shutdown; they answer before the server ends."""
    server = start_server()
    with Client(home=server.home, timeout_seconds=10) as client:
        before = client.server_info().start_time.ToNanoseconds()
        with pytest.raises(InvalidRequestError, match="grace"):
            client.shutdown(grace_seconds=-1)
        assert client.restart(grace_seconds=0) == 0
        eventually(lambda: started(client) > before, "the server answers again")
    async with AsyncClient(home=server.home) as other:
        assert (await other.server_info()).process_id == server.process.pid
        assert await other.shutdown() == 0
    assert server.process.wait(60) == 0


def started(client: Client) -> int:
    """When the server was started; 0 while it does not answer."""
    try:
        return client.server_info().start_time.ToNanoseconds()
    except ServerUnreachableError:
        return 0


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
