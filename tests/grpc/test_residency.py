"""Who is in memory, over the real server: limits, eviction, queue, keep-alive, pins, estimates, recovery.

One server with places for two models and one standby serves the whole module; a load costs seconds of imports, so each
test takes over what the one before left in memory where that will do (`Own.have`).
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf.duration_pb2 import Duration

from mlxgui.v1 import inference_pb2_grpc, model_pb2, model_pb2_grpc, system_pb2, system_pb2_grpc
from tests.conftest import TinyModels
from tests.support_calls import (
    CALL_SECONDS,
    chat,
    endless,
    fails,
    failure_of,
    last_operation,
    reason_of,
    until_first_delta,
)
from tests.support_metrics import wait_until
from tests.support_server import RunningServer, start

NAMES = ("a", "b", "c", "d")
LOADED, UNLOADED = model_pb2.MODEL_STATE_LOADED, model_pb2.MODEL_STATE_UNLOADED


class Own:
    """The module's server."""

    def __init__(self, server: RunningServer) -> None:
        self.server = server
        channel = server.channel(unix=True)
        self.models = model_pb2_grpc.ModelServiceStub(channel)
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.system = system_pb2_grpc.SystemServiceStub(channel)

    def load(self, name: str, **fields: Any) -> model_pb2.Operation:
        return last_operation(self.models.LoadModel(model_pb2.LoadModelRequest(name=name, **fields)))

    def ask(self, name: str, keep_alive_seconds: float | None = None) -> int:
        request = chat("hi", name, max_tokens=2)
        if keep_alive_seconds is not None:
            request.keep_alive.CopyFrom(seconds(keep_alive_seconds))
        return self.inference.Chat(request, timeout=CALL_SECONDS).usage.completion_token_count

    def status(self, name: str) -> model_pb2.LoadedModel:
        return self.models.GetModelStatus(model_pb2.GetModelStatusRequest(name=name)).status

    def snapshot(self) -> model_pb2.ManagerSnapshot:
        return self.models.GetManagerStatus(model_pb2.GetManagerStatusRequest()).snapshot

    def loaded(self) -> set[str]:
        return {model.name for model in self.snapshot().loaded_models if model.state == LOADED}

    def queued(self) -> list[str]:
        return [load.model for load in self.snapshot().queue]

    def pin(self, name: str, *, pinned: bool = True) -> model_pb2.Model:
        if pinned:
            return self.models.PinModel(model_pb2.PinModelRequest(name=name)).model
        return self.models.UnpinModel(model_pb2.UnpinModelRequest(name=name)).model

    def stream(self, name: str) -> Any:
        """A stream that decodes until it is cancelled."""
        events = self.inference.ChatStream(endless(name), timeout=CALL_SECONDS)
        until_first_delta(events)
        return events

    def set(self, **values: Any) -> None:
        request = system_pb2.UpdateSettingsRequest(settings=system_pb2.Settings(**values))
        request.update_mask.paths.extend(values)
        self.system.UpdateSettings(request)

    def unload(self, *names: str) -> None:
        for name in names:
            self.models.UnloadModel(model_pb2.UnloadModelRequest(name=name, force=True))

    def have(self, *names: str) -> None:
        """Exactly these in memory, the first used least recently."""
        self.unload(*(set(NAMES) - set(names)))
        for name in names:
            self.load(name)

    def wait_queued(self, name: str) -> None:
        wait_until(lambda: self.status(name).state == model_pb2.MODEL_STATE_QUEUED, f"{name} waits")

    def reset(self) -> None:
        for name in NAMES:
            if self.status(name).pinned:
                self.pin(name, pinned=False)


def seconds(value: float) -> Duration:
    return Duration(seconds=int(value), nanos=int(value % 1 * 1e9))


