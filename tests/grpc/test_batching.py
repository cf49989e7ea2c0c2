"""Many requests share one model: they join and leave, wait in order, and do not disturb one another."""

import json
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from mlxgui.v1 import (
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    system_pb2_grpc,
)
from tests.conftest import TinyModels
from tests.support_calls import (
    CALL_SECONDS,
    END_TOKENS,
    chat,
    chat_stream,
    completion,
    endless,
    fails,
    last_operation,
    sampling,
    streamed_text,
    text_of,
    until_first_delta,
)
from tests.support_metrics import Gauges, wait_until
from tests.support_server import RunningServer

Stub = inference_pb2_grpc.InferenceServiceStub
PROMPTS: list[dict[str, Any]] = json.loads((Path(__file__).parent.parent / "demo_prompts.json").read_text())
QUESTIONS = {
    p["messages"][0]["content"]: p["expect"]
    for p in PROMPTS
    if p["kind"] in ("capital", "count", "sum", "echo", "unicode") and len(p.get("messages", [])) == 1
}


@pytest.fixture
def gauges(system: system_pb2_grpc.SystemServiceStub) -> Gauges:
    return Gauges(system)


@pytest.fixture(scope="module")
def narrow(
    tiny_models: TinyModels,
    server_environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningServer]:
    """A server that decodes 2 rows at a time and lets 4 wait, with the long tiny model loaded."""
    from tests.support_server import start

    running = start(
        tmp_path_factory.mktemp("narrow"),
        server_environment,
        bridge=False,
        standby_count=0,
        max_concurrent_requests=2,
        max_waiting_requests=4,
        register_demo=False,
    )
    models = model_pb2_grpc.ModelServiceStub(running.channel(unix=True))
    install = model_pb2.InstallModelRequest(local_directory=str(tiny_models.long), name="long")
    assert last_operation(models.InstallModel(install)).HasField("success")
    assert last_operation(models.LoadModel(model_pb2.LoadModelRequest(name="long"))).HasField("success")
    yield running
    running.stop()


@contextmanager
def two_running(stub: Stub) -> Iterator[list[Any]]:
    """Both places of the narrow server taken by streams that do not end."""
    streams = [stub.ChatStream(endless("long"), timeout=CALL_SECONDS) for _ in range(2)]
    try:
        for stream in streams:
            until_first_delta(stream)
        yield streams
    finally:
        for stream in streams:
            stream.cancel()


def test_a_batch_says_what_each_row_would_say_alone(inference: Stub) -> None:
    """32 greedy requests among sampled ones that come and go: the text of each is the one it has alone."""
    rng = random.Random(1)
    chosen = rng.sample(sorted(QUESTIONS), 32)

    def ask(item: tuple[int, str]) -> tuple[str, str]:
        index, question = item
        if index % 3 == 0:  # A neighbour with a sampler, penalties and a length of its own.
            noise: dict[str, Any] = {
                "temperature": 1.3,
                "top_p": 0.9,
                "presence_penalty": 0.5,
                "max_tokens": 1 + index,
            }
            inference.Chat(chat("Tell me a story.", seed=index, **noise), timeout=CALL_SECONDS)
        if index % 2:
            return question, streamed_text(inference.ChatStream(chat_stream(question), timeout=CALL_SECONDS))
        return question, text_of(inference.Chat(chat(question), timeout=CALL_SECONDS))

    with ThreadPoolExecutor(32) as pool:
        for question, text in pool.map(ask, enumerate(chosen)):
            assert text == QUESTIONS[question]


def test_a_request_joins_a_running_batch_and_leaves_it_first(inference: Stub) -> None:
    """A short request is complete while a long one, begun before it, still decodes."""
    long = inference.ChatStream(endless(), timeout=CALL_SECONDS)
    until_first_delta(long)
    for question, answer in list(QUESTIONS.items())[:3]:
        assert text_of(inference.Chat(chat(question))) == answer
    assert next(long).HasField("delta")
    long.cancel()


