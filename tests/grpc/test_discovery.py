"""The hub's catalogue: a real server and the real hub client, on a hub that misbehaves on demand."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from mlxgui.v1 import model_pb2, model_pb2_grpc
from tests.conftest import TinyModels
from tests.loopback_hub import TOKEN, LoopbackHub
from tests.support_calls import CALL_SECONDS, fails, last_operation, reason_of
from tests.support_server import RunningServer, start

Models = model_pb2_grpc.ModelServiceStub
GIB = 1024**3
TINY_CONFIG = b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    """A hub of this module's own: its failures are nobody else's."""
    with LoopbackHub() as running:
        yield running


@pytest.fixture(scope="module")
def server(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Has a token, under the name that huggingface_hub itself does not read."""
    environment = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path_factory.mktemp("huggingface")),
        "HUGGINGFACE_HUB_TOKEN": TOKEN,
    }
    running = start(tmp_path_factory.mktemp("home"), environment, bridge=False, standby_count=0)
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def models(server: RunningServer) -> Models:
    return Models(server.channel())


@pytest.fixture(autouse=True)
def recovered(hub: LoopbackHub) -> Iterator[None]:
    """No test leaves the hub broken."""
    yield
    hub.recover()
    hub.link_endpoint = ""


def search(models: Models, query: str, **fields: Any) -> model_pb2.SearchCatalogResponse:
    request = model_pb2.SearchCatalogRequest(query=query, **fields)
    return models.SearchCatalog(request, timeout=CALL_SECONDS)


def show(models: Models, model_id: str) -> model_pb2.CatalogModel:
    return models.GetCatalogModel(model_pb2.GetCatalogModelRequest(id=model_id), timeout=CALL_SECONDS).model


def names(page: model_pb2.SearchCatalogResponse) -> list[str]:
    return [model.name for model in page.models]


def add_light(hub: LoopbackHub, model_id: str, **facts: Any) -> None:
    """Publish a repository of which only the page matters; `parameters` are counts of elements by type."""
    parameters = facts.pop("parameters", {"F16": 1000})
    if parameters:
        facts["safetensors"] = {"parameters": parameters, "total": sum(parameters.values())}
    hub.add(model_id, {"config.json": TINY_CONFIG, "model.safetensors": b"weights"}, **facts)


def test_a_search_answers_what_the_hub_knows(
    hub: LoopbackHub, models: Models, tiny_models: TinyModels
) -> None:
    """Sizes are those of the tensors; what the hub does not tell is unset."""
    hub.add(
        "mlx-community/Facts-Llama-Instruct-4bit",
        tiny_models.llama,
        downloads=12_543,
        likes=89,
        tags=("mlx", "llama", "4-bit"),
        cardData={"base_model": "maker/Facts-Llama-Instruct"},
        config={"model_type": "llama", "quantization_config": {"group_size": 64, "bits": 4}},
        gated=True,
    )
    add_light(hub, "mlx-community/Facts-of-no-size", parameters={}, downloads=1)
    known, unknown = search(models, "facts").models

    assert (known.id, known.name, known.author) == (
        "mlx-community/Facts-Llama-Instruct-4bit",
        "Facts-Llama-Instruct-4bit",
        "mlx-community",
    )
    assert (known.download_count, known.like_count) == (12_543, 89)
    assert (known.model_type, known.library_name, known.pipeline_tag) == ("text", "mlx", "text-generation")
    assert list(known.tags[:3]) == ["mlx", "llama", "4-bit"]
    assert known.description == "Facts Llama Instruct quantized to 4-bit with MLX"
    file_bytes = (tiny_models.llama / "model.safetensors").stat().st_size
    assert 0.95 * file_bytes < known.size_bytes < file_bytes
    assert known.estimated_memory_bytes > known.size_bytes
    assert known.mlx_compatible and known.has_mlx_version and known.gated
    assert not known.HasField("mlx_repo_id") and not known.HasField("memory_fit")
    assert known.create_time.seconds == known.update_time.seconds > 0
    assert not known.installed_name and not known.compatibility_message
    assert not unknown.HasField("size_bytes") and not unknown.HasField("estimated_memory_bytes")


