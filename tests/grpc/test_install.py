"""Installing from the hub and from folders, as operations; deleting what is ours and nothing else."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from mlxgui.v1 import inference_pb2_grpc, model_pb2, model_pb2_grpc
from tests.conftest import TinyModels
from tests.loopback_hub import LoopbackHub
from tests.support_calls import CALL_SECONDS, completion, fails, last_operation, reason_of
from tests.support_metrics import wait_until
from tests.support_models import build_tiny
from tests.support_server import RunningServer

Models = model_pb2_grpc.ModelServiceStub
Install = model_pb2.InstallModelRequest
NOT_FOUND, PRECONDITION = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION
DOWNLOADING = model_pb2.InstallProgress.PHASE_DOWNLOADING


def install(models: Models, **fields: Any) -> model_pb2.Operation:
    return last_operation(models.InstallModel(Install(**fields), timeout=CALL_SECONDS))


def delete(models: Models, name: str, **fields: Any) -> model_pb2.DeleteModelResponse:
    return models.DeleteModel(model_pb2.DeleteModelRequest(name=name, **fields))


def has_part(folder: Path, byte_count: int) -> bool:
    """A file on its way has come so far."""
    return any(part.stat().st_size >= byte_count for part in folder.glob("*.part"))


def exists(models: Models, name: str) -> bool:
    try:
        models.GetModel(model_pb2.GetModelRequest(name=name))
    except grpc.RpcError as error:
        assert error.code() == NOT_FOUND
        return False
    return True


@pytest.fixture
def published(
    hub: LoopbackHub, tiny_models: TinyModels, models: Models, request: pytest.FixtureRequest
) -> Iterator[str]:
    """A repository on the hub that only this test uses; what it installs of it is deleted after."""
    model_id = f"acme/M-{request.node.name.replace('_', '-')[-60:]}"
    hub.add(model_id, tiny_models.llama)
    yield model_id
    hub.recover()
    page = models.ListModels(model_pb2.ListModelsRequest(page_size=1000))
    for model in page.models:
        if model.huggingface_id == model_id:
            delete(models, model.name, force=True)


def test_a_hub_model_is_installed_with_progress_in_bytes_and_served(
    models: Models,
    inference: inference_pb2_grpc.InferenceServiceStub,
    published: str,
    tiny_models: TinyModels,
) -> None:
    """Snapshots of one operation: sizes known, bytes never fewer, all of them at the end; then it answers."""
    snapshots = [s.operation for s in models.InstallModel(Install(model_id=published), timeout=CALL_SECONDS)]

    total = sum(file.stat().st_size for file in tiny_models.llama.iterdir())
    done = [snapshot.install.done_bytes for snapshot in snapshots]
    assert {snapshot.id for snapshot in snapshots} == {snapshots[0].id}
    assert done == sorted(done) and done[-1] == total
    last = snapshots[-1]
    assert (last.install.total_bytes, last.install.done_file_count, last.install.total_file_count) == (
        total,
        *[len(list(tiny_models.llama.iterdir()))] * 2,
    )
    assert [snapshot.done for snapshot in snapshots] == [False] * (len(snapshots) - 1) + [True]
    model = last.success
    assert (model.name, model.huggingface_id, model.author) == (
        published.partition("/")[2].lower(),
        published,
        "acme",
    )
    assert model.source == model_pb2.MODEL_SOURCE_HUB and len(model.revision) == 40
    # By installed name and by hub id, in any case.
    for name in (model.name, published, published.upper()):
        assert models.GetModel(model_pb2.GetModelRequest(name=name)).model.id == model.id
    reply = inference.Generate(completion("a", model=published.upper(), max_tokens=2), timeout=CALL_SECONDS)
    assert (reply.model, reply.usage.completion_token_count) == (model.name, 2)

    removal = delete(models, published)  # Loaded and idle: unloaded first.
    assert (removal.removed_files, removal.kept_reason, removal.freed_bytes >= total) == (True, "", True)
    assert not Path(model.path).exists() and not exists(models, published)


def test_what_is_there_needs_no_second_download(models: Models, hub: LoopbackHub, published: str) -> None:
    """Installing again, under another name too, asks the hub for no file; the files go with the last of both."""
    first = install(models, model_id=published).success
    fetched = len(hub.fetches())
    assert install(models, model_id=published).success.id == first.id
    second = install(models, model_id=published, name="another-name").success
    assert (second.path, len(hub.fetches())) == (first.path, fetched)
    kept = delete(models, first.name)
    assert not kept.removed_files and "another-name" in kept.kept_reason
    assert Path(second.path, "config.json").exists()
    assert delete(models, second.name).removed_files
    assert not Path(second.path).exists()


def test_deleting_without_files_keeps_them(models: Models, published: str) -> None:
    model = install(models, model_id=published).success
    kept = delete(models, model.name, remove_files=False)
    assert not kept.removed_files and not kept.kept_reason and Path(model.path, "config.json").exists()
    assert not exists(models, model.name)
    again = install(models, model_id=published).success
    assert again.id != model.id, "numbers of entries are never used again"
    assert delete(models, again.name).removed_files


def test_two_installs_of_one_model_are_one_operation(
    models: Models, hub: LoopbackHub, published: str
) -> None:
    """The second caller joins: same id, same bytes, one download; dropping a stream only detaches."""
    hold = hub.hold("model.safetensors", 1000)
    first = models.InstallModel(Install(model_id=published), timeout=CALL_SECONDS)
    operation_id = next(first).operation.id
    assert hold.reached.wait(CALL_SECONDS)
    second = models.InstallModel(Install(model_id=published), timeout=CALL_SECONDS)
    assert next(second).operation.id == operation_id
    taken = fails(
        lambda: models.InstallModel(Install(model_id="acme/other", name=published.partition("/")[2]))
    )
    assert taken.reason == "MODEL_ALREADY_EXISTS"
    running = models.ListOperations(model_pb2.ListOperationsRequest()).operations
    assert [operation.id for operation in running] == [operation_id]
    first.cancel()
    watch = models.WatchOperation(model_pb2.WatchOperationRequest(id=operation_id), timeout=CALL_SECONDS)
    assert not next(watch).operation.done
    hold.release()
    assert last_operation(second).HasField("success")
    assert last_operation(watch).success.huggingface_id == published
    got = models.GetOperation(model_pb2.GetOperationRequest(id=operation_id)).operation
    assert got.done and got.install.done_bytes == got.install.total_bytes > 0
    assert len(hub.fetches("model.safetensors")) >= 1
    listed = models.ListOperations(model_pb2.ListOperationsRequest(include_done=True)).operations
    assert listed[0].id == operation_id and listed[0].done
    assert not models.ListOperations(model_pb2.ListOperationsRequest()).operations


def test_the_same_request_id_is_the_same_operation(models: Models, published: str) -> None:
    first = install(models, model_id=published, request_id="repeat-me")
    assert install(models, model_id=published, request_id="repeat-me").id == first.id
    assert install(models, model_id=published, request_id="another").id != first.id
    for fields in (
        {"model_id": published, "request_id": "x" * 37},
        {"model_id": published, "request_id": "repeat-me", "name": "another"},
        {"model_id": "acme/other", "request_id": "repeat-me"},
    ):
        failure = fails(lambda fields=fields: models.InstallModel(Install(**fields)))  # type: ignore[misc]
        assert (failure.code, failure.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["request_id"])


def test_a_repeat_of_what_failed_begins_anew(models: Models) -> None:
    first = install(models, model_id="nobody/nothing", request_id="fails")
    again = install(models, model_id="nobody/nothing", request_id="fails")
    assert reason_of(first) == reason_of(again) == "HUB_REPO_NOT_FOUND" and first.id != again.id


def test_what_is_in_the_cache_is_listed_as_available(
    models: Models, hub: LoopbackHub, published: str, tiny_models: TinyModels
) -> None:
    """Until it is installed; an installed model of the same name goes before it."""

    def available() -> dict[str, model_pb2.Model]:
        request = model_pb2.ListModelsRequest(
            include_available=True, states=[model_pb2.MODEL_STATE_AVAILABLE], page_size=1000
        )
        return {model.huggingface_id: model for model in models.ListModels(request).models}

    model = install(models, model_id=published).success
    assert published not in available()
    delete(models, model.name, remove_files=False)
    found = available()[published]
    assert (found.id, found.name, found.path, found.architecture) == (0, model.name, model.path, "llama")
    assert not found.HasField("create_time")
    assert not exists(models, published)
    install(models, model_id=published)


def test_a_cancelled_install_registers_nothing_and_resumes(
    models: Models, hub: LoopbackHub, published: str, server_environment: Mapping[str, str]
) -> None:
    """However many cancel at once; the repeat fetches only what is missing."""
    partials = Path(
        server_environment["HF_HOME"], "hub", "models--" + published.replace("/", "--"), ".mlxgui"
    )
    size = hub.file(published, "model.safetensors").size_bytes
    hold = hub.hold("model.safetensors", size // 2)
    stream = models.InstallModel(Install(model_id=published), timeout=CALL_SECONDS)
    operation_id = next(stream).operation.id
    assert hold.reached.wait(CALL_SECONDS)
    wait_until(lambda: has_part(partials, size // 4), "half of the file is there")
    half = models.GetOperation(model_pb2.GetOperationRequest(id=operation_id)).operation
    assert half.install.phase == DOWNLOADING and not half.done
    with ThreadPoolExecutor(6) as pool:
        request = model_pb2.CancelOperationRequest(id=operation_id)
        cancelled = list(pool.map(lambda _: models.CancelOperation(request, timeout=CALL_SECONDS), range(6)))
    hold.release()
    assert {reason_of(answer.operation) for answer in cancelled} == {"CANCELLED"}
    assert reason_of(last_operation(stream)) == "CANCELLED"
    assert not exists(models, published)
    before = len(hub.fetches("model.safetensors"))
    assert install(models, model_id=published).HasField("success")
    (resumed,) = hub.fetches("model.safetensors")[before:]
    assert resumed.range_start is not None and resumed.range_start > 0


def test_deleting_a_model_that_is_being_installed_is_refused_or_ends_that(
    models: Models, hub: LoopbackHub, published: str
) -> None:
    """By name and by hub id; it does not appear afterwards."""
    for name in (published, published.partition("/")[2].lower()):
        hold = hub.hold("model.safetensors", 1000)
        stream = models.InstallModel(Install(model_id=published), timeout=CALL_SECONDS)
        operation_id = next(stream).operation.id
        assert hold.reached.wait(CALL_SECONDS)
        failure = fails(lambda name=name: delete(models, name))  # type: ignore[misc]
        assert failure.reason == "MODEL_IN_USE" and operation_id in failure.message
        removal = delete(models, name, force=True)
        hold.release()
        assert not removal.removed_files and "cancelled" in removal.kept_reason
        assert reason_of(last_operation(stream)) == "CANCELLED"
        assert not exists(models, published)
        assert fails(lambda name=name: delete(models, name)).code == NOT_FOUND  # type: ignore[misc]


def test_a_broken_connection_is_survived_or_resumed(models: Models, hub: LoopbackHub, published: str) -> None:
    hub.cut("model.safetensors", 3000)
    operation = install(models, model_id=published)
    if not operation.HasField("success"):
        assert reason_of(operation) == "HUB_UNAVAILABLE"
        assert install(models, model_id=published).HasField("success")
    assert exists(models, published)


def test_a_file_that_is_not_what_was_promised_is_refused(
    models: Models, hub: LoopbackHub, tmp_path: Path
) -> None:
    hub.add("acme/lies", build_tiny(tmp_path / "lies", seed=99))
    hub.corrupt("acme/lies", "model.safetensors")
    operation = install(models, model_id="acme/lies")
    assert operation.HasField("error") and "model.safetensors" in operation.error.message
    assert not exists(models, "acme/lies")


def test_missing_and_gated_repositories_are_told_apart(
    models: Models, hub: LoopbackHub, tiny_models: TinyModels
) -> None:
    assert reason_of(install(models, model_id="nobody/nothing")) == "HUB_REPO_NOT_FOUND"
    hub.add("acme/gated", tiny_models.llama, gated=True)
    gated = install(models, model_id="acme/gated")
    assert reason_of(gated) == "HUB_ACCESS_DENIED" and "HF_TOKEN" in gated.error.message
    hub.add("acme/secret", tiny_models.llama, private=True)
    assert reason_of(install(models, model_id="acme/secret")) in ("HUB_REPO_NOT_FOUND", "HUB_ACCESS_DENIED")
    hub.fail(503)
    try:
        assert reason_of(install(models, model_id="nobody/else")) == "HUB_UNAVAILABLE"
    finally:
        hub.recover()
    for name in ("nobody/nothing", "acme/gated", "acme/secret", "nobody/else"):
        assert not exists(models, name)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("model_id", {}),
        ("model_id", {"model_id": "no-owner"}),
        ("model_id", {"model_id": "../../etc"}),
        ("model_id", {"model_id": "a/b/c"}),
        ("model_id", {"model_id": "a/..b"}),
        ("name", {"model_id": "a/b", "name": "has/slash"}),
        ("name", {"model_id": "a/b", "name": "x" * 97}),
        ("name", {"model_id": "a/b", "name": ".hidden"}),
        ("name", {"model_id": "a/b", "name": "con"}),
        ("revision", {"model_id": "a/b", "revision": "../x"}),
        ("local_directory", {"local_directory": "relative/path"}),
        ("local_directory", {"local_directory": "/nonexistent/folder"}),
        ("local_directory", {"local_directory": "/a\0b"}),
        ("local_directory", {"local_directory": "/" + "a" * 5_000}),
        ("revision", {"local_directory": "/", "revision": "main"}),
    ],
)
def test_a_bad_install_is_refused_by_field(local_models: Models, field: str, fields: dict[str, Any]) -> None:
    failure = fails(lambda: local_models.InstallModel(Install(**fields)))
    assert (failure.code, failure.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


def test_a_name_that_is_taken_is_refused_with_another_to_try(
    models: Models, hub: LoopbackHub, tiny_models: TinyModels, published: str
) -> None:
    """Unless forced: then the name changes hands and the other's files stay."""
    mine = install(models, model_id=published, name="shared-name").success
    hub.add("other/one", tiny_models.qwen3)
    failure = fails(lambda: models.InstallModel(Install(model_id="other/one", name="Shared-Name")))
    assert (failure.code, failure.reason) == (grpc.StatusCode.ALREADY_EXISTS, "MODEL_ALREADY_EXISTS")
    assert failure.metadata["suggestion"] in failure.message
    operation = install(models, model_id="other/one", name="Shared-Name", force=True)
    assert not reason_of(operation), operation.error
    theirs = operation.success
    assert (theirs.name.lower(), theirs.huggingface_id, theirs.architecture) == (
        "shared-name",
        "other/one",
        "qwen3",
    )
    assert Path(mine.path, "config.json").exists()
    assert not exists(models, published)
    assert delete(models, "other/one").removed_files