@pytest.fixture(scope="module")
def running(
    server_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory, tiny_models: TinyModels
) -> Iterator[Own]:
    server = start(
        tmp_path_factory.mktemp("residency"),
        server_environment,
        bridge=False,
        standby_count=1,
        max_concurrent_models=2,
        register_demo=False,
    )
    own = Own(server)
    for name in NAMES:
        request = model_pb2.InstallModelRequest(local_directory=str(tiny_models.long), name=name)
        assert last_operation(own.models.InstallModel(request)).HasField("success")
    yield own
    assert server.stop() == 0


@pytest.fixture
def own(running: Own) -> Iterator[Own]:
    yield running
    running.reset()


# Places and eviction.


def test_the_least_recently_used_model_leaves_for_a_new_one(own: Own) -> None:
    own.have("a", "b")
    own.ask("a")
    done = own.load("c")
    assert done.success.state == LOADED and list(done.load.evicted_models) == ["b"]
    assert own.loaded() == {"a", "c"}
    status = own.snapshot().status
    assert (status.loaded_model_count, status.max_concurrent_models) == (2, 2)


def test_a_busy_model_is_waited_for_and_never_taken(own: Own) -> None:
    """Both are busy: the load says that it waits, no token of theirs is lost, and the first that ends goes."""
    own.have("a", "b")
    streams = {name: own.stream(name) for name in "ab"}
    load = own.models.LoadModel(model_pb2.LoadModelRequest(name="c"), timeout=CALL_SECONDS)
    phases = [next(load).operation.load.phase]
    while phases[-1] != model_pb2.LoadProgress.PHASE_EVICTING:
        phases.append(next(load).operation.load.phase)
    for stream in streams.values():
        assert next(stream).HasField("delta")
    assert own.loaded() == {"a", "b"}
    streams["b"].cancel()
    assert list(last_operation(load).load.evicted_models) == ["b"]
    assert next(streams["a"]).HasField("delta"), "the other one did not notice"
    streams["a"].cancel()


def test_new_requests_for_a_model_that_has_to_leave_queue_behind_the_load(own: Own) -> None:
    """Else a steady stream of requests would keep the newcomer out for ever; everybody is answered."""
    own.have("a", "b")
    own.pin("a")
    stream = own.stream("b")
    with ThreadPoolExecutor(8) as pool:
        newcomer = pool.submit(own.ask, "c")
        wait_until(
            lambda: own.status("c").state == model_pb2.MODEL_STATE_QUEUED,
            "the newcomer waits for b to be idle",
        )
        time.sleep(1.2)  # b has been in memory for long enough to leave: it takes no more requests
        more = [pool.submit(own.ask, "b") for _ in range(3)]
        time.sleep(0.2)
        assert not any(future.done() for future in more)
        assert own.status("b").waiting_request_count == 3
        unwanted = own.models.LoadModel(model_pb2.LoadModelRequest(name="b"), timeout=CALL_SECONDS)
        own.models.CancelOperation(model_pb2.CancelOperationRequest(id=next(unwanted).operation.id))
        assert next(stream).HasField("delta"), "cancelling that load ends nobody else's request"
        stream.cancel()
        assert newcomer.result(CALL_SECONDS) == 2
        assert [future.result(CALL_SECONDS) for future in more] == [2, 2, 2]
    assert own.loaded() == {"a", "b"}


