"""The bridge's one gRPC channel and the stubs on it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.experimental
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mlxgui.v1 import inference_pb2_grpc, model_pb2_grpc, system_pb2_grpc
from rest_bridge.session import Session

_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A generation that is tried again costs twice and differs.
    ("grpc.enable_retries", 0),
    # The server is on the same machine: find it soon after it is back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A stream is read on the thread that writes its events, without a second one in between.
    (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1),
]


@dataclass(frozen=True)
class Backend:
    """The services of the control process."""

    channel: grpc.Channel
    models: model_pb2_grpc.ModelServiceStub
    inference: inference_pb2_grpc.InferenceServiceStub
    system: system_pb2_grpc.SystemServiceStub
    session: Session
    check_health: Callable[..., health_pb2.HealthCheckResponse]


def connect(target: str) -> Backend:
    """A channel to `target`, which need not answer yet."""
    channel = grpc.insecure_channel(target, options=_OPTIONS)
    inference = inference_pb2_grpc.InferenceServiceStub(channel)
    return Backend(
        channel,
        model_pb2_grpc.ModelServiceStub(channel),
        inference,
        system_pb2_grpc.SystemServiceStub(channel),
        Session(inference),
        _health(channel),
    )


def _health(channel: grpc.Channel) -> Callable[..., health_pb2.HealthCheckResponse]:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    check: Callable[..., health_pb2.HealthCheckResponse] = stub.Check
    return check


def wait_until_reachable(backend: Backend, timeout_seconds: float) -> bool:
    """Whether the server answered within the time."""
    try:
        backend.check_health(health_pb2.HealthCheckRequest(), timeout=timeout_seconds, wait_for_ready=True)
    except grpc.RpcError:
        return False
    return True