def test_only_models_for_mlx_are_found_in_the_order_asked_for(hub: LoopbackHub, models: Models) -> None:
    """By downloads unless something else is asked for."""
    for name, downloads, likes in (("Sort-a", 5, 1), ("Sort-b", 9, 2), ("Sort-c", 1, 3)):
        add_light(hub, f"maker/{name}", downloads=downloads, likes=likes)
    add_light(hub, "maker/Sort-torch", tags=("safetensors", "pytorch"), downloads=99)
    add_light(hub, "maker/Sort-a", downloads=5, likes=1, lastModified="2026-01-01T00:00:00.000Z")

    assert names(search(models, "sort")) == ["Sort-b", "Sort-a", "Sort-c"]
    for sort, expected in (
        (model_pb2.CATALOG_SORT_DOWNLOADS, ["Sort-b", "Sort-a", "Sort-c"]),
        (model_pb2.CATALOG_SORT_LIKES, ["Sort-c", "Sort-b", "Sort-a"]),
        (model_pb2.CATALOG_SORT_CREATED, ["Sort-c", "Sort-b", "Sort-a"]),
        (model_pb2.CATALOG_SORT_UPDATED, ["Sort-a", "Sort-c", "Sort-b"]),
    ):
        assert names(search(models, "sort", sort=sort)) == expected, sort