def test_pinned_models_stay_and_too_many_of_them_are_a_conflict(own: Own) -> None:
    own.have("a", "b")
    for name in "ab":
        assert own.pin(name).pinned
    load = model_pb2.LoadModelRequest(name="c")
    failure = fails(lambda: own.models.LoadModel(load))
    assert (failure.code, failure.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_IN_USE")
    assert "pinned" in failure.message and own.loaded() == {"a", "b"}
    own.pin("a", pinned=False)
    assert list(own.load("c").load.evicted_models) == ["a"]
    assert not own.status("b").HasField("expire_time"), "a pinned model is not unloaded for being idle"
    own.pin("c")
    own.set(max_concurrent_models=1)
    try:
        assert own.loaded() == {"b", "c"}
        own.pin("b", pinned=False)
        wait_until(lambda: own.loaded() == {"c"}, "there is one place only, and nothing pins b any more")
    finally:
        own.set(max_concurrent_models=2)


def test_pins_survive_a_restart(own: Own, start_server: Any, tiny_models: TinyModels) -> None:
    server = start_server()
    first = Own(server)
    install = model_pb2.InstallModelRequest(local_directory=str(tiny_models.llama), name="a")
    last_operation(first.models.InstallModel(install))
    first.pin("a")
    server.kill()
    second = Own(start_server(home=server.home))
    assert second.models.GetModel(model_pb2.GetModelRequest(name="a")).model.pinned


def test_two_models_that_alternate_do_not_thrash(own: Own) -> None:
    """One place, two models, requests for both all the time: each stays for many requests once it is in."""
    own.set(max_concurrent_models=1)
    try:
        served: list[str] = []
        loads_before = own.server.log().count("loaded a in") + own.server.log().count("loaded b in")
        end = time.monotonic() + 6.0

        def ask(name: str) -> None:
            while time.monotonic() < end:
                own.ask(name)
                served.append(name)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ask, "abab"))
        loads = own.server.log().count("loaded a in") + own.server.log().count("loaded b in") - loads_before
        assert set(served) == {"a", "b"}, "neither starves"
        assert 2 <= loads * 2 <= len(served), f"{loads} loads for {len(served)} requests"
    finally:
        own.set(max_concurrent_models=2)


def test_lowering_the_limit_lets_idle_models_go_at_once(own: Own) -> None:
    own.have("a", "b")
    own.set(max_concurrent_models=1)
    try:
        wait_until(lambda: own.loaded() == {"b"}, "the one used least recently is gone")
    finally:
        own.set(max_concurrent_models=2)


# Memory.


def test_a_load_that_cannot_fit_is_refused_with_both_numbers_and_explained(own: Own) -> None:
    own.have("a")
    own.set(max_model_memory_gb=0.02)
    try:
        wait_until(lambda: own.loaded() == set(), "the cap leaves no room for the one that was there")
        failure = fails(lambda: own.models.LoadModel(model_pb2.LoadModelRequest(name="b")))
        assert (failure.code, failure.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "INSUFFICIENT_MEMORY",
        )
        assert failure.message.startswith("❌ Insufficient memory - This model requires 0.")
        assert failure.message.endswith("but you have 0.020GB available; max_model_memory_gb limits it")
        assert int(failure.metadata["required_bytes"]) > int(failure.metadata["available_bytes"])
        chat_failure = fails(lambda: own.ask("b"))
        assert chat_failure.message == failure.message, "a request says the same"

        explained = own.models.EstimateLoad(model_pb2.EstimateLoadRequest(name="b"))
        assert not explained.accepted and explained.refusal.message == failure.message
    finally:
        own.set(max_model_memory_gb=0.0)
    assert own.load("b").success.state == LOADED, "with the memory back it can be loaded"


def test_an_estimate_says_what_a_load_would_take_and_evict_and_changes_nothing(own: Own) -> None:
    own.have("a", "b")
    one, many = (
        own.models.EstimateLoad(
            model_pb2.EstimateLoadRequest(name="c", concurrent_request_count=count, tokens_per_request=1000)
        )
        for count in (1, 8)
    )
    assert one.accepted and list(one.evicted_models) == ["a"] and not one.already_loaded
    parts = one.weight_bytes + one.kv_bytes + one.prefill_bytes + one.process_bytes
    assert one.required_bytes == parts and min(one.weight_bytes, one.kv_bytes, one.process_bytes) > 0
    assert many.kv_bytes == 8 * one.kv_bytes
    assert one.reclaimable_bytes > one.available_bytes > 0
    assert own.loaded() == {"a", "b"}
    assert own.models.EstimateLoad(model_pb2.EstimateLoadRequest(name="a")).already_loaded
    for field, value in (
        ("concurrent_request_count", 0),
        ("tokens_per_request", 10**6),
        ("tokens_per_request", -1),
    ):
        request = model_pb2.EstimateLoadRequest(name="c", **{field: value})
        failure = fails(partial(own.models.EstimateLoad, request))
        assert (failure.reason, failure.fields) == ("INVALID_PARAMETER", [field])


