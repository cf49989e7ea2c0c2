"""Installs and deletions of models that share their files meet: no entry is left without files."""

from collections.abc import Callable, Iterator
from pathlib import Path

from mlxgui.v1 import model_pb2, model_pb2_grpc
from mlxgui_grpc.failpoints import ENVIRONMENT
from mlxgui_grpc.hub_cache import is_complete
from tests.conftest import TinyModels
from tests.loopback_hub import LoopbackHub
from tests.support_calls import CALL_SECONDS, last_operation
from tests.support_server import RunningServer

StartServer = Callable[..., RunningServer]


def test_deleting_a_model_spares_the_files_of_one_that_is_being_installed(
    start_server: StartServer, hub: LoopbackHub, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """Its install has found the files in the cache and is writing the registry, slowly, when the other one goes."""
    hub.add("acme/shared", tiny_models.llama)
    server = start_server(
        hub_cache=str(tmp_path), register_demo=False, environment={ENVIRONMENT: "catalog.before-write:pause"}
    )
    models = model_pb2_grpc.ModelServiceStub(server.channel())

    def install(name: str) -> Iterator[model_pb2.InstallModelResponse]:
        request = model_pb2.InstallModelRequest(model_id="acme/shared", name=name)
        return models.InstallModel(request, timeout=CALL_SECONDS)

    assert last_operation(install("first")).HasField("success")
    snapshots = install("second")
    for snapshot in snapshots:
        if snapshot.operation.install.phase == model_pb2.InstallProgress.PHASE_REGISTERING:
            break
    deleted = models.DeleteModel(model_pb2.DeleteModelRequest(name="first"), timeout=CALL_SECONDS)
    second = last_operation(snapshots).success
    assert second.name == "second" and is_complete(Path(second.path))
    assert not deleted.removed_files and "'second'" in deleted.kept_reason
