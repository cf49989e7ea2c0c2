"""Every setting takes effect on a running server, and a change of settings keeps its promises over gRPC."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from mlxgui.v1 import (
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
)
from tests.conftest import TinyModels
from tests.loopback_hub import LoopbackHub
from tests.support_calls import (
    CALL_SECONDS,
    chat,
    completion,
    endless,
    fails,
    last_operation,
    text_of,
    until_first_delta,
)
from tests.support_metrics import wait_until
from tests.support_server import RunningServer, start
from tests.support_settings import details, update

System = system_pb2_grpc.SystemServiceStub
FRANCE = ("What is the capital of France?", "The capital of France is Paris.")
NOWHERE = system_pb2.SETTING_SOURCE_DEFAULT


@pytest.fixture(scope="module")
def own(
    server_environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory, tiny_models: TinyModels
) -> Iterator[RunningServer]:
    """A server whose settings may be changed, with a tiny model beside the demo."""
    running = start(tmp_path_factory.mktemp("settings"), server_environment, bridge=False)
    install = model_pb2.InstallModelRequest(local_directory=str(tiny_models.llama), name="tiny")
    last_operation(model_pb2_grpc.ModelServiceStub(running.channel(unix=True)).InstallModel(install))
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def own_system(own: RunningServer) -> System:
    return System(own.channel())


@pytest.fixture(scope="module")
def own_models(own: RunningServer) -> model_pb2_grpc.ModelServiceStub:
    return model_pb2_grpc.ModelServiceStub(own.channel())


@pytest.fixture(scope="module")
def own_inference(own: RunningServer) -> inference_pb2_grpc.InferenceServiceStub:
    return inference_pb2_grpc.InferenceServiceStub(own.channel())


def load(models: model_pb2_grpc.ModelServiceStub, name: str) -> None:
    request = model_pb2.LoadModelRequest(name=name)
    assert last_operation(models.LoadModel(request, timeout=CALL_SECONDS)).success.name == name


def in_memory(models: model_pb2_grpc.ModelServiceStub) -> dict[str, model_pb2.LoadedModel]:
    snapshot = models.GetManagerStatus(model_pb2.GetManagerStatusRequest()).snapshot
    return {model.name: model for model in snapshot.loaded_models}


# On the session's server: nothing of this changes it.


def test_the_settings_are_those_of_the_document_and_where_they_come_from(system: System) -> None:
    """All keys in the order of the contract, each with its source; what cannot act says so."""
    answer = system.GetSettings(system_pb2.GetSettingsRequest())
    keys = [field.name for field in system_pb2.Settings.DESCRIPTOR.fields]
    assert [detail.key for detail in answer.details] == keys
    found = {detail.key: detail for detail in answer.details}
    assert found["server_port"].source == system_pb2.SETTING_SOURCE_CONFIG_FILE
    assert found["max_concurrent_models"].source == NOWHERE
    assert "Without effect" in found["enable_system_tray"].note
    assert not any(detail.pending_restart for detail in answer.details)
    settings = answer.settings
    assert (settings.max_concurrent_requests, settings.max_concurrent_models) == (32, 3)
    assert (settings.auto_unload_inactive_models, settings.model_inactivity_timeout_minutes) == (True, 30)
    assert (settings.log_level, settings.huggingface_cache_dir) == ("INFO", "")


@pytest.mark.parametrize(
    ("values", "reset", "code", "reason", "field"),
    [
        ({}, [], "INVALID_ARGUMENT", "INVALID_PARAMETER", "update_mask"),
        ({"max_concurrent_models": 0}, [], "INVALID_ARGUMENT", "INVALID_PARAMETER", ""),
        ({"max_concurrent_models": -1}, [], "INVALID_ARGUMENT", "INVALID_PARAMETER", ""),
        ({"server_port": 65_536}, [], "INVALID_ARGUMENT", "INVALID_PARAMETER", ""),
        ({"max_model_memory_gb": float("nan")}, [], "INVALID_ARGUMENT", "INVALID_PARAMETER", ""),
        ({"log_level": "LOUD"}, [], "INVALID_ARGUMENT", "INVALID_PARAMETER", ""),
        ({"huggingface_cache_dir": "models"}, [], "INVALID_ARGUMENT", "INVALID_PARAMETER", ""),
        ({"bind_to_all_interfaces": True}, [], "INVALID_ARGUMENT", "INVALID_PARAMETER", ""),
        ({"log_level": "INFO"}, ["log_level"], "INVALID_ARGUMENT", "INVALID_PARAMETER", "reset_mask"),
        ({}, ["colour"], "NOT_FOUND", "SETTING_NOT_FOUND", None),
        ({}, ["log_level.x"], "NOT_FOUND", "SETTING_NOT_FOUND", None),
        ({}, [""], "NOT_FOUND", "SETTING_NOT_FOUND", None),
    ],
)
def test_a_change_that_cannot_be_is_refused_by_name_and_changes_nothing(
    system: System, values: dict[str, Any], reset: list[str], code: str, reason: str, field: str | None
) -> None:
    before = system.GetSettings(system_pb2.GetSettingsRequest())
    others = {"max_context_length": 99} if values and not reset else {}
    failure = fails(lambda: update(system, *reset, **others, **values))
    assert (failure.code.name, failure.reason) == (code, reason)
    if field is not None:
        assert failure.fields == [field or f"settings.{next(iter(values))}"]
    assert system.GetSettings(system_pb2.GetSettingsRequest()) == before


def test_the_port_of_another_program_is_refused_naming_it(server: RunningServer, system: System) -> None:
    port = int(server.grpc_address.rpartition(":")[2])
    failure = fails(lambda: update(system, server_port=port))
    assert failure.fields == ["settings.server_port"] and str(server.process.pid) in failure.message


# On a server of our own, from here on in this order: each leaves the setting as it was.


def test_log_level(own: RunningServer, own_system: System) -> None:
    """At WARNING calls are not logged any more, at DEBUG their beginnings are too."""

    def ask(request_id: str) -> None:
        own_system.GetServerInfo(
            system_pb2.GetServerInfoRequest(), metadata=(("x-request-id", request_id),), timeout=CALL_SECONDS
        )

    ask("level-info")
    assert update(own_system, log_level="warning").settings.log_level == "WARNING"
    ask("level-warning")
    update(own_system, log_level="DEBUG")
    ask("level-debug")
    update(own_system, "log_level")
    ask("level-default")
    wait_until(lambda: "id=level-default code=OK" in own.log(), "the last call is logged")
    log = own.log()
    assert "id=level-info code=OK" in log and "level-warning" not in log
    assert "id=level-debug begins" in log and "id=level-debug code=OK" in log
    assert "id=level-default begins" not in log


def test_default_model(own_system: System, own_inference: inference_pb2_grpc.InferenceServiceStub) -> None:
    """Requests without a model, or for `default`, go to it; without one they are refused."""
    failure = fails(lambda: own_inference.Chat(chat(FRANCE[0], ""), timeout=CALL_SECONDS))
    assert (failure.code, failure.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["model"])
    assert fails(lambda: own_inference.Chat(chat("x", "default"))).reason == "MODEL_NOT_FOUND"
    update(own_system, default_model="demo")
    for name in ("", "default"):
        reply = own_inference.Chat(chat(FRANCE[0], name), timeout=CALL_SECONDS)
        assert (reply.model, text_of(reply)) == ("demo", FRANCE[1])
    counted = own_inference.CountTokens(
        inference_pb2.CountTokensRequest(prompt=inference_pb2.Prompt(text="One two")), timeout=CALL_SECONDS
    )
    assert counted.model == "demo" and counted.token_count
    gone = update(own_system, default_model="gone")
    assert "gone" in gone.details[0].note
    assert "gone" in fails(lambda: own_inference.Chat(chat("x", ""))).message
    update(own_system, "default_model")


def test_max_concurrent_requests(
    own_system: System,
    own_models: model_pb2_grpc.ModelServiceStub,
    own_inference: inference_pb2_grpc.InferenceServiceStub,
) -> None:
    """With 1 the second request waits for the first to end; with 2 both decode."""

    def counts() -> tuple[int, int]:
        demo = in_memory(own_models)["demo"]
        return demo.running_request_count, demo.waiting_request_count

    load(own_models, "demo")
    update(own_system, max_concurrent_requests=1)
    streams = [own_inference.ChatStream(endless("demo"), timeout=CALL_SECONDS) for _ in range(2)]
    wait_until(lambda: counts() == (1, 1), "one runs and one waits")
    update(own_system, max_concurrent_requests=2)
    for stream in streams:
        until_first_delta(stream)
    assert counts() == (2, 0)
    for stream in streams:
        stream.cancel()
    update(own_system, "max_concurrent_requests")


def test_auto_unload_and_its_time(own_system: System, own_models: model_pb2_grpc.ModelServiceStub) -> None:
    """When an idle model leaves follows both settings at once; what is due by them leaves at once."""
    load(own_models, "demo")

    def expiry_minutes() -> float:
        demo = in_memory(own_models)["demo"]
        return (demo.expire_time.ToNanoseconds() - demo.last_use_time.ToNanoseconds()) / 60e9

    assert expiry_minutes() == pytest.approx(30, abs=0.5)
    update(own_system, model_inactivity_timeout_minutes=7)
    assert expiry_minutes() == pytest.approx(7, abs=0.5)
    status = own_system.GetSystemStatus(system_pb2.GetSystemStatusRequest()).model_manager
    assert status.inactivity_timeout.seconds == 420 and status.auto_unload_enabled
    update(own_system, auto_unload_inactive_models=False)
    assert not in_memory(own_models)["demo"].HasField("expire_time")
    status = own_system.GetSystemStatus(system_pb2.GetSystemStatusRequest()).model_manager
    assert not status.auto_unload_enabled
    update(own_system, "auto_unload_inactive_models", "model_inactivity_timeout_minutes")


def test_max_concurrent_models(own_system: System, own_models: model_pb2_grpc.ModelServiceStub) -> None:
    """Lowered to 1, the model that was used least recently leaves at once."""
    load(own_models, "demo")
    load(own_models, "tiny")
    assert set(in_memory(own_models)) == {"demo", "tiny"}
    update(own_system, max_concurrent_models=1)
    wait_until(lambda: set(in_memory(own_models)) == {"tiny"}, "one of them is gone")
    update(own_system, "max_concurrent_models")


def test_max_model_memory(own_system: System, own_models: model_pb2_grpc.ModelServiceStub) -> None:
    """A model that cannot fit below the cap is refused in the document's words, with both numbers."""
    update(own_system, max_model_memory_gb=0.0625)
    failure = fails(
        lambda: own_models.LoadModel(model_pb2.LoadModelRequest(name="tiny"), timeout=CALL_SECONDS)
    )
    assert (failure.code, failure.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "INSUFFICIENT_MEMORY")
    assert failure.message.startswith("❌ Insufficient memory - This model requires")
    assert failure.message.endswith("available; max_model_memory_gb limits it")
    status = own_system.GetSystemStatus(system_pb2.GetSystemStatusRequest()).model_manager
    assert status.memory_budget_bytes <= 1024**3 // 16
    update(own_system, "max_model_memory_gb")