def test_cancelling_some_leaves_the_others_alone(inference: Stub, gauges: Gauges) -> None:
    """Every second of 24 streams is cancelled in the middle; the rest end as if they had been alone."""
    questions = sorted(QUESTIONS)[:12]
    doomed = [inference.ChatStream(endless(), timeout=CALL_SECONDS) for _ in questions]
    kept = [inference.ChatStream(chat_stream(question), timeout=CALL_SECONDS) for question in questions]
    for stream in doomed:
        until_first_delta(stream)
        stream.cancel()
    assert [streamed_text(stream) for stream in kept] == [QUESTIONS[question] for question in questions]
    wait_until(lambda: gauges.is_idle("demo"), "the cancelled rows leave the batch")


def test_unary_calls_that_are_abandoned_are_cancelled_too(inference: Stub, gauges: Gauges) -> None:
    calls = [inference.Chat.future(endless().request, timeout=CALL_SECONDS) for _ in range(4)]
    wait_until(lambda: gauges["num_requests_running"]["demo"] >= 4, "all run")
    for call in calls:
        call.cancel()
    wait_until(lambda: gauges.is_idle("demo"), "all are gone")


def test_a_deadline_ends_the_call_and_gives_its_row_back(inference: Stub, gauges: Gauges) -> None:
    for call in (
        lambda: inference.Chat(endless().request, timeout=0.3),
        lambda: inference.ChatStream(endless(), timeout=0.3),
    ):
        assert fails(call).code == grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: gauges.is_idle("demo"), "both rows are gone")
    assert (
        text_of(inference.Chat(chat("What is the capital of France?"))) == "The capital of France is Paris."
    )


def test_waiting_requests_are_bounded_and_refused_with_a_time_to_retry(narrow: RunningServer) -> None:
    """2 decode and 4 wait; the 7th is RESOURCE_EXHAUSTED. One that waits and is cancelled makes room for another."""
    stub = inference_pb2_grpc.InferenceServiceStub(narrow.channel())
    gauges = Gauges(system_pb2_grpc.SystemServiceStub(narrow.channel()))
    with two_running(stub):
        waiting = [stub.Chat.future(chat("hi", "long", max_tokens=2)) for _ in range(4)]
        wait_until(lambda: gauges["num_requests_waiting"]["long"] == 4, "four wait")

        for request in (chat("hi", "long"), chat("hi", "long", n=2)):
            failure = fails(lambda request=request: stub.Chat(request))  # type: ignore[misc]
            assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
            assert failure.retry_after_seconds is not None and failure.retry_after_seconds > 0
            assert failure.metadata["model"] == "long"

        waiting[1].cancel()
        wait_until(lambda: gauges["num_requests_waiting"]["long"] == 3, "one left the queue")
        late = stub.Chat.future(chat("hi", "long", max_tokens=2))
        wait_until(lambda: gauges["num_requests_waiting"]["long"] == 4, "its place is taken")

        for index in (0, 2):
            waiting[index].cancel()
        wait_until(lambda: gauges["num_requests_waiting"]["long"] == 2, "two left the queue")
        # A caller whose deadline passes in the queue leaves it as well.
        assert fails(lambda: stub.Chat(chat("hi", "long"), timeout=0.2)).code == (
            grpc.StatusCode.DEADLINE_EXCEEDED
        )
        wait_until(lambda: gauges["num_requests_waiting"]["long"] == 2, "the late one left the queue")
    for call in (waiting[3], late):
        assert call.result(CALL_SECONDS).usage.completion_token_count == 2
    wait_until(lambda: gauges.is_idle("long"), "all are gone")


