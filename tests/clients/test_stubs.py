"""The generated stubs, blocking and asyncio, and the typed client over them, run the main job."""

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from mlxgui.v1 import inference_pb2, inference_pb2_grpc, model_pb2, model_pb2_grpc
from mlxgui_grpc.client import AsyncClient, Client
from mlxgui_grpc.errors import InvalidRequestError, ModelNotFoundError, OperationCancelledError
from tests.conftest import TinyModels
from tests.loopback_hub import LoopbackHub
from tests.support_calls import (
    END_TOKENS,
    chat,
    chat_stream,
    failure_of,
    last_operation,
    streamed_text,
    text_of,
)
from tests.support_http import CAPITAL, PARIS, Series, eventually, installed_directory
from tests.support_models import DEMO
from tests.support_server import RunningServer


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_blocking_stubs_install_load_chat_stream_and_delete(
    server: RunningServer, hub: LoopbackHub, unix: bool
) -> None:
    """From the hub, by its id, with nothing but what is generated."""
    hub.add("stubs/Blocking-Demo", DEMO)
    channel = server.channel(unix=unix)
    models = model_pb2_grpc.ModelServiceStub(channel)
    inference = inference_pb2_grpc.InferenceServiceStub(channel)
    installed = last_operation(
        models.InstallModel(model_pb2.InstallModelRequest(model_id="stubs/Blocking-Demo"))
    )
    assert installed.success.name == "blocking-demo"
    assert installed.install.done_bytes == installed.install.total_bytes > 0
    loaded = last_operation(models.LoadModel(model_pb2.LoadModelRequest(name="stubs/blocking-demo")))
    assert loaded.success.state == model_pb2.MODEL_STATE_LOADED
    assert text_of(inference.Chat(chat(CAPITAL, "blocking-demo"))) == PARIS
    assert streamed_text(inference.ChatStream(chat_stream(CAPITAL, "stubs/Blocking-Demo"))) == PARIS
    deleted = models.DeleteModel(model_pb2.DeleteModelRequest(name="blocking-demo"))
    assert deleted.removed_files and deleted.freed_bytes > 0
    with pytest.raises(grpc.RpcError) as gone:
        models.GetModel(model_pb2.GetModelRequest(name="blocking-demo"))
    assert failure_of(gone.value).reason == "MODEL_NOT_FOUND"


async def test_asyncio_stubs_chat_and_stream(server: RunningServer) -> None:
    """Twenty at once over one channel, each with its own answer."""
    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)

        async def ask(country: str, city: str, stream: bool) -> None:
            question = f"What is the capital of {country}?"
            if stream:
                events = [event async for event in stub.ChatStream(chat_stream(question))]
                text = streamed_text(events)
            else:
                text = text_of(await stub.Chat(chat(question)))
            assert text == f"The capital of {country} is {city}."

        pairs = [("France", "Paris"), ("Germany", "Berlin"), ("Italy", "Rome"), ("Japan", "Tokyo")]
        await asyncio.gather(*(ask(*pairs[i % 4], i % 2 == 0) for i in range(20)))


async def test_asyncio_stubs_cancel(
    server: RunningServer, unix_channel: grpc.Channel, tiny_models: TinyModels
) -> None:
    series = Series(server.channel())
    with installed_directory(unix_channel, tiny_models.long, "aio-cancel") as name:
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            request = chat_stream("x", name, max_tokens=16_384, logit_bias=END_TOKENS)
            call = stub.ChatStream(request)
            async for event in call:
                if event.HasField("delta"):
                    break
            call.cancel()
            await asyncio.to_thread(eventually, lambda: series.running(name) == 0, "the engine is idle")
        assert series.finished(name) == 0


@pytest.fixture(scope="module", params=["tcp", "unix", "home"])
def client(request: pytest.FixtureRequest, server: RunningServer) -> Iterator[Client]:
    """The typed client: at an address, at a socket, and finding the server by its folder."""
    if request.param == "home":
        made = Client(home=server.home)
    else:
        made = Client(server.grpc_address if request.param == "tcp" else server.unix_address)
    with made:
        yield made


def test_the_typed_client_runs_the_main_job(client: Client, hub: LoopbackHub) -> None:
    hub.add("stubs/typed", DEMO)
    *_, installed = client.install("stubs/typed")
    assert installed.success.name == "typed"
    *_, loaded = client.load("typed")
    assert loaded.success.name == "typed"
    assert client.health("typed").healthy and client.is_serving("model/typed")
    reply = client.chat("typed", CAPITAL)
    assert (reply.text, reply.finish_reason) == (PARIS, "stop")
    assert "".join(client.stream_chat("typed", CAPITAL).texts()) == PARIS
    assert client.generate("typed", "The capital of France is").text == " Paris."
    assert client.count_tokens("typed", CAPITAL) > 0
    assert "typed" in {model.name for model in client.models()}
    assert client.unload("typed").name == "typed"
    assert client.delete("typed").removed_files
    with pytest.raises(ModelNotFoundError, match="Model 'typed' not found"):
        client.model("typed")


def test_the_typed_client_raises_the_server_s_errors(client: Client) -> None:
    with pytest.raises(InvalidRequestError) as invalid:
        client.chat("demo", CAPITAL, temperature=5)
    assert invalid.value.field == "sampling.temperature"
    with pytest.raises(ModelNotFoundError):
        list(client.stream_chat("missing", CAPITAL))


async def test_the_asyncio_client_runs_the_main_job(server: RunningServer, tiny_models: TinyModels) -> None:
    """Over the unix socket, so that a directory can be installed."""
    async with AsyncClient(home=server.home) as client:
        snapshots = [snapshot async for snapshot in client.install(tiny_models.qwen3, "aio-typed")]
        assert snapshots[-1].success.name == "aio-typed"
        reply, other = await asyncio.gather(
            client.chat("demo", CAPITAL), client.chat("aio-typed", CAPITAL, max_tokens=5)
        )
        assert reply.text == PARIS and other.usage.completion_token_count == 5
        texts = [text async for text in client.stream_chat("demo", CAPITAL).texts()]
        assert "".join(texts) == PARIS and len(texts) >= 1
        stream = client.stream_chat("aio-typed", "x", max_tokens=16_384)
        async with stream:
            async for _ in stream.texts():
                await client.unload("aio-typed", force=True)
                break
            with pytest.raises(OperationCancelledError, match="unloaded"):
                async for _ in stream:
                    pass
        assert not (await client.delete("aio-typed")).removed_files
    assert (tiny_models.qwen3 / "config.json").exists()


def test_every_rpc_of_the_contract_is_on_its_stub(server: RunningServer) -> None:
    """What the descriptors declare the generated stubs have, and the server answers each, be it UNIMPLEMENTED."""
    channel = server.channel()
    for module in (inference_pb2, model_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            grpc_module = inference_pb2_grpc if module is inference_pb2 else model_pb2_grpc
            stub = getattr(grpc_module, f"{service.name}Stub")(channel)
            assert all(hasattr(stub, method.name) for method in service.methods)
