"""Callers leave at any moment, many at once: nothing of them is left behind."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import psutil

from mlxgui.v1 import inference_pb2_grpc, system_pb2_grpc
from tests.support_calls import CALL_SECONDS, chat, endless, failure_of, text_of
from tests.support_metrics import Gauges, wait_until
from tests.support_server import RunningServer

CALLS = 64


def test_a_storm_of_cancelled_calls_leaves_nothing_behind(
    server: RunningServer,
    inference: inference_pb2_grpc.InferenceServiceStub,
    system: system_pb2_grpc.SystemServiceStub,
) -> None:
    """64 callers, streams and unary calls, each leaving after 0 to 5 events or some milliseconds; three rounds."""
    gauges = Gauges(system)
    rng = random.Random(3)
    assert inference.Chat(chat("What is the capital of France?"), timeout=CALL_SECONDS)

    def leave(plan: tuple[int, int, float]) -> str:
        kind, event_count, delay_seconds = plan
        if kind == 0:
            unary = inference.Chat.future(endless().request, timeout=CALL_SECONDS)
            threading.Event().wait(delay_seconds)
            unary.cancel()
            return "cancelled"
        stream = inference.ChatStream(endless(), timeout=CALL_SECONDS)
        try:
            for _ in range(event_count):
                next(stream)
        except grpc.RpcError as error:
            return failure_of(error).reason
        stream.cancel()
        return "cancelled"

    for _ in range(3):
        plans = [(rng.randrange(3), rng.randrange(6), rng.random() * 0.05) for _ in range(CALLS)]
        with ThreadPoolExecutor(CALLS) as pool:
            assert set(pool.map(leave, plans)) == {"cancelled"}
        wait_until(lambda: gauges.is_idle("demo"), "the batch is empty")
        assert (
            text_of(inference.Chat(chat("What is the capital of France?")))
            == "The capital of France is Paris."
        )


def test_connections_that_break_cancel_their_calls(
    server: RunningServer, system: system_pb2_grpc.SystemServiceStub
) -> None:
    """Not calls that are cancelled but channels that are gone, with many streams on each; no descriptor leaks."""
    gauges = Gauges(system)
    process = psutil.Process(server.process.pid)
    before = process.num_fds()
    for _ in range(6):
        channel = grpc.insecure_channel(server.grpc_address, options=[("grpc.use_local_subchannel_pool", 1)])
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        streams = [stub.ChatStream(endless(), timeout=CALL_SECONDS) for _ in range(5)]
        for stream in streams:
            assert next(stream).HasField("start")
        channel.close()
    wait_until(lambda: gauges.is_idle("demo"), "the batch is empty")
    wait_until(lambda: process.num_fds() <= before + 2, "the connections are closed")


def test_a_caller_who_leaves_before_its_prompt_is_tokenized_is_forgotten(
    inference: inference_pb2_grpc.InferenceServiceStub, system: system_pb2_grpc.SystemServiceStub
) -> None:
    """Cancelled as soon as sent: whichever stage it had reached, nothing decodes for nobody."""
    gauges = Gauges(system)
    for _ in range(40):
        inference.Chat.future(endless().request, timeout=CALL_SECONDS).cancel()
    wait_until(lambda: gauges.is_idle("demo"), "none is left")
