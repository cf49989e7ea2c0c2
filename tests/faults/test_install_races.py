"""Installs and deletions of models that share their files meet: no entry is left without files."""

from collections.abc import Callable, Iterator
from pathlib import Path

from mlxgui.v1 import model_pb2, model_pb2_grpc
from mlxgui_grpc.failpoints import ENVIRONMENT
from mlxgui_grpc.hub import Hub
from mlxgui_grpc.hub_cache import RepositoryFolder, is_complete
from tests.conftest import TinyModels
from tests.loopback_hub import LoopbackHub
from tests.support_calls import CALL_SECONDS, last_operation
from tests.support_metrics import wait_until
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


async def test_an_install_does_not_take_what_is_being_removed(
    start_server: StartServer, hub: LoopbackHub, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """A start removes a revision that an update had replaced, slowly, when somebody asks for that very revision."""
    hub.add("acme/replaced", tiny_models.llama)
    client = Hub(endpoint=hub.endpoint, cache_dir=tmp_path, token=None, offline=False)
    replaced = await client.download("acme/replaced", None, lambda progress: None)
    RepositoryFolder(tmp_path, "acme/replaced").mark_of_superseded(replaced.revision).touch()
    server = start_server(
        hub_cache=str(tmp_path), register_demo=False, environment={ENVIRONMENT: "hub.before-delete:pause"}
    )
    models = model_pb2_grpc.ModelServiceStub(server.channel())
    request = model_pb2.InstallModelRequest(model_id="acme/replaced")
    model = last_operation(models.InstallModel(request, timeout=CALL_SECONDS)).success
    wait_until(lambda: "removed revision" in server.log(), "the old files are gone")
    assert model.path == str(replaced.path) and is_complete(replaced.path)
