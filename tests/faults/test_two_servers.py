"""Two servers and one state folder: the second is refused while the first lives, and takes over when it is killed."""

import socket
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mlxgui.v1 import model_pb2, model_pb2_grpc, system_pb2, system_pb2_grpc
from tests.conftest import TinyModels
from tests.loopback_hub import LoopbackHub
from tests.support_calls import CALL_SECONDS, last_operation
from tests.support_metrics import wait_until
from tests.support_server import RunningServer, ServerDidNotStartError

StartServer = Callable[..., RunningServer]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_the_second_is_refused_and_takes_over_the_moment_the_first_is_killed(
    start_server: StartServer, hub: LoopbackHub, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """With its ports, although the bridge and the download of the first are about to end only now."""
    hub.add("acme/inherited", tiny_models.long)
    hold = hub.hold("model.safetensors", 100_000)
    home = tmp_path / "home"
    options = {
        "bridge": True,
        "register_demo": False,
        "hub_cache": str(tmp_path / "cache"),
        "port": free_port(),
        "grpc_port": free_port(),
    }
    first = start_server(home, **options)
    models = model_pb2_grpc.ModelServiceStub(first.channel())
    directory = model_pb2.InstallModelRequest(local_directory=str(tiny_models.llama), name="kept")
    local = model_pb2_grpc.ModelServiceStub(first.channel(unix=True))
    assert last_operation(local.InstallModel(directory, timeout=CALL_SECONDS)).HasField("success")
    install = model_pb2.InstallModelRequest(model_id="acme/inherited")
    operation = next(models.InstallModel(install, timeout=CALL_SECONDS)).operation
    assert hold.reached.wait(CALL_SECONDS)
    assert len(first.descendants()) >= 2, "bridge and download run"

    with pytest.raises(ServerDidNotStartError) as refused:
        start_server(home, **{**options, "port": 0, "grpc_port": 0})
    (line,) = refused.value.words.strip().splitlines()
    assert str(first.process.pid) in line and str(home) in line

    descendants = first.descendants()
    first.kill()
    second = start_server(home, **options)
    assert (second.rest_url, second.grpc_address) == (first.rest_url, first.grpc_address)
    system = system_pb2_grpc.SystemServiceStub(second.channel())
    info = system.GetServerInfo(system_pb2.GetServerInfoRequest(), timeout=CALL_SECONDS)
    assert info.process_id == second.process.pid
    models = model_pb2_grpc.ModelServiceStub(second.channel())
    lost = models.GetOperation(model_pb2.GetOperationRequest(id=operation.id)).operation
    assert lost.done and lost.HasField("error")
    hold.release()
    assert last_operation(models.InstallModel(install, timeout=CALL_SECONDS)).HasField("success")
    found = models.ListModels(model_pb2.ListModelsRequest(), timeout=CALL_SECONDS).models
    assert [model.name for model in found] == ["inherited", "kept"]
    wait_until(lambda: not any(map(psutil.Process.is_running, descendants)), "nothing of the first is left")
