"""Fixtures that more than one folder of tests needs: the real server, once a session, and what speaks to it.

`server` is shared: a test leaves it as it found it. A test that kills, fills or configures a server starts its own
with `start_server`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import requests

from mlxgui.v1 import inference_pb2_grpc, model_pb2_grpc, system_pb2_grpc
from tests.http.answers import check_answer
from tests.loopback_hub import LoopbackHub
from tests.picture_host import ADDRESSES, PictureHost
from tests.support_models import DEMO, build_tiny
from tests.support_server import RunningServer, start

HTTP_SECONDS = 120.0


@dataclass(frozen=True)
class TinyModels:
    """Folders of models with random weights: real architectures, loaded by the real loaders."""

    llama: Path
    qwen3: Path
    long: Path
    """Context of 32,768 tokens, two layers: its prefill takes a while."""


class RestSession(requests.Session):
    """A session whose paths are relative to the server's REST address, with a generous time limit.

    Every answer that it reads to the end has to be what the API's description says.
    """

    def __init__(self, base_url: str) -> None:
        super().__init__()
        self.base_url = base_url
        self.trust_env = False

    def request(self, method: Any, url: Any, *args: Any, **kwargs: Any) -> requests.Response:
        kwargs.setdefault("timeout", HTTP_SECONDS)
        response = super().request(method, self.base_url + str(url), *args, **kwargs)
        if not kwargs.get("stream"):
            check_answer(response, method)
        return response


@pytest.fixture(scope="session")
def hub() -> Iterator[LoopbackHub]:
    """The stand-in for the model hub that every server of the session asks."""
    with LoopbackHub() as running:
        yield running


@pytest.fixture(scope="session")
def server_environment(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Environment of every server: the loopback hub and a cache of its own."""
    return {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path_factory.mktemp("huggingface"))}


@pytest.fixture(scope="session")
def picture_host() -> Iterator[PictureHost]:
    """Where the session's server may fetch images from."""
    with PictureHost() as running:
        yield running


@pytest.fixture(scope="session")
def server(
    server_environment: Mapping[str, str],
    picture_host: PictureHost,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningServer]:
    """The session's server, with bridge, demo model and one standby."""
    running = start(
        tmp_path_factory.mktemp("home"),
        server_environment,
        image_url_trusted_addresses=ADDRESSES,
        image_url_ports=(80, 443, picture_host.port),
    )
    yield running
    status = running.stop()
    assert status == 0, "the server did not end cleanly"


@pytest.fixture(scope="session")
def channel(server: RunningServer) -> grpc.Channel:
    """A connection to the session's server over TCP."""
    return server.channel()


@pytest.fixture(scope="session")
def unix_channel(server: RunningServer) -> grpc.Channel:
    """A connection to the session's server over its unix socket: a trusted caller's."""
    return server.channel(unix=True)


@pytest.fixture(scope="session")
def inference(channel: grpc.Channel) -> inference_pb2_grpc.InferenceServiceStub:
    return inference_pb2_grpc.InferenceServiceStub(channel)


@pytest.fixture(scope="session")
def models(channel: grpc.Channel) -> model_pb2_grpc.ModelServiceStub:
    return model_pb2_grpc.ModelServiceStub(channel)


@pytest.fixture(scope="session")
def local_models(unix_channel: grpc.Channel) -> model_pb2_grpc.ModelServiceStub:
    """ModelService over the unix socket."""
    return model_pb2_grpc.ModelServiceStub(unix_channel)


@pytest.fixture(scope="session")
def system(channel: grpc.Channel) -> system_pb2_grpc.SystemServiceStub:
    return system_pb2_grpc.SystemServiceStub(channel)


@pytest.fixture(scope="session")
def http(server: RunningServer) -> Iterator[RestSession]:
    """The session's server over REST."""
    with RestSession(server.rest_url) as session:
        yield session


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    folder = tmp_path_factory.mktemp("models")
    return TinyModels(
        llama=build_tiny(folder / "tiny-llama", "llama"),
        qwen3=build_tiny(folder / "tiny-qwen3", "qwen3", seed=2),
        long=build_tiny(folder / "tiny-long", "llama", context_length=32_768, layers=2, seed=3),
    )


@pytest.fixture(scope="session")
def demo_tokenizer() -> Any:
    """The demo model's tokenizer, as the library reads it."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture
def start_server(
    server_environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., RunningServer]]:
    """Starts servers of a test's own: `start_server(stall_seconds=2, home=None, environment={}, ...)`.

    Options are those of ServerConfig; without any it has neither bridge nor standby. What still runs at the end
    of the test is stopped.
    """
    running: list[RunningServer] = []

    def start_one(
        home: Path | None = None, environment: Mapping[str, str] | None = None, **options: Any
    ) -> RunningServer:
        options = {"bridge": False, "standby_count": 0, **options}
        server = start(
            home or tmp_path_factory.mktemp("own"), {**server_environment, **(environment or {})}, **options
        )
        running.append(server)
        return server

    yield start_one
    for server in running:
        if server.process.poll() is None:
            server.stop()
