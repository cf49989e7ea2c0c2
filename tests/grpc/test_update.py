"""Going to a newer revision from the hub: the old one serves meanwhile, and its files go when nobody uses them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from mlxgui.v1 import inference_pb2_grpc, model_pb2, model_pb2_grpc, system_pb2, system_pb2_grpc
from tests.conftest import TinyModels
from tests.loopback_hub import LoopbackHub
from tests.support_calls import (
    CALL_SECONDS,
    completion,
    endless,
    fails,
    last_operation,
    reason_of,
    until_first_delta,
)
from tests.support_metrics import wait_until
from tests.support_server import RunningServer, start

Models = model_pb2_grpc.ModelServiceStub
Inference = inference_pb2_grpc.InferenceServiceStub
Install, Update = model_pb2.InstallModelRequest, model_pb2.UpdateModelRequest
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    """A hub of this module's own."""
    with LoopbackHub() as running:
        yield running


@pytest.fixture(scope="module")
def environment(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path_factory.mktemp("huggingface"))}


@pytest.fixture(scope="module")
def server(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    running = start(tmp_path_factory.mktemp("home"), environment, bridge=False, standby_count=0)
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def models(server: RunningServer) -> Models:
    return Models(server.channel())


@pytest.fixture(scope="module")
def inference(server: RunningServer) -> Inference:
    return Inference(server.channel())


@pytest.fixture
def published(
    hub: LoopbackHub, tiny_models: TinyModels, models: Models, request: pytest.FixtureRequest
) -> Iterator[str]:
    """An installed repository that only this test uses."""
    model_id = f"acme/U-{request.node.name.replace('_', '-')[-60:]}"
    hub.add(model_id, tiny_models.llama)
    install(models, model_id=model_id)
    yield model_id
    hub.recover()
    for model in models.ListModels(model_pb2.ListModelsRequest(page_size=1000)).models:
        if model.huggingface_id == model_id:
            models.DeleteModel(model_pb2.DeleteModelRequest(name=model.name, force=True))


def install(models: Models, **fields: Any) -> model_pb2.Model:
    operation = last_operation(models.InstallModel(Install(**fields), timeout=CALL_SECONDS))
    assert not reason_of(operation), operation.error
    return operation.success


def update(models: Models, name: str, **fields: Any) -> model_pb2.Operation:
    return last_operation(models.UpdateModel(Update(name=name, **fields), timeout=CALL_SECONDS))


def get(models: Models, name: str) -> model_pb2.Model:
    return models.GetModel(model_pb2.GetModelRequest(name=name)).model


def changed(folder: Path, text: str = "changed") -> dict[str, bytes]:
    """The files of a model, and one more."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {**files, "notes.txt": text.encode()}


def test_a_newer_revision_replaces_the_old_one(
    hub: LoopbackHub, models: Models, published: str, tiny_models: TinyModels
) -> None:
    """The entry stays the same, uses and all; what both revisions have is not fetched again; the old files go."""
    before = get(models, published)
    newer = hub.add(published, changed(tiny_models.llama))
    fetched = len(hub.fetches(WEIGHTS))
    operation = update(models, published)

    assert (operation.kind, operation.model) == (model_pb2.Operation.KIND_UPDATE, before.name)
    after = operation.success
    assert (after.id, after.name, after.revision) == (before.id, before.name, newer)
    assert get(models, published) == after
    assert Path(after.path, "notes.txt").read_text() == "changed"
    assert len(hub.fetches(WEIGHTS)) == fetched
    assert not Path(before.path).exists()


def test_what_is_up_to_date_is_said_so(hub: LoopbackHub, models: Models, published: str) -> None:
    """The operation succeeds, and nothing is fetched."""
    before, fetched = get(models, published), len(hub.fetches())
    operation = update(models, published)
    assert operation.success == before
    assert [warning for warning in operation.warnings if "up to date" in warning]
    assert len(hub.fetches()) == fetched


def test_the_old_revision_serves_until_the_new_one_is_complete(
    hub: LoopbackHub, models: Models, inference: Inference, published: str, tiny_models: TinyModels
) -> None:
    """The stream that runs is not disturbed, others are answered; the files stay until the model has left memory."""
    name = get(models, published).name
    old = Path(get(models, published).path)
    stream = inference.ChatStream(endless(name, max_tokens=1500), timeout=CALL_SECONDS)
    until_first_delta(stream)
    hub.add(published, changed(tiny_models.qwen3))
    hold = hub.hold(WEIGHTS, 1000)
    snapshots = models.UpdateModel(Update(name=published), timeout=CALL_SECONDS)
    next(snapshots)
    assert hold.reached.wait(CALL_SECONDS)
    assert get(models, name).path == str(old)
    joined = models.UpdateModel(Update(name=name), timeout=CALL_SECONDS)
    assert next(joined).operation.id == next(snapshots).operation.id
    refusal = fails(lambda: models.UpdateModel(Update(name=name, revision="other"), timeout=CALL_SECONDS))
    assert refusal.reason == "MODEL_IN_USE"
    inference.Generate(completion("a", model=name, max_tokens=2), timeout=CALL_SECONDS)
    hold.release()
    operation = last_operation(snapshots)
    assert not reason_of(operation), operation.error
    assert operation.success.architecture == "qwen3"
    assert operation.success.state == model_pb2.MODEL_STATE_LOADED
    assert [warning for warning in operation.warnings if "until it is next loaded" in warning]

    assert sum(1 for event in stream if event.HasField("end")) == 1
    inference.Generate(completion("a", model=name, max_tokens=2), timeout=CALL_SECONDS)
    assert (old / WEIGHTS).exists()
    models.UnloadModel(model_pb2.UnloadModelRequest(name=name))
    update(models, published)  # Which looks for what nobody uses any more.
    assert not old.exists()
    inference.Generate(completion("a", model=name, max_tokens=2), timeout=CALL_SECONDS)


def test_a_branch_is_followed(
    hub: LoopbackHub, models: Models, tiny_models: TinyModels, published: str
) -> None:
    """The one that was installed, until an update names another."""
    hub.add(published, changed(tiny_models.llama, "dev 1"), branch="dev")
    install(models, model_id=published, name="on-dev", revision="dev")
    hub.add(published, changed(tiny_models.llama, "main 2"))
    dev = hub.add(published, changed(tiny_models.llama, "dev 2"), branch="dev")
    assert update(models, "on-dev").success.revision == dev

    main = hub.add(published, changed(tiny_models.llama, "main 3"))
    assert update(models, "on-dev", revision="main").success.revision == main
    main = hub.add(published, changed(tiny_models.llama, "main 4"))
    assert update(models, "on-dev").success.revision == main
    assert get(models, published).revision != main
    operation = update(models, "on-dev", revision="nowhere")
    assert reason_of(operation) == "HUB_REPO_NOT_FOUND"
    assert get(models, "on-dev").revision == main


def test_a_revision_that_cannot_be_loaded_does_not_replace_a_good_one(
    hub: LoopbackHub, models: Models, published: str, tiny_models: TinyModels
) -> None:
    """The old one goes on to serve, and the bad files are not kept."""
    before = get(models, published)
    files = changed(tiny_models.llama) | {"config.json": b'{"model_type": "llama", "model_file": "x.py"}'}
    bad = hub.add(published, files)
    assert reason_of(update(models, published)) == "MODEL_UNSAFE"
    assert get(models, published).path == before.path
    assert Path(before.path, WEIGHTS).exists()
    assert not (Path(before.path).parent / bad).exists()


def test_files_that_another_entry_uses_stay(
    hub: LoopbackHub, models: Models, published: str, tiny_models: TinyModels
) -> None:
    """They go with the last entry that has them."""
    old = Path(install(models, model_id=published, name="stays-behind").path)
    hub.add(published, changed(tiny_models.llama))
    update(models, published)
    assert (old / WEIGHTS).exists()
    models.DeleteModel(model_pb2.DeleteModelRequest(name="stays-behind", force=True))
    assert not old.exists()


def test_reinstalling_a_moved_branch_is_an_update(
    hub: LoopbackHub, models: Models, inference: Inference, published: str, tiny_models: TinyModels
) -> None:
    """With force: what is in memory is not touched, and the old revision's files do not stay for ever."""
    before = get(models, published)
    inference.Generate(completion("a", model=before.name, max_tokens=1), timeout=CALL_SECONDS)
    newer = hub.add(published, changed(tiny_models.llama))
    after = install(models, model_id=published, force=True)
    assert (after.id, after.revision) == (before.id, newer)
    assert after.state == model_pb2.MODEL_STATE_LOADED and Path(before.path).exists()
    models.UnloadModel(model_pb2.UnloadModelRequest(name=before.name))
    update(models, published)
    assert not Path(before.path).exists()


def test_what_is_not_from_the_hub_cannot_be_updated(models: Models) -> None:
    failure = fails(lambda: models.UpdateModel(Update(name="demo"), timeout=CALL_SECONDS))
    assert (failure.code, failure.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_INCOMPATIBLE")
    failure = fails(lambda: models.UpdateModel(Update(name="absent"), timeout=CALL_SECONDS))
    assert failure.reason == "MODEL_NOT_FOUND"


def test_a_deletion_ends_an_update_when_forced(
    hub: LoopbackHub, models: Models, published: str, tiny_models: TinyModels
) -> None:
    """Refused without force; what was deleted does not come back."""
    hub.add(published, changed(tiny_models.qwen3))
    hold = hub.hold(WEIGHTS, 1000)
    snapshots = models.UpdateModel(Update(name=published), timeout=CALL_SECONDS)
    assert hold.reached.wait(CALL_SECONDS)
    failure = fails(lambda: models.DeleteModel(model_pb2.DeleteModelRequest(name=published)))
    assert failure.reason == "MODEL_IN_USE"
    models.DeleteModel(model_pb2.DeleteModelRequest(name=published, force=True))
    hold.release()
    assert reason_of(last_operation(snapshots)) == "CANCELLED"
    assert fails(lambda: get(models, published)).reason == "MODEL_NOT_FOUND"


def test_another_cache_folder_is_for_new_installs_and_the_next_start_tidies_up(
    hub: LoopbackHub,
    environment: dict[str, str],
    tiny_models: TinyModels,
    tmp_path: Path,
) -> None:
    """What was installed before is updated and deleted where it is; a server that is killed with a replaced revision
    in memory leaves it to the next one, and so one does half a download that nobody repeats."""
    hub.add("acme/early", tiny_models.llama)
    hub.add("acme/late", tiny_models.qwen3)
    first = start(tmp_path / "home", environment, bridge=False, standby_count=0)
    models = Models(first.channel())
    old = Path(install(models, model_id="acme/early").path)
    load = models.LoadModel(model_pb2.LoadModelRequest(name="early"), timeout=CALL_SECONDS)
    assert not reason_of(last_operation(load))
    folder = tmp_path / "other"
    system = system_pb2_grpc.SystemServiceStub(first.channel())
    settings = system_pb2.Settings(huggingface_cache_dir=str(folder))
    system.UpdateSettings(
        system_pb2.UpdateSettingsRequest(
            settings=settings, update_mask=FieldMask(paths=["huggingface_cache_dir"])
        )
    )
    assert Path(install(models, model_id="acme/early").path) == old
    hub.add("acme/early", changed(tiny_models.llama))
    early = update(models, "early").success
    assert Path(early.path).parent == old.parent and old.exists()
    assert Path(install(models, model_id="acme/late").path).is_relative_to(folder)
    first.kill()
    part = old.parents[2] / "models--acme--forgotten" / ".mlxgui" / "0123.part"
    part.parent.mkdir(parents=True)
    part.touch()
    os.utime(part, (0, 0))

    second = start(tmp_path / "home", environment, bridge=False, standby_count=0)
    models = Models(second.channel())
    wait_until(lambda: not old.exists(), "the replaced revision is gone")
    wait_until(lambda: not part.exists(), "half a download is gone")
    assert Path(early.path).exists()
    removal = models.DeleteModel(model_pb2.DeleteModelRequest(name="early"))
    assert removal.removed_files and not Path(early.path).exists()
    assert second.stop() == 0
