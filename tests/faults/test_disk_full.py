"""The disk of a real server is full, in an install and when the registry is written: DISK_FULL, and nothing is lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import field_mask_pb2

from mlxgui.v1 import model_pb2, model_pb2_grpc, system_pb2, system_pb2_grpc
from tests.conftest import TinyModels
from tests.faults.small_disk import SmallDisk, small_disk
from tests.loopback_hub import LoopbackHub
from tests.support_calls import CALL_SECONDS, fails, last_operation, reason_of
from tests.support_metrics import wait_until
from tests.support_server import RunningServer, ServerDidNotStartError

__all__ = ["small_disk"]

StartServer = Callable[..., RunningServer]
FULL = (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL")
MODEL_ID = "acme/too-big"


class Own:
    """A server of this module's own."""

    def __init__(self, server: RunningServer) -> None:
        self.server = server
        self.models = model_pb2_grpc.ModelServiceStub(server.channel(unix=True))
        self.system = system_pb2_grpc.SystemServiceStub(server.channel(unix=True))

    def install(self, **source: Any) -> Any:
        return self.models.InstallModel(model_pb2.InstallModelRequest(**source), timeout=CALL_SECONDS)

    def names(self) -> list[str]:
        reply = self.models.ListModels(model_pb2.ListModelsRequest(), timeout=CALL_SECONDS)
        return [model.name for model in reply.models]

    def delete(self, name: str) -> Any:
        return self.models.DeleteModel(model_pb2.DeleteModelRequest(name=name), timeout=CALL_SECONDS)

    def set_timeout(self, minutes: int) -> Any:
        request = system_pb2.UpdateSettingsRequest(
            settings=system_pb2.Settings(model_inactivity_timeout_minutes=minutes),
            update_mask=field_mask_pb2.FieldMask(paths=["model_inactivity_timeout_minutes"]),
        )
        return self.system.UpdateSettings(request, timeout=CALL_SECONDS)

    def timeout(self) -> int:
        reply = self.system.GetSettings(system_pb2.GetSettingsRequest(), timeout=CALL_SECONDS)
        return reply.settings.model_inactivity_timeout_minutes


def test_a_full_disk_is_named_loses_nothing_and_is_survived(
    start_server: StartServer, small_disk: SmallDisk, hub: LoopbackHub, tiny_models: TinyModels
) -> None:
    home, cache = small_disk.path / "home", small_disk.path / "cache"
    options: dict[str, Any] = {"hub_cache": str(cache), "register_demo": False}
    own = Own(start_server(home, **options))
    assert last_operation(own.install(local_directory=str(tiny_models.llama), name="kept")).HasField(
        "success"
    )
    own.set_timeout(7)

    # In the middle of a file.
    hub.add(MODEL_ID, tiny_models.long)
    size_bytes = hub.file(MODEL_ID, "model.safetensors").size_bytes
    hold = hub.hold("model.safetensors", size_bytes // 2)
    snapshots = own.install(model_id=MODEL_ID)
    assert hold.reached.wait(CALL_SECONDS)
    partials = cache / "models--acme--too-big" / ".mlxgui"
    wait_until(
        lambda: any(part.stat().st_size >= size_bytes // 4 for part in partials.glob("*.part")),
        "half of it is there",
    )
    small_disk.fill()
    hold.release()
    operation = last_operation(snapshots)
    assert reason_of(operation) == "DISK_FULL" and str(cache) in operation.error.message

    # When the registry is written.
    def install_directory() -> Any:
        return own.install(local_directory=str(tiny_models.qwen3), name="later")

    for write in (install_directory, lambda: own.delete("kept"), lambda: own.set_timeout(9)):
        failure = fails(write)
        assert (failure.code, failure.reason) == FULL, failure
        assert own.names() == ["kept"] and own.timeout() == 7
    small_disk.free()
    assert last_operation(install_directory()).HasField("success")
    own.set_timeout(8)

    # A start without room says so; with room everything is there and works.
    small_disk.fill()
    own.server.kill()
    with pytest.raises(ServerDidNotStartError) as refused:
        start_server(home, **options)
    lines = refused.value.words.strip().splitlines()
    assert len(lines) == 1 and ("disk is full" in lines[0] or "No space left" in lines[0]), lines
    print(lines[0])
    small_disk.free()
    own = Own(start_server(home, **options))
    assert own.names() == ["kept", "later"] and own.timeout() == 8
    before = len(hub.fetches("model.safetensors"))
    model = last_operation(own.install(model_id=MODEL_ID)).success
    (resumed,) = hub.fetches("model.safetensors")[before:]
    assert resumed.range_start, "what had come is fetched again"
    content = (Path(model.path) / "model.safetensors").read_bytes()
    assert content == (tiny_models.long / "model.safetensors").read_bytes()
    own.delete("kept")
    own.set_timeout(9)
    assert own.names() == ["later", "too-big"] and own.timeout() == 9