def test_the_gpu_and_the_context_of_models_that_are_loaded_from_then_on(
    own: RunningServer,
    own_system: System,
    own_models: model_pb2_grpc.ModelServiceStub,
    own_inference: inference_pb2_grpc.InferenceServiceStub,
) -> None:
    """Without the GPU the worker is told to compute on the CPU; prompt and completion end with the context."""
    own_models.UnloadModel(model_pb2.UnloadModelRequest(name="tiny"))
    update(own_system, enable_gpu_acceleration=False, max_context_length=24)
    load(own_models, "tiny")
    worker = psutil.Process(in_memory(own_models)["tiny"].process_id)
    assert "--cpu" in worker.cmdline()
    reply = own_inference.Generate(completion("One two", model="tiny", max_tokens=100), timeout=CALL_SECONDS)
    assert reply.usage.prompt_token_count + reply.usage.completion_token_count <= 24
    assert reply.choices[0].finish_reason == common_pb2.FINISH_REASON_LENGTH
    failure = fails(
        lambda: own_inference.Generate(completion("word " * 50, model="tiny"), timeout=CALL_SECONDS)
    )
    assert failure.reason == "CONTEXT_LENGTH_EXCEEDED"
    assert "24" in failure.message and "max_context_length" in failure.message
    update(own_system, "enable_gpu_acceleration", "max_context_length")
    note = details(own_system)["enable_gpu_acceleration"].note
    assert not note or "no GPU" in note