def test_pages_have_every_model_once(hub: LoopbackHub, models: Models) -> None:
    """Also when a model comes in before the page that was read last."""
    for number in range(7):
        add_light(hub, f"maker/Paged-{number}", downloads=number // 2)
    first = search(models, "paged", page_size=3)
    add_light(hub, "maker/Paged-new", downloads=50)
    second = search(models, "paged", page_size=3, page_token=first.next_page_token)
    third = search(models, "paged", page_size=3, page_token=second.next_page_token)

    assert names(first) + names(second) + names(third) == [f"Paged-{number}" for number in range(6, -1, -1)]
    assert not third.next_page_token
    for fields in (
        {"page_token": first.next_page_token, "sort": model_pb2.CATALOG_SORT_LIKES},
        {"page_token": "nonsense"},
        {"page_token": "WzEsMiwzXQ=="},
        {"page_size": -1},
        {"max_memory_bytes": -1},
        {"sort": 77},
    ):
        failure = fails(lambda fields=fields: search(models, "paged", **fields))  # type: ignore[misc]
        assert (failure.code, failure.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [next(iter(fields))])


def test_only_what_fits_is_found_where_memory_is_asked_about(hub: LoopbackHub, models: Models) -> None:
    """In pages too; a model of unknown size does not fit anything."""
    for number in range(5):
        add_light(hub, f"maker/Fit-{number}", parameters={"BF16": 10**6}, downloads=number)
        add_light(hub, f"maker/Fit-huge-{number}", parameters={"BF16": 10**14}, downloads=number)
    add_light(hub, "maker/Fit-unknown", parameters={}, downloads=100)
    add_light(hub, "maker/Fit-strange", parameters={"X7": 10}, downloads=100)

    found: list[str] = []
    token = ""
    while True:
        page = search(models, "fit", max_memory_bytes=GIB, page_size=2, page_token=token)
        assert all(model.memory_fit for model in page.models)
        found += names(page)
        token = page.next_page_token
        if not token:
            break
    assert found == [f"Fit-{number}" for number in range(4, -1, -1)]
    assert names(search(models, "fit", max_memory_bytes=0)) == found
    assert not search(models, "fit", max_memory_bytes=1000).models
    assert len(search(models, "fit").models) == 12


def test_embedding_models_are_a_kind_of_their_own(hub: LoopbackHub, models: Models) -> None:
    """In the document's word for what they are for."""
    add_light(hub, "maker/Kind-chat")
    add_light(hub, "maker/Kind-embed", pipeline_tag="sentence-similarity", tags=("mlx", "feature-extraction"))
    add_light(hub, "maker/Kind-vision", pipeline_tag="image-text-to-text")
    add_light(hub, "maker/Kind-audio", pipeline_tag="automatic-speech-recognition")

    page = search(models, "kind", kind=model_pb2.CATALOG_KIND_EMBEDDING)
    assert [(model.name, model.model_type) for model in page.models] == [("Kind-embed", "feature-extraction")]
    types = {model.name: model.model_type for model in search(models, "kind").models}
    assert types == {
        "Kind-chat": "text",
        "Kind-embed": "feature-extraction",
        "Kind-vision": "vision",
        "Kind-audio": "audio",
    }


def test_the_hub_is_asked_once_for_the_same_and_nobody_else_waits(hub: LoopbackHub, models: Models) -> None:
    """Equal searches at once are one request; other calls are answered while it waits; later it is remembered."""
    add_light(hub, "maker/Once")
    stall = hub.stall("/api/models")
    with ThreadPoolExecutor(5) as pool:
        calls = [pool.submit(search, models, "once") for _ in range(5)]
        assert stall.reached.wait(CALL_SECONDS)
        assert models.ListModels(model_pb2.ListModelsRequest()).models
        stall.release()
        assert {tuple(names(call.result())) for call in calls} == {("Once",)}
    add_light(hub, "maker/Once-more", downloads=5)

    assert names(search(models, "once")) == ["Once"]
    assert len(hub.searches("once")) == 1
    search(models, "once", sort=model_pb2.CATALOG_SORT_LIKES)
    search(models, "once", page_size=7)
    assert len(hub.searches("once")) == 3


@pytest.mark.parametrize(
    ("status", "headers", "reason"),
    [
        (500, {}, "HUB_UNAVAILABLE"),
        (503, {}, "HUB_UNAVAILABLE"),
        (200, {}, "HUB_UNAVAILABLE"),
        (429, {"Retry-After": "300"}, "HUB_RATE_LIMITED"),
        (429, {"RateLimit": '"api";r=0;t=300'}, "HUB_RATE_LIMITED"),
        (401, {}, "HUB_ACCESS_DENIED"),
        (403, {}, "HUB_ACCESS_DENIED"),
    ],
)
def test_a_failing_hub_is_an_error_and_not_an_empty_list(
    hub: LoopbackHub, models: Models, status: int, headers: dict[str, str], reason: str
) -> None:
    """Said at once, with the time to wait where the hub names one; and not remembered."""
    model_id = f"maker/Failing-{status}-by-{'-'.join(headers) or 'status'}"
    add_light(hub, model_id)
    query = model_id.removeprefix("maker/")
    for call in (lambda: search(models, query), lambda: show(models, model_id)):
        hub.fail(status, prefix="/api/models", times=1, headers=headers)
        failure = fails(call)
        assert failure.reason == reason, failure
        assert failure.retry_after_seconds == (300 if status == 429 else None)
        hub.recover()
        call()


def test_a_repository_that_is_not_there_is_not_found(hub: LoopbackHub, models: Models) -> None:
    """Nor is one that has no owner an id."""
    failure = fails(lambda: show(models, "maker/absent"))
    assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "HUB_REPO_NOT_FOUND")
    failure = fails(lambda: show(models, "../absent"))
    assert (failure.code, failure.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["id"])


def test_a_repository_says_whether_this_machine_can_run_it(hub: LoopbackHub, models: Models) -> None:
    """In the document's sentences, with both sizes."""
    small = show(models, _published(hub, "maker/Verdict-small", {"BF16": 10**6}))
    assert small.system_compatible
    size = rf"{small.estimated_memory_bytes / GIB:.1f}GB"
    assert small.compatibility_message.startswith("✅ Compatible - ")
    assert small.compatibility_message.endswith(f"GB available, {size} required")

    huge = show(models, _published(hub, "maker/Verdict-huge", {"BF16": 16 * 10**13}))
    assert huge.HasField("system_compatible") and not huge.system_compatible
    size = f"{huge.estimated_memory_bytes / GIB:.1f}GB"
    assert huge.compatibility_message.startswith(
        f"❌ Insufficient memory - This model requires {size} but you have "
    )
    assert huge.compatibility_message.endswith("GB available")

    add_light(hub, "maker/Verdict-files", parameters={})
    files = show(models, "maker/Verdict-files")
    assert files.size_bytes == len(b"weights")

    hub.add("maker/Verdict-gguf", {"model.gguf": b"weights"}, tags=("gguf",))
    foreign = show(models, "maker/Verdict-gguf")
    assert not (foreign.mlx_compatible or foreign.has_mlx_version or foreign.system_compatible)
    assert foreign.compatibility_message.startswith("❌ Not in a form that MLX loads")
    assert not foreign.HasField("size_bytes")


