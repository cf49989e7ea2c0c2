"""Models come into memory and leave it: names, states, health, one load for many, the standby."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mlxgui.v1 import (
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    system_pb2_grpc,
)
from tests.conftest import TinyModels
from tests.support_calls import (
    CALL_SECONDS,
    chat,
    completion,
    endless,
    fails,
    failure_of,
    last_operation,
    reason_of,
    text_of,
    until_first_delta,
)
from tests.support_metrics import Gauges, wait_until
from tests.support_server import RunningServer

Inference = inference_pb2_grpc.InferenceServiceStub
Models = model_pb2_grpc.ModelServiceStub
SERVING, NOT_SERVING = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
)


@pytest.fixture(scope="module")
def tiny(local_models: Models, tiny_models: TinyModels) -> Iterator[str]:
    """A tiny llama, installed on the session's server for this module."""
    request = model_pb2.InstallModelRequest(local_directory=str(tiny_models.llama), name="Tiny-Llama")
    operation = last_operation(local_models.InstallModel(request))
    assert operation.success.name == "Tiny-Llama"
    yield "Tiny-Llama"
    local_models.DeleteModel(model_pb2.DeleteModelRequest(name="tiny-llama", force=True))
    assert (tiny_models.llama / "model.safetensors").exists(), "a registered folder is never deleted by us"


def load(models: Models, name: str) -> model_pb2.Operation:
    return last_operation(models.LoadModel(model_pb2.LoadModelRequest(name=name), timeout=CALL_SECONDS))


def unload(models: Models, name: str, *, force: bool = False) -> model_pb2.Model:
    return models.UnloadModel(model_pb2.UnloadModelRequest(name=name, force=force)).model


def get(models: Models, name: str) -> model_pb2.Model:
    return models.GetModel(model_pb2.GetModelRequest(name=name)).model


def test_a_model_says_what_it_is(models: Models, tiny: str, tiny_models: TinyModels) -> None:
    model = get(models, "tiny-LLAMA")
    assert (model.name, model.architecture, model.context_length) == ("Tiny-Llama", "llama", 2048)
    assert model.type == model_pb2.MODEL_TYPE_TEXT
    assert model.path == str(tiny_models.llama)
    assert model.source == model_pb2.MODEL_SOURCE_DIRECTORY
    assert model.size_bytes == sum(file.stat().st_size for file in tiny_models.llama.iterdir())
    assert model.memory_required_bytes > (tiny_models.llama / "model.safetensors").stat().st_size - 4096
    assert model.parameter_count > 100_000 and model.quantization_bits == 0
    assert {model_pb2.CAPABILITY_CHAT, model_pb2.CAPABILITY_COMPLETION} <= set(model.capabilities)
    assert model.create_time.seconds > 0 and not model.HasField("last_use_time")


def test_load_and_unload_change_state_and_health(
    models: Models, inference: Inference, channel: grpc.Channel, tiny: str
) -> None:
    """LoadModel ends with the model loaded; loading twice is done at once; unloading twice succeeds."""
    health: Any = health_pb2_grpc.HealthStub(channel)

    def status() -> object:
        return health.Check(health_pb2.HealthCheckRequest(service=f"model/{tiny}")).status

    checked = models.CheckModelHealth(model_pb2.CheckModelHealthRequest(name=tiny))
    assert (checked.name, checked.healthy, bool(checked.reason)) == (tiny, False, True)

    snapshots = [s.operation for s in models.LoadModel(model_pb2.LoadModelRequest(name=tiny.upper()))]
    assert len({operation.id for operation in snapshots}) == 1
    assert snapshots[-1].success.state == model_pb2.MODEL_STATE_LOADED
    assert model_pb2.CAPABILITY_BATCHING in snapshots[-1].success.capabilities
    assert snapshots[-1].load.attempt == 1 and snapshots[-1].kind == model_pb2.Operation.KIND_LOAD
    assert load(models, tiny).success.state == model_pb2.MODEL_STATE_LOADED
    wait_until(lambda: status() == SERVING, "health says serving")
    assert models.CheckModelHealth(model_pb2.CheckModelHealthRequest(name=tiny)).healthy

    assert inference.Generate(completion("One", model=tiny, max_tokens=3)).model == tiny
    used = get(models, tiny)
    assert used.use_count == 1 and used.HasField("last_use_time")

    assert unload(models, tiny).state == model_pb2.MODEL_STATE_UNLOADED
    wait_until(lambda: status() == NOT_SERVING, "health says not serving")
    assert unload(models, tiny).state == model_pb2.MODEL_STATE_UNLOADED
    assert get(models, tiny).state == model_pb2.MODEL_STATE_UNLOADED