def test_the_estimate_is_what_the_load_takes_within_a_fifth(own: Own) -> None:
    """Compared without the KV cache of the request that an estimate counts: nothing runs yet."""
    own.unload("a")
    wait_until(lambda: own.snapshot().status.standby_count == 1, "a worker has told its own footprint")
    estimate = own.models.EstimateLoad(model_pb2.EstimateLoadRequest(name="a"))
    own.load("a")
    expected = estimate.weight_bytes + estimate.process_bytes
    assert 0.8 * expected <= own.status("a").memory_bytes <= 1.2 * expected


def test_what_is_in_memory_is_told_from_the_process_itself(own: Own) -> None:
    own.have("a")
    status = own.status("a")
    assert psutil.pid_exists(status.process_id)
    assert status.process_id in {worker.pid for worker in own.server.workers()}
    assert status.memory_bytes > 0 and status.HasField("load_time") and status.HasField("expire_time")
    stream = own.stream("a")
    wait_until(lambda: own.status("a").kv_bytes > 0 and own.status("a").tokens_per_second > 0, "it decodes")
    busy = own.status("a")
    assert busy.running_request_count == 1 and not busy.HasField("expire_time")
    stream.cancel()
    wait_until(lambda: own.status("a").running_request_count == 0, "the stream's place is free")


# Staying and leaving.


def test_a_model_leaves_when_its_keep_alive_is_over_and_the_last_request_counts(own: Own) -> None:
    own.unload("a")
    own.load("a", keep_alive=seconds(3600))
    far = own.status("a").expire_time.ToSeconds()
    assert far > time.time() + 3000
    own.ask("a", keep_alive_seconds=0.3)
    wait_until(lambda: "a" not in own.loaded(), "0.3 s after its last request")
    own.ask("a", keep_alive_seconds=0)
    wait_until(lambda: "a" not in own.loaded(), "at once")
    own.ask("a", keep_alive_seconds=-1)
    assert "a" in own.loaded() and not own.status("a").HasField("expire_time")
    own.ask("a")
    assert own.status("a").HasField("expire_time"), "a request that says nothing brings the setting back"


def test_of_two_callers_of_one_load_the_later_keep_alive_counts(own: Own) -> None:
    own.unload("a")
    loads = [
        own.models.LoadModel(
            model_pb2.LoadModelRequest(name="a", keep_alive=seconds(value)), timeout=CALL_SECONDS
        )
        for value in (10, -1)
    ]
    assert next(loads[0]).operation.id == next(loads[1]).operation.id
    for load in loads:
        assert last_operation(load).HasField("success")
    assert not own.status("a").HasField("expire_time")


def test_the_time_runs_from_the_end_of_a_request(own: Own) -> None:
    """A stream longer than the keep-alive is never cut, and the model stays for the time after it."""
    request = endless("a")
    request.request.keep_alive.CopyFrom(seconds(0.5))
    stream = own.inference.ChatStream(request, timeout=CALL_SECONDS)
    until_first_delta(stream)
    began = time.monotonic()
    while time.monotonic() < began + 1.5:
        next(stream)
    assert "a" in own.loaded()
    stream.cancel()
    wait_until(lambda: "a" not in own.loaded(), "half a second after the stream")


def test_idle_models_leave_after_the_settings_timeout_unless_it_is_off(own: Own) -> None:
    own.load("a")
    on = own.status("a").expire_time.ToSeconds()
    assert on == pytest.approx(time.time() + 1800, abs=60)
    own.set(model_inactivity_timeout_minutes=10)
    try:
        assert own.status("a").expire_time.ToSeconds() == pytest.approx(time.time() + 600, abs=60)
        own.set(auto_unload_inactive_models=False)
        assert not own.status("a").HasField("expire_time")
    finally:
        own.set(auto_unload_inactive_models=True, model_inactivity_timeout_minutes=30)


# The queue of loads.