def test_a_folder_is_installed_over_the_socket_and_not_over_tcp(
    models: Models, local_models: Models, tmp_path: Path, tiny_models: TinyModels
) -> None:
    folder = tmp_path / "My Model!"
    shutil.copytree(tiny_models.llama, folder)
    failure = fails(lambda: models.InstallModel(Install(local_directory=str(folder))))
    assert (failure.code, failure.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
    model = install(local_models, local_directory=str(folder)).success
    assert (model.name, model.path, model.source) == (
        "my-model",
        str(folder),
        model_pb2.MODEL_SOURCE_DIRECTORY,
    )
    removal = delete(models, "my-model")
    assert not removal.removed_files and removal.kept_reason
    assert (folder / "model.safetensors").exists()


def test_a_folder_below_an_allowed_root_is_installed_over_tcp(
    start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    """Beside it, or through a link out of it, it is refused."""
    root, other = tmp_path / "root", tmp_path / "root-2"
    build_tiny(root / "inside")
    build_tiny(other / "outside")
    (root / "link").symlink_to(other / "outside")
    server = start_server(model_roots=[str(root)])
    models = model_pb2_grpc.ModelServiceStub(server.channel())
    assert install(models, local_directory=str(root / "inside")).success.name == "inside"
    for path in (other / "outside", root / "link", root / ".." / "root-2" / "outside"):
        failure = fails(lambda path=path: models.InstallModel(Install(local_directory=str(path))))  # type: ignore[misc]
        assert failure.reason == "PERMISSION_DENIED"


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("MODEL_INCOMPATIBLE", lambda folder: (folder / "config.json").unlink()),
        ("MODEL_INCOMPATIBLE", lambda folder: (folder / "config.json").write_text("[]")),
        ("MODEL_INCOMPATIBLE", lambda folder: (folder / "config.json").write_text("{" * 100_000)),
        ("MODEL_INCOMPATIBLE", lambda folder: (folder / "model.safetensors").unlink()),
        ("MODEL_INCOMPATIBLE", lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64)),
        ("MODEL_UNSAFE", lambda folder: (folder / "config.json").write_text('{"model_file": "x.py"}')),
    ],
)
def test_a_folder_that_is_no_safe_model_is_not_registered(
    local_models: Models, tmp_path: Path, reason: str, change: Callable[[Path], Any]
) -> None:
    folder = build_tiny(tmp_path / "broken-folder")
    change(folder)
    operation = install(local_models, local_directory=str(folder))
    assert reason_of(operation) == reason
    assert not exists(local_models, "broken-folder")