def _published(hub: LoopbackHub, model_id: str, parameters: dict[str, int]) -> str:
    add_light(hub, model_id, parameters=parameters)
    return model_id


def test_the_mlx_version_of_a_repository_is_named(
    hub: LoopbackHub, models: Models, tiny_models: TinyModels
) -> None:
    """The community's before others, and none for what is MLX itself."""
    hub.add("maker/Base", tiny_models.llama, tags=("transformers", "safetensors"), gated=True)
    for owner, downloads in (("somebody", 100), ("mlx-community", 5)):
        add_light(hub, f"{owner}/Base-4bit", downloads=downloads, cardData={"base_model": "maker/Base"})

    base = show(models, "maker/Base")
    assert base.mlx_repo_id == "mlx-community/Base-4bit"
    assert base.has_mlx_version and base.gated
    assert base.mlx_compatible  # Plain safetensors of an architecture that is built in.
    assert base.library_name == "transformers" and base.create_time.seconds > 0
    assert not show(models, "mlx-community/Base-4bit").HasField("mlx_repo_id")
    assert not show(models, "mlx-community/Base-4bit").gated


def test_the_token_goes_to_the_hub_and_nowhere_else(
    hub: LoopbackHub, models: Models, server: RunningServer
) -> None:
    """Neither a redirect nor a link to a next page takes it along, and the log has not seen it."""
    for number in range(3):
        add_light(hub, f"maker/Secret-{number}")
    hub.link_endpoint = hub.cdn_endpoint
    page = search(models, "secret", page_size=2)
    assert len(search(models, "secret", page_size=2, page_token=page.next_page_token).models) == 1
    assert {request.authorization for request in hub.searches("secret")} == {f"Bearer {TOKEN}"}

    elsewhere = {"Location": f"{hub.cdn_endpoint}/api/models/maker/Secret-1"}
    hub.fail(307, prefix="/api/models/maker/Secret-1", times=1, headers=elsewhere)
    fails(lambda: show(models, "maker/Secret-1"))
    outside = [request for request in hub.requests if request.host == "cdn"]
    assert [request.path for request in outside] == ["/api/models/maker/Secret-1"]
    assert not outside[0].is_authorized

    hub.add("maker/Private", {"config.json": TINY_CONFIG}, private=True)
    assert show(models, "maker/Private").id == "maker/Private"
    assert TOKEN not in server.log()


def test_the_estimate_is_what_a_load_takes(hub: LoopbackHub, models: Models, tiny_models: TinyModels) -> None:
    """Found, installed, loaded: within a fifth, in the list as in the description, and the name is told then."""
    for folder in (tiny_models.llama, tiny_models.qwen3, tiny_models.long):
        query = f"measured-{folder.name}"
        hub.add(f"maker/{query}", folder)
        [listed] = search(models, query).models
        assert not listed.installed_name
        request = model_pb2.InstallModelRequest(model_id=listed.id)
        assert not reason_of(last_operation(models.InstallModel(request, timeout=CALL_SECONDS)))
        described = show(models, listed.id)
        assert described.installed_name == search(models, query).models[0].installed_name == query

        load(models, query)
        status = models.GetModelStatus(model_pb2.GetModelStatusRequest(name=query)).status
        for entry in (listed, described):
            assert entry.estimated_memory_bytes == pytest.approx(status.memory_bytes, rel=0.2), query
        models.DeleteModel(model_pb2.DeleteModelRequest(name=query, force=True))
        assert not show(models, listed.id).installed_name