def test_huggingface_cache_dir(
    own_system: System,
    own_models: model_pb2_grpc.ModelServiceStub,
    hub: LoopbackHub,
    tiny_models: TinyModels,
    tmp_path: Path,
) -> None:
    """The next download goes there, into a folder that need not exist; models that are installed stay."""
    hub.add("acme/moved", tiny_models.llama)
    cache = tmp_path / "elsewhere" / "cache"
    before = own_models.GetModel(model_pb2.GetModelRequest(name="tiny")).model.path
    assert update(own_system, huggingface_cache_dir=f"{cache}/").settings.huggingface_cache_dir == str(cache)
    install = model_pb2.InstallModelRequest(model_id="acme/moved")
    model = last_operation(own_models.InstallModel(install, timeout=CALL_SECONDS)).success
    assert Path(model.path).is_relative_to(cache) and (Path(model.path) / "config.json").exists()
    update(own_system, "huggingface_cache_dir")
    assert own_models.GetModel(model_pb2.GetModelRequest(name="tiny")).model.path == before
    removed = own_models.DeleteModel(model_pb2.DeleteModelRequest(name="moved"), timeout=CALL_SECONDS)
    assert removed.removed_files and not Path(model.path).exists()


def test_a_setting_that_waits_for_a_restart_says_so(own_system: System) -> None:
    answer = update(own_system, preload_models=["demo", "nobody"], enable_system_tray=False)
    assert list(answer.pending_restart.paths) == ["preload_models"]
    assert list(answer.settings.preload_models) == [] and not answer.settings.enable_system_tray
    assert [detail.key for detail in answer.details] == ["enable_system_tray", "preload_models"]
    assert "after a restart" in answer.details[1].note and "Not installed: nobody" in answer.details[1].note
    answer = update(own_system, "preload_models", "enable_system_tray")
    assert not answer.pending_restart.paths and answer.settings.enable_system_tray