def test_unknown_operations_are_not_found(models: Models) -> None:
    for call in (
        lambda: models.GetOperation(model_pb2.GetOperationRequest(id="op-x")),
        lambda: models.WatchOperation(model_pb2.WatchOperationRequest(id="op-x")),
        lambda: models.CancelOperation(model_pb2.CancelOperationRequest(id="op-x")),
    ):
        failure = fails(call)
        assert (failure.code, failure.reason) == (NOT_FOUND, "OPERATION_NOT_FOUND")


def test_operations_come_in_pages(models: Models) -> None:
    def page(token: str, size: int) -> model_pb2.ListOperationsResponse:
        request = model_pb2.ListOperationsRequest(include_done=True, page_size=size, page_token=token)
        return models.ListOperations(request)

    whole = [operation.id for operation in page("", 1000).operations]
    paged, token = [], ""
    while True:
        answer = page(token, 3)
        paged += [operation.id for operation in answer.operations]
        token = answer.next_page_token
        if not token:
            break
    assert paged == whole and len(set(whole)) == len(whole)
    times = [o.create_time.ToMicroseconds() for o in page("", 1000).operations]
    assert times == sorted(times, reverse=True)


def test_a_model_in_installation_shows_as_such(models: Models, hub: LoopbackHub, published: str) -> None:
    """Re-installing with force fetches and checks every file again while the old entry serves."""
    model = install(models, model_id=published).success
    before = len(hub.fetches("model.safetensors"))
    hold = hub.hold("model.safetensors", 100)
    stream = models.InstallModel(Install(model_id=published, force=True), timeout=CALL_SECONDS)
    next(stream)
    wait_until(lambda: hold.reached.is_set() or exists(models, published), "it is under way")
    hold.release()
    assert last_operation(stream).success.id == model.id
    assert len(hub.fetches("model.safetensors")) >= before