def load(models: Models, name: str) -> None:
    operation = last_operation(models.LoadModel(model_pb2.LoadModelRequest(name=name), timeout=CALL_SECONDS))
    assert not reason_of(operation), operation.error


@pytest.mark.parametrize(
    ("kind", "change", "task", "is_mlx_compatible"),
    [
        ("frobnicate", {"model_type": "frobnicate"}, "text-generation", False),
        ("seer", {"model_type": "seer", "vision_config": {}}, "image-text-to-text", True),
    ],
)
def test_what_this_version_does_not_serve_is_said_before_and_after_an_install(
    hub: LoopbackHub,
    models: Models,
    tiny_models: TinyModels,
    kind: str,
    change: dict[str, Any],
    task: str,
    is_mlx_compatible: bool,
) -> None:
    """Tagged for MLX or not: in lists, in the description, as a warning of the install, and when it is loaded."""
    files = {path.name: path.read_bytes() for path in tiny_models.llama.iterdir() if path.is_file()}
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), **change}).encode()
    model_id = f"maker/Foreign-{kind}"
    hub.add(model_id, files, pipeline_tag=task)
    [listed] = search(models, f"foreign-{kind}").models
    shown = show(models, model_id)
    assert listed.mlx_compatible == shown.mlx_compatible == is_mlx_compatible
    assert shown.HasField("system_compatible") and not shown.system_compatible
    assert shown.compatibility_message == f"❌ This version does not serve {kind} models"
    fitting = search(models, f"foreign-{kind}", max_memory_bytes=64 * GIB).models
    assert bool(fitting) == is_mlx_compatible

    request = model_pb2.InstallModelRequest(model_id=model_id)
    operation = last_operation(models.InstallModel(request, timeout=CALL_SECONDS))
    assert operation.HasField("success")
    (warning,) = operation.warnings
    assert warning.startswith(f"'{operation.success.name}' is installed, but cannot be loaded: ")
    assert model_id in warning and kind in warning and operation.success.revision not in warning
    name = operation.success.name
    load = last_operation(models.LoadModel(model_pb2.LoadModelRequest(name=name), timeout=CALL_SECONDS))
    assert reason_of(load) == "MODEL_INCOMPATIBLE" and load.error.message in warning
    models.DeleteModel(model_pb2.DeleteModelRequest(name=name))


def test_categories_need_no_hub(hub: LoopbackHub, models: Models) -> None:
    """The document's titles, in its order, with its models first."""
    before = len(hub.requests)
    answer = models.ListCatalogCategories(model_pb2.ListCatalogCategoriesRequest())
    assert [category.title for category in answer.categories] == [
        "Popular Text Models",
        "Vision Models",
        "Multimodal Models",
        "Code Models",
        "Chat Models",
        "Small Models (< 10GB)",
        "Large Models (> 50GB)",
    ]
    assert answer.categories[0].model_ids[:2] == [
        "mlx-community/Llama-3.2-3B-Instruct-4bit",
        "mlx-community/Qwen2.5-7B-Instruct-4bit",
    ]
    for category in answer.categories:
        assert all(model_id.startswith("mlx-community/") for model_id in category.model_ids)
        assert len(set(category.model_ids)) == len(category.model_ids)
    assert len(hub.requests) == before


def test_a_lookup_whose_process_is_killed_is_an_error_and_the_next_one_works(
    hub: LoopbackHub, models: Models, server: RunningServer
) -> None:
    """A child that dies takes one answer with it, and nothing else."""
    add_light(hub, "maker/Killed")
    stall = hub.stall("/api/models")
    outcome: list[Any] = []
    caller = threading.Thread(target=lambda: outcome.append(fails(lambda: search(models, "killed"))))
    caller.start()
    assert stall.reached.wait(CALL_SECONDS)
    for child in server.descendants():
        if "mlxgui_grpc.hub_lookup" in " ".join(child.cmdline()):
            child.kill()
    caller.join(CALL_SECONDS)
    hub.recover()
    assert outcome[0].reason == "HUB_UNAVAILABLE"
    assert names(search(models, "killed")) == ["Killed"]