def test_larger_priorities_go_first_and_equals_in_order(narrow: RunningServer) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(narrow.channel())
    gauges = Gauges(system_pb2_grpc.SystemServiceStub(narrow.channel()))
    order: list[str] = []
    lock = threading.Lock()

    def note(name: str) -> Callable[[Any], None]:
        def done(call: Any) -> None:
            assert call.result()
            with lock:
                order.append(name)

        return done

    with two_running(stub) as streams:
        calls = []
        for number, (name, priority) in enumerate([("a", 0), ("b", -5), ("c", 7), ("d", 0)]):
            request = chat("hi", "long", max_tokens=40)
            request.priority = priority
            call = stub.Chat.future(request, timeout=CALL_SECONDS)
            call.add_done_callback(note(name))
            calls.append(call)
            wait_until(lambda n=number: gauges["num_requests_waiting"]["long"] == n + 1, "it waits")  # type: ignore[misc]
        streams[0].cancel()  # One place: they go through it one after the other.
        for call in calls:
            call.result(CALL_SECONDS)
    assert order == ["c", "a", "d", "b"]


def long_prompt(token_count: int, max_tokens: int = 4) -> inference_pb2.GenerateStreamRequest:
    ids = [5 + i % 900 for i in range(token_count)]
    return inference_pb2.GenerateStreamRequest(
        request=inference_pb2.GenerateRequest(
            model="long",
            prompts=[inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=ids))],
            sampling=sampling(max_tokens=max_tokens, logit_bias=END_TOKENS),
        )
    )


def test_a_long_prompt_is_prefilled_in_chunks_and_says_how_far_it_is(narrow: RunningServer) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(narrow.channel())
    events = list(stub.GenerateStream(long_prompt(9_000), timeout=CALL_SECONDS))
    progress = [event.prefill for event in events if event.HasField("prefill")]
    done = [event.processed_token_count for event in progress]
    assert len(done) >= 4 and done == sorted(set(done))
    assert {event.total_token_count for event in progress} == {9_000}
    assert done[-1] <= 9_000 and progress[0].prompt_index == 0
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "start" and kinds.index("delta") > max(
        i for i, kind in enumerate(kinds) if kind == "prefill"
    )
    assert events[-1].end.usage.prompt_token_count == 9_000


def test_cancelling_in_the_middle_of_a_prefill_frees_the_engine(narrow: RunningServer) -> None:
    """After the first progress event the call is dropped: nothing of it is left, and the next request is served."""
    stub = inference_pb2_grpc.InferenceServiceStub(narrow.channel())
    gauges = Gauges(system_pb2_grpc.SystemServiceStub(narrow.channel()))
    stream = stub.GenerateStream(long_prompt(30_000, max_tokens=2_000), timeout=CALL_SECONDS)
    progress = next(event.prefill for event in stream if event.HasField("prefill"))
    assert progress.processed_token_count < 30_000
    stream.cancel()
    reply = stub.Generate(completion("a", model="long", max_tokens=2), timeout=CALL_SECONDS)
    assert reply.usage.completion_token_count == 2
    wait_until(lambda: gauges.is_idle("long") and gauges["kv_cache_bytes"]["long"] == 0, "its cache is gone")


def test_a_short_request_behind_a_long_prefill_is_answered_first(narrow: RunningServer) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(narrow.channel())
    stream = stub.GenerateStream(long_prompt(14_000), timeout=CALL_SECONDS)
    first = next(event.prefill for event in stream if event.HasField("prefill"))
    assert first.processed_token_count < 14_000
    assert stub.Generate(completion("a", model="long", max_tokens=2), timeout=CALL_SECONDS).choices
    # The long one is in its prefill still: there is progress to come, and no text yet came.
    rest = [event.WhichOneof("event") for event in stream]
    assert "prefill" in rest and rest[-1] == "end"


def test_a_slow_reader_costs_nobody_else_anything(inference: Stub) -> None:
    """A stream that is opened and not read does not hold up the batch."""
    unread = [inference.ChatStream(endless(), timeout=CALL_SECONDS) for _ in range(4)]
    for question in sorted(QUESTIONS)[:5]:
        assert text_of(inference.Chat(chat(question), timeout=CALL_SECONDS)) == QUESTIONS[question]
    for stream in unread:
        stream.cancel()