def test_queued_loads_go_by_priority_which_can_be_changed_and_withdrawn(own: Own) -> None:
    """Both places are busy: what waits is seen in its order, and is loaded in it once there is room."""
    own.have("a", "b")
    own.pin("a")
    streams = [own.stream(name) for name in "ab"]
    order: list[str] = []
    loads = {}

    def follow(name: str, load: Any) -> None:
        with contextlib.suppress(grpc.RpcError):
            if last_operation(load).HasField("success"):
                order.append(name)

    for name in "cd":
        load = own.models.LoadModel(model_pb2.LoadModelRequest(name=name), timeout=CALL_SECONDS)
        loads[name] = (load, threading.Thread(target=follow, args=(name, load)))
        loads[name][1].start()
        own.wait_queued(name)
    # c has the turn and waits for a place; d is behind it.
    assert own.queued() == ["c", "d"] and own.status("d").queue_position == 2
    moved = own.models.SetModelPriority(model_pb2.SetModelPriorityRequest(name="d", priority=50))
    assert (moved.name, moved.priority, moved.queue_position) == ("d", 50, 1)
    assert own.snapshot().queue[0].priority == 50 and own.snapshot().queue[0].operation_id
    assert own.queued() == ["d", "c"] and own.snapshot().status.queued_load_count == 2
    loads["c"][0].cancel()  # Nobody else wants it: it leaves the queue at once.
    wait_until(lambda: own.status("c").state == UNLOADED, "the load is withdrawn")
    streams[1].cancel()
    loads["d"][1].join(CALL_SECONDS)
    assert order == ["d"] and own.loaded() == {"a", "d"}
    streams[0].cancel()


def test_a_request_that_leaves_the_queue_takes_its_load_with_it(own: Own) -> None:
    own.have("a", "b")
    streams = [own.stream(name) for name in "ab"]
    leaving = own.inference.Chat.future(chat("hi", "c", max_tokens=1))
    expired = own.inference.Chat.future(chat("hi", "d", max_tokens=1), timeout=1.0)
    wait_until(lambda: own.status("c").state == model_pb2.MODEL_STATE_QUEUED, "c waits")
    assert failure_of(expired.exception()).code == grpc.StatusCode.DEADLINE_EXCEEDED
    leaving.cancel()
    wait_until(lambda: not own.queued() and own.status("c").state == UNLOADED, "nothing waits any more")
    assert own.status("d").state == UNLOADED
    for stream in streams:
        assert next(stream).HasField("delta"), "nobody was evicted for them"
        stream.cancel()


def test_priorities_out_of_range_are_refused(own: Own) -> None:
    for priority in (101, -101, 2**31 - 1):
        request = model_pb2.SetModelPriorityRequest(name="a", priority=priority)
        failure = fails(partial(own.models.SetModelPriority, request))
        assert (failure.reason, failure.fields) == ("INVALID_PARAMETER", ["priority"])
    missing = model_pb2.SetModelPriorityRequest(name="nobody", priority=1)
    assert fails(lambda: own.models.SetModelPriority(missing)).reason == "MODEL_NOT_FOUND"


# Watching.


def test_watching_shows_models_come_work_and_go(own: Own) -> None:
    own.unload("a")
    watch = own.models.WatchManager(model_pb2.WatchManagerRequest())

    def shows(one: model_pb2.WatchManagerResponse) -> bool:
        return any(model.name == "a" and model.state == LOADED for model in one.snapshot.loaded_models)

    assert not shows(next(watch))
    own.load("a")
    assert next(one for one in watch if shows(one)).snapshot.status.loaded_model_count >= 1
    stream = own.stream("a")
    assert next(one for one in watch if one.snapshot.status.tokens_per_second > 0)
    stream.cancel()
    own.models.UnloadModel(model_pb2.UnloadModelRequest(name="a", force=True))
    assert next(one for one in watch if not shows(one))
    watch.cancel()


# Workers that die.