def test_a_busy_model_is_not_unloaded_or_deleted_without_force(
    models: Models, inference: Inference, tiny: str
) -> None:
    """With force its requests end, with an error that says so."""
    stream = inference.ChatStream(endless(tiny), timeout=CALL_SECONDS)
    until_first_delta(stream)
    for failure in (
        fails(lambda: unload(models, tiny)),
        fails(lambda: models.DeleteModel(model_pb2.DeleteModelRequest(name=tiny))),
    ):
        assert (failure.code, failure.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_IN_USE")
    assert next(stream).HasField("delta")
    assert unload(models, tiny, force=True).state == model_pb2.MODEL_STATE_UNLOADED
    failure = fails(lambda: stream)
    assert (failure.code, failure.reason) == (grpc.StatusCode.CANCELLED, "CANCELLED")


def test_many_first_requests_share_one_load(
    server: RunningServer, inference: Inference, models: Models, tiny: str
) -> None:
    """16 simultaneous chats and loads of an unloaded model: 16 answers, one worker more, one load in the log."""
    unload(models, tiny, force=True)
    marker = f"loaded {tiny} in"
    before = server.log().count(marker)

    def ask(index: int) -> int:
        if index % 4 == 3:
            assert load(models, tiny).HasField("success")
            return 2
        reply = inference.Chat(chat("hi", tiny, max_tokens=2), timeout=CALL_SECONDS)
        assert reply.timing.HasField("load")
        return reply.usage.completion_token_count

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == [2] * 16
    assert server.log().count(marker) == before + 1


def test_a_standby_is_taken_for_a_load_and_made_anew(
    server: RunningServer, models: Models, inference: Inference, tiny: str
) -> None:
    """The process that was warm before serves the model; another gets warm in its place."""
    unload(models, tiny, force=True)
    inference.Chat(chat("What is the capital of France?"))  # demo's worker is one of those counted below
    wait_until(lambda: len(server.workers()) == 2, "demo's worker and one standby")
    before = {worker.pid for worker in server.workers()}
    load(models, tiny)
    assert inference.Chat(chat("hi", tiny, max_tokens=2)).usage.completion_token_count == 2
    wait_until(lambda: len(server.workers()) == 3, "a new standby")
    assert before < {worker.pid for worker in server.workers()}
    unload(models, tiny)
    wait_until(lambda: len(server.workers()) == 2, "the unloaded model's process is gone")


def test_require_loaded_does_not_load(models: Models, inference: Inference, tiny: str) -> None:
    unload(models, tiny)
    request = completion("One", model=tiny, max_tokens=1)
    request.load_policy = common_pb2.LOAD_POLICY_REQUIRE_LOADED
    failure = fails(lambda: inference.Generate(request))
    assert (failure.code, failure.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NOT_LOADED")
    assert failure.message == (
        f"Model '{tiny}' is not loaded. Load it first with POST /v1/models/{tiny}/load"
    )
    assert get(models, tiny).state == model_pb2.MODEL_STATE_UNLOADED


def test_counting_tokens_does_not_load_the_model(
    models: Models, inference: Inference, tiny: str, demo_tokenizer: object
) -> None:
    unload(models, tiny)
    prompt = inference_pb2.Prompt(text="What is the capital of France?")
    counted = inference.CountTokens(inference_pb2.CountTokensRequest(model=tiny, prompt=prompt))
    known = inference.CountTokens(inference_pb2.CountTokensRequest(model="demo", prompt=prompt))
    assert (counted.model, counted.context_length) == (tiny, 2048)
    assert counted.token_count == known.token_count > 0
    assert get(models, tiny).state == model_pb2.MODEL_STATE_UNLOADED


def test_a_cancelled_load_ends_for_all_who_wait_and_can_be_repeated(
    models: Models, inference: Inference, server: RunningServer, tiny: str
) -> None:
    """CancelOperation while a chat waits for the same load: the chat ends with an error, nothing stays behind."""
    unload(models, tiny, force=True)
    stream = models.LoadModel(model_pb2.LoadModelRequest(name=tiny), timeout=CALL_SECONDS)
    operation = next(stream).operation
    waiting = inference.Chat.future(chat("hi", tiny, max_tokens=1), timeout=CALL_SECONDS)
    cancelled = models.CancelOperation(model_pb2.CancelOperationRequest(id=operation.id)).operation
    assert cancelled.done
    error = waiting.exception(CALL_SECONDS)
    if reason_of(cancelled):  # It was not loaded before the cancellation came.
        assert reason_of(cancelled) == "CANCELLED"
        assert error is None or failure_of(error).reason == "CANCELLED"
    assert load(models, tiny).HasField("success")
    # Cancelling what is done leaves it as it is.
    again = models.CancelOperation(model_pb2.CancelOperationRequest(id=operation.id)).operation
    assert reason_of(again) == reason_of(cancelled)


def test_cancelling_a_load_that_is_over_leaves_the_next_one_alone(models: Models, tiny: str) -> None:
    first = load(models, tiny)
    unload(models, tiny)
    second = models.LoadModel(model_pb2.LoadModelRequest(name=tiny), timeout=CALL_SECONDS)
    assert next(second).operation.id != first.id
    cancelled = models.CancelOperation(model_pb2.CancelOperationRequest(id=first.id)).operation
    assert cancelled.done and not reason_of(cancelled)
    assert last_operation(second).HasField("success")
    assert get(models, tiny).state == model_pb2.MODEL_STATE_LOADED


def test_an_unload_goes_on_when_its_caller_leaves(models: Models, tiny: str) -> None:
    load(models, tiny)
    leaving = models.UnloadModel.future(model_pb2.UnloadModelRequest(name=tiny), timeout=CALL_SECONDS)
    wait_until(lambda: get(models, tiny).state != model_pb2.MODEL_STATE_LOADED, "it has begun")
    leaving.cancel()
    wait_until(lambda: get(models, tiny).state == model_pb2.MODEL_STATE_UNLOADED, "it is unloaded")
    assert load(models, tiny).HasField("success")


def test_lists_come_by_name_in_pages_that_join_to_the_whole(
    models: Models, local_models: Models, tiny: str, tiny_models: TinyModels
) -> None:
    """Also after an install whose name comes first."""
    request = model_pb2.InstallModelRequest(local_directory=str(tiny_models.qwen3), name="A-first")
    assert last_operation(local_models.InstallModel(request)).HasField("success")
    whole = [model.name for model in models.ListModels(model_pb2.ListModelsRequest()).models]
    assert {"demo", tiny} <= set(whole) and whole == sorted(whole, key=str.casefold)
    paged: list[str] = []
    token = ""
    while True:
        page = models.ListModels(model_pb2.ListModelsRequest(page_size=1, page_token=token))
        assert len(page.models) == 1
        paged += [model.name for model in page.models]
        token = page.next_page_token
        if not token:
            break
    assert paged == whole
    assert len(models.ListModels(model_pb2.ListModelsRequest(page_size=100_000)).models) == len(whole)
    models.DeleteModel(model_pb2.DeleteModelRequest(name="a-first"))


def test_lists_are_filtered_by_type_and_state(models: Models, inference: Inference, tiny: str) -> None:
    inference.Chat(chat("What is the capital of France?"))
    unload(models, tiny, force=True)

    def names(**filters: list[int]) -> set[str]:
        return {model.name for model in models.ListModels(model_pb2.ListModelsRequest(**filters)).models}  # type: ignore[arg-type]

    assert "demo" in names(states=[model_pb2.MODEL_STATE_LOADED])
    assert tiny not in names(states=[model_pb2.MODEL_STATE_LOADED])
    assert tiny in names(states=[model_pb2.MODEL_STATE_UNLOADED], types=[model_pb2.MODEL_TYPE_TEXT])
    assert names(types=[model_pb2.MODEL_TYPE_SPEECH]) == set()


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("page_size", model_pb2.ListModelsRequest(page_size=-1)),
        ("page_token", model_pb2.ListModelsRequest(page_token="x")),
        ("page_token", model_pb2.ListModelsRequest(page_token="-1")),
        ("page_token", model_pb2.ListModelsRequest(page_token="9" * 40)),
    ],
)
def test_bad_pages_are_refused_by_name(
    models: Models, field: str, request_: model_pb2.ListModelsRequest
) -> None:
    assert fails(lambda: models.ListModels(request_)).fields == [field]
    operations = model_pb2.ListOperationsRequest(page_size=request_.page_size, page_token=request_.page_token)
    assert fails(lambda: models.ListOperations(operations)).fields == [field]


