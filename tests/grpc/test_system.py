"""What the server says about itself and its machine, on one that can run MLX and on one that cannot."""

import os
import platform
from collections.abc import Callable
from pathlib import Path

import grpc
import psutil
import pytest
from google.protobuf import duration_pb2

from mlxgui.v1 import (
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
)
from tests.support_calls import CALL_SECONDS, chat, fails, last_operation
from tests.support_metrics import wait_until
from tests.support_server import RunningServer

System = system_pb2_grpc.SystemServiceStub
SENTENCE = "❌ MLX requires Apple Silicon (M1/M2/M3) hardware"


def status_of(system: System) -> system_pb2.GetSystemStatusResponse:
    return system.GetSystemStatus(system_pb2.GetSystemStatusRequest(), timeout=CALL_SECONDS)


def test_the_machine_is_the_one_that_this_is(system: System) -> None:
    status = status_of(system)
    assert status.state == system_pb2.SERVER_STATE_RUNNING
    host = status.system
    assert (host.platform, host.architecture) == (platform.system(), platform.machine())
    assert host.processor and host.mlx_compatible
    assert host.is_apple_silicon == (platform.system() == "Darwin" and platform.machine() == "arm64")
    memory = host.memory
    assert 0 < memory.total_bytes <= psutil.virtual_memory().total
    assert memory.used_bytes == memory.total_bytes - memory.available_bytes
    assert memory.percent_used == round(100 * memory.used_bytes / memory.total_bytes, 1)


@pytest.mark.skipif(platform.system() != "Linux", reason="a Mac has a GPU")
def test_without_a_gpu_there_is_no_gpu_memory(system: System) -> None:
    """Also once a worker has told what MLX runs on."""
    wait_until(
        lambda: bool(system.GetServerInfo(system_pb2.GetServerInfoRequest()).engine_versions), "a worker told"
    )
    status = status_of(system)
    assert status.system.mlx_compatible and not status.system.HasField("gpu_memory")
    settings = system.GetSettings(system_pb2.GetSettingsRequest())
    (note,) = [detail.note for detail in settings.details if detail.key == "enable_gpu_acceleration"]
    assert "Without effect" in note and "no GPU" in note


def test_the_manager_s_part_is_as_it_is_now(system: System, models: model_pb2_grpc.ModelServiceStub) -> None:
    """No stale cache: an answer after a load has it, one after an unload has not."""
    models.UnloadModel(model_pb2.UnloadModelRequest(name="demo"))
    before = status_of(system).model_manager
    last_operation(models.LoadModel(model_pb2.LoadModelRequest(name="demo"), timeout=CALL_SECONDS))
    loaded = status_of(system).model_manager
    assert loaded.loaded_model_count == before.loaded_model_count + 1
    assert loaded.total_model_memory_bytes > before.total_model_memory_bytes
    assert 0 < loaded.memory_usage_percent < 100 and loaded.memory_budget_bytes > 0
    assert (loaded.max_concurrent_models, loaded.max_tokens_limit) == (3, 16_384)
    assert loaded.auto_unload_enabled and loaded.inactivity_timeout.seconds == 1800
    models.UnloadModel(model_pb2.UnloadModelRequest(name="demo"))
    assert status_of(system).model_manager.loaded_model_count == before.loaded_model_count


def test_every_rpc_of_the_service_is_there(system: System) -> None:
    capabilities = system.GetServerInfo(system_pb2.GetServerInfoRequest()).capabilities
    names = system_pb2.DESCRIPTOR.services_by_name["SystemService"].methods_by_name
    assert {f"SystemService.{name}" for name in names} <= set(capabilities)


@pytest.mark.parametrize("seconds", [(-1, 0), (0, -1)])
def test_a_negative_grace_is_refused_and_ends_nothing(system: System, seconds: tuple[int, int]) -> None:
    grace = duration_pb2.Duration(seconds=seconds[0], nanos=seconds[1])
    for failure in (
        fails(lambda: system.Shutdown(system_pb2.ShutdownRequest(grace=grace))),
        fails(lambda: system.Restart(system_pb2.RestartRequest(grace=grace))),
    ):
        assert (failure.code, failure.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["grace"])
    assert status_of(system).state == system_pb2.SERVER_STATE_RUNNING


def test_where_mlx_does_not_run_the_document_s_sentence_says_so(
    start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    """The server starts and answers; loads and requests are refused at once with the sentence and the real cause."""
    broken = tmp_path / "path" / "mlx"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("")
    (broken / "core.py").write_text('raise ImportError("libmlx is not for this machine")')
    path = os.pathsep.join([str(broken.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    server = start_server(environment={"PYTHONPATH": path})
    channel = server.channel()
    system = System(channel)
    inference = inference_pb2_grpc.InferenceServiceStub(channel)
    models = model_pb2_grpc.ModelServiceStub(channel)
    load = model_pb2.LoadModelRequest(name="demo")
    for failure in (
        fails(lambda: inference.Chat(chat("Hello"), timeout=CALL_SECONDS)),
        fails(lambda: models.LoadModel(load, timeout=CALL_SECONDS)),
    ):
        assert (failure.code, failure.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "HARDWARE_INCOMPATIBLE",
        )
        assert failure.message.startswith(SENTENCE) and "libmlx is not for this machine" in failure.message
    host = status_of(system).system
    assert not host.mlx_compatible and not host.HasField("gpu_memory")