def test_a_model_whose_worker_is_killed_comes_back_by_itself(own: Own) -> None:
    """Its requests end with an error, the other model does not notice, and the model is loaded again unasked."""
    own.have("a", "b")
    other, stream = own.stream("b"), own.stream("a")
    before = own.status("a").process_id
    psutil.Process(before).kill()
    failure = fails(lambda: stream)
    assert failure.reason in ("ENGINE_DEAD", "OUT_OF_MEMORY")
    wait_until(lambda: own.status("a").state == LOADED, "it is loaded again")
    assert own.status("a").process_id != before
    for _ in range(5):
        assert next(other).HasField("delta")
    other.cancel()


def test_a_model_that_dies_again_and_again_stays_unloaded_and_says_why(own: Own) -> None:
    own.have("d")
    for _ in range(3):
        wait_until(lambda: own.status("d").state == LOADED, "it is loaded")
        psutil.Process(own.status("d").process_id).kill()
        wait_until(lambda: own.status("d").state != LOADED, "its death is known")
    wait_until(lambda: own.status("d").state == model_pb2.MODEL_STATE_FAILED, "it stays away")
    model = own.models.GetModel(model_pb2.GetModelRequest(name="d")).model
    assert "SIGKILL" in model.error_message
    assert own.ask("d") == 2, "whoever asks for it gets it"
    assert own.models.GetModel(model_pb2.GetModelRequest(name="d")).model.error_message == ""


def test_a_load_whose_worker_is_killed_is_tried_again_three_times_at_most(own: Own) -> None:
    """Every worker dies as soon as it is there, until nobody kills them any more."""
    own.unload(*NAMES)
    killing = threading.Event()

    def kill_workers() -> None:
        while not killing.is_set():
            for worker in own.server.workers():
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
            time.sleep(0.005)

    killer = threading.Thread(target=kill_workers)
    killer.start()
    try:
        operation = own.load("c")
        assert reason_of(operation) == "MODEL_LOAD_FAILED"
        assert "3 attempts" in operation.error.message and operation.load.attempt == 3
    finally:
        killing.set()
        killer.join()
    assert own.load("c").success.state == LOADED, "as soon as nobody kills it"


def test_another_attempt_neither_evicts_nor_is_refused_without_need(own: Own) -> None:
    """With memory for two: a worker that is killed costs the model that is there nothing, nor is it counted twice."""
    own.have("a")
    own.unload("b", "c", "d")
    required = own.models.EstimateLoad(
        model_pb2.EstimateLoadRequest(name="c", concurrent_request_count=1, tokens_per_request=4096)
    ).required_bytes
    spared = own.status("a").process_id
    own.set(max_model_memory_gb=2.4 * required / 2**30)
    try:
        load = own.models.LoadModel(model_pb2.LoadModelRequest(name="c"), timeout=CALL_SECONDS)
        killed = {spared}
        for _ in range(3):  # The standby, its replacement, and the worker of the second attempt.
            wait_until(lambda: any(worker.pid not in killed for worker in own.server.workers()), "a worker")
            for worker in own.server.workers():
                if worker.pid not in killed:
                    killed.add(worker.pid)
                    with contextlib.suppress(psutil.NoSuchProcess):
                        worker.kill()
        operation = last_operation(load)
        assert operation.success.state == LOADED and not operation.load.evicted_models
        assert own.status("a").process_id == spared
    finally:
        own.set(max_model_memory_gb=0.0)


def test_a_victim_that_hangs_is_gone_also_when_the_load_is_cancelled(own: Own) -> None:
    own.have("a", "b")
    hanging = psutil.Process(own.status("a").process_id)
    hanging.suspend()
    load = own.models.LoadModel(model_pb2.LoadModelRequest(name="c"), timeout=CALL_SECONDS)
    operation = next(load).operation
    wait_until(lambda: own.status("a").state == model_pb2.MODEL_STATE_UNLOADING, "a has to go")
    own.models.CancelOperation(model_pb2.CancelOperationRequest(id=operation.id))
    wait_until(lambda: own.status("a").state == UNLOADED, "a is killed")
    assert not hanging.is_running()