def test_a_model_that_a_request_waits_for_is_in_use(models: Models, inference: Inference, tiny: str) -> None:
    """Unloading without force does not take the load away from under a chat that began it."""
    unload(models, tiny, force=True)
    waiting = inference.Chat.future(chat("hi", tiny, max_tokens=1), timeout=CALL_SECONDS)
    wait_until(lambda: get(models, tiny).state != model_pb2.MODEL_STATE_UNLOADED, "the load began")
    if get(models, tiny).state == model_pb2.MODEL_STATE_LOADING:
        try:
            unload(models, tiny)
        except grpc.RpcError as error:
            assert failure_of(error).reason == "MODEL_IN_USE"
    assert waiting.result(CALL_SECONDS).usage.completion_token_count == 1


def test_other_models_answer_while_one_loads(
    models: Models, local_models: Models, inference: Inference, tiny: str, tiny_models: TinyModels
) -> None:
    """A load holds up nobody; the models of two families decode side by side."""
    request = model_pb2.InstallModelRequest(local_directory=str(tiny_models.qwen3))
    name = last_operation(local_models.InstallModel(request)).success.name
    assert name == "tiny-qwen3"
    try:
        loading = models.LoadModel(model_pb2.LoadModelRequest(name=name), timeout=CALL_SECONDS)
        answer = text_of(inference.Chat(chat("What is the capital of France?"), timeout=CALL_SECONDS))
        assert answer == "The capital of France is Paris."
        assert last_operation(loading).success.architecture == "qwen3"
        streams = [inference.ChatStream(endless(m), timeout=CALL_SECONDS) for m in (name, "demo")]
        for stream in streams:
            until_first_delta(stream)
        for stream in streams:
            stream.cancel()
    finally:
        local_models.DeleteModel(model_pb2.DeleteModelRequest(name=name, force=True))
    assert fails(lambda: get(models, name)).reason == "MODEL_NOT_FOUND"
    assert Path(tiny_models.qwen3, "config.json").exists()


def test_memory_and_requests_are_in_the_metrics(
    inference: Inference, system: system_pb2_grpc.SystemServiceStub, server: RunningServer
) -> None:
    gauges = Gauges(system)
    before = gauges["generation_tokens_total"]["demo"], gauges["prompt_tokens_total"]["demo"]
    usage = inference.Chat(chat("What is the capital of France?")).usage
    after = gauges["generation_tokens_total"]["demo"], gauges["prompt_tokens_total"]["demo"]
    assert after[0] - before[0] == usage.completion_token_count
    assert after[1] - before[1] == usage.prompt_token_count
    memory = gauges["process_resident_memory_bytes"]
    assert {"control", "bridge", "worker:demo"} <= set(memory) and min(memory.values()) > 10 * 2**20
    assert gauges["time_to_first_token_seconds_count"]["demo"] > 0
