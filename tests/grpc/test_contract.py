"""The contract as a whole: every RPC answers or says that it is not implemented, every error has its shape."""

import random
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any, cast

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from mlxgui.v1 import audio_pb2, common_pb2, inference_pb2, model_pb2, system_pb2, system_pb2_grpc
from mlxgui_grpc.errors import BY_REASON
from tests.support_calls import CALL_SECONDS, Failure, chat, fails, failure_of, text_of

MODULES: tuple[ModuleType, ...] = (model_pb2, inference_pb2, audio_pb2, system_pb2)
SERVICES: list[ServiceDescriptor] = [
    service for module in MODULES for service in module.DESCRIPTOR.services_by_name.values()
]
METHODS: list[MethodDescriptor] = [method for service in SERVICES for method in service.methods]
NAMES = [method.full_name for method in METHODS]


def invoke(channel: grpc.Channel, method: MethodDescriptor, *requests: bytes | Message) -> list[Message]:
    """Call any RPC with messages, or with bytes that need not be any; every reply, or RpcError."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    reply_class = message_factory.GetMessageClass(method.output_type)

    def serialize(request: bytes | Message) -> bytes:
        return request if isinstance(request, bytes) else request.SerializeToString()

    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    call: Any = getattr(channel, kind)(path, serialize, reply_class.FromString)
    given: Any = iter(requests) if method.client_streaming else requests[0]
    answer = call(given, timeout=CALL_SECONDS)
    return list(answer) if method.server_streaming else [answer]


def empty(method: MethodDescriptor) -> Message:
    return message_factory.GetMessageClass(method.input_type)()


# RPCs whose reply to an empty request is a reply; the others refuse it.
ANSWERS_NOTHING = {
    "ListModels",
    "ListOperations",
    "GetServerInfo",
    "GetMetrics",
}
# RPCs that change the server for everybody, or never end by themselves, once they are implemented.
NOT_CALLED = {"Shutdown", "Restart", "WatchManager"}


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_every_rpc_answers_or_says_that_it_is_not_implemented(
    channel: grpc.Channel, system: system_pb2_grpc.SystemServiceStub, method: MethodDescriptor
) -> None:
    """An RPC that GetServerInfo lists works; all others are UNIMPLEMENTED, with a reason, at once."""
    implemented = set(system.GetServerInfo(system_pb2.GetServerInfoRequest()).capabilities)
    name = f"{method.containing_service.name}.{method.name}"
    if name not in implemented:
        failure = fails(lambda: invoke(channel, method, empty(method)))
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED")
        assert method.name in failure.message
        return
    if method.name in NOT_CALLED:
        return
    try:
        replies = invoke(channel, method, empty(method))
    except grpc.RpcError as error:
        failure = failure_of(error)
        assert failure.code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
        assert failure.reason and failure.domain == "mlxgui.v1" and failure.message
    else:
        assert replies or method.server_streaming


def test_the_main_job_s_rpcs_are_implemented(system: system_pb2_grpc.SystemServiceStub) -> None:
    """What issue 1 asks for is there."""
    wanted = {
        *(
            f"ModelService.{name}"
            for name in [
                "ListModels",
                "GetModel",
                "InstallModel",
                "LoadModel",
                "UnloadModel",
                "DeleteModel",
                "CheckModelHealth",
                "GetOperation",
                "ListOperations",
                "WatchOperation",
                "CancelOperation",
            ]
        ),
        *(
            f"InferenceService.{name}"
            for name in ("Generate", "GenerateStream", "Chat", "ChatStream", "CountTokens")
        ),
        "SystemService.GetServerInfo",
        "SystemService.GetMetrics",
    }
    info = system.GetServerInfo(system_pb2.GetServerInfoRequest())
    assert wanted <= set(info.capabilities)
    known = {f"{method.containing_service.name}.{method.name}" for method in METHODS}
    assert set(info.capabilities) <= known


BAD_BYTES = (b"\xff\xff\xff\xff\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x07", b"\x0a\x05ab", b"\x00")


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_bytes_that_are_no_message_are_refused(channel: grpc.Channel, method: MethodDescriptor) -> None:
    """INVALID_ARGUMENT, or UNIMPLEMENTED where nothing reads them; never UNKNOWN, INTERNAL or a hang."""
    allowed = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED}
    for data in BAD_BYTES:
        failure = fails(lambda data=data: invoke(channel, method, data))  # type: ignore[misc]
        assert failure.code in allowed, (data, failure)
        assert failure.reason in ("INVALID_PARAMETER", "NOT_IMPLEMENTED")


def random_message(rng: random.Random, message_class: type[Message], depth: int = 0) -> Message:
    """A message of the type with random fields, enum values out of range among them."""
    message = message_class()
    for field in message.DESCRIPTOR.fields:
        if rng.random() < 0.5 or (field.message_type and depth > 3):
            continue
        if field.message_type and field.message_type.GetOptions().map_entry:
            continue
        target = getattr(message, field.name)
        if field.message_type:
            value_class = message_factory.GetMessageClass(cast(Any, field.message_type))
            for _ in range(rng.randint(1, 2) if field.is_repeated else 1):
                value = random_message(rng, value_class, depth + 1)
                (target.add() if field.is_repeated else target).CopyFrom(value)
        elif field.is_repeated:
            target.extend(random_value(rng, field) for _ in range(rng.randint(0, 3)))
        else:
            setattr(message, field.name, random_value(rng, field))
    return message


def random_value(rng: random.Random, field: Any) -> Any:
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        if field.type == FieldDescriptor.TYPE_BYTES:
            return rng.randbytes(rng.randint(0, 9))
        return rng.choice(["", "demo", "x", "../..", "{}", "[", "\u0000", "😀" * 9, "a/b", "op-1"])
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return rng.choice([0.0, 0.5, -1.0, 1e30, float("nan"), float("inf")])
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return rng.randint(0, 3)
    return rng.choice([0, 1, 2, -1, 2**31 - 1, -(2**31)])


FUZZED = [m for m in METHODS if m.name not in NOT_CALLED | {"InstallModel", "DeleteModel", "UnloadModel"}]


@pytest.mark.parametrize("method", FUZZED, ids=[method.full_name for method in FUZZED])
def test_random_messages_never_break_anything(channel: grpc.Channel, method: MethodDescriptor) -> None:
    """A reply, or an error with a reason: never UNKNOWN, never INTERNAL."""
    rng = random.Random(method.full_name)
    for _ in range(25):
        request = random_message(rng, message_factory.GetMessageClass(method.input_type))
        if isinstance(request, inference_pb2.GenerateRequest | inference_pb2.ChatRequest):
            request.sampling.max_tokens = min(request.sampling.max_tokens, 3)
        try:
            invoke(channel, method, request)
        except grpc.RpcError as error:
            failure = failure_of(error)
            assert failure.reason not in ("", "INTERNAL"), (request, failure)


def test_the_server_answers_after_all_that(channel: grpc.Channel, inference: Any) -> None:
    assert (
        text_of(inference.Chat(chat("What is the capital of France?"))) == "The capital of France is Paris."
    )


def test_every_error_class_has_its_reason_and_the_status_that_the_contract_names() -> None:
    """And every reason that this version can raise is a class."""
    reasons = {value.name: value for value in common_pb2.ErrorReason.DESCRIPTOR.values}
    comments = _reason_comments()
    for reason, error_class in BY_REASON.items():
        assert f"ERROR_REASON_{reason}" in reasons, error_class
        assert comments[reason].startswith(f"({error_class.status.name}"), (reason, comments[reason])
        assert error_class.__doc__


def _reason_comments() -> dict[str, str]:
    """The comment of each reason in common.proto."""
    from pathlib import Path

    lines = Path(__file__).parents[2].joinpath("proto/mlxgui/v1/common.proto").read_text().splitlines()
    comments: dict[str, str] = {}
    comment = ""
    for line in map(str.strip, lines):
        if line.startswith("//"):
            comment += line.removeprefix("//")
        else:
            if line.startswith("ERROR_REASON_"):
                comments[line.partition(" ")[0].removeprefix("ERROR_REASON_")] = comment.strip()
            comment = ""
    return comments


def test_errors_carry_their_dynamic_parts_and_stay_small(inference: Any) -> None:
    """The status repeats code and message; a huge name does not make the metadata too large to be read."""
    failure = fails(lambda: inference.Chat(chat("hi", model="no-such-model")))
    assert failure == Failure(
        grpc.StatusCode.NOT_FOUND,
        "Model 'no-such-model' not found",
        "MODEL_NOT_FOUND",
        "mlxgui.v1",
        {"model": "no-such-model", "hint": "mlxgui pull no-such-model"},
    )
    failure = fails(lambda: inference.Chat(chat("hi", model="ü" * 250)))
    assert failure.reason == "MODEL_NOT_FOUND" and len(failure.message.encode()) <= 1024


@pytest.mark.parametrize("unix", [False, True])
def test_a_request_id_is_echoed_or_made(server: Any, unix: bool) -> None:
    stub = system_pb2_grpc.SystemServiceStub(server.channel(unix=unix))

    def echoed(given: str | None) -> str:
        metadata = (("x-request-id", given),) if given is not None else ()
        call = stub.GetServerInfo.with_call(system_pb2.GetServerInfoRequest(), metadata=metadata)[1]
        return str(dict(call.initial_metadata())["x-request-id"])

    for good in ("a", "A-b_c.9", "x" * 64):
        assert echoed(good) == good
        assert f"id={good} " in server.log()
    for bad in ("", "x" * 65, "has space", "semi;colon"):
        assert echoed(bad) not in ("", bad)
    assert echoed(None) != echoed(None)


def test_server_info_says_where_and_what_it_is(server: Any, system: Any) -> None:
    info = system.GetServerInfo(system_pb2.GetServerInfoRequest())
    assert info.process_id == server.process.pid and info.state_directory == str(server.home)
    assert set(info.grpc_addresses) == {server.grpc_address, server.unix_address}
    assert info.rest_url == server.rest_url and list(info.api_versions) == ["mlxgui.v1"]
    assert info.limits.max_tokens == 16_384 and info.limits.max_waiting_request_count == 128


# Reflection and health, which generic clients ask first.


def _reflect(
    channel: grpc.Channel, version: str, *requests: reflection_pb2.ServerReflectionRequest
) -> list[Any]:
    path = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
    call = channel.stream_stream(
        path,
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    return list(call(iter(requests), timeout=CALL_SECONDS))


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_describes_every_service(channel: grpc.Channel, version: str) -> None:
    """Under both names: the list of services, and the file of each of their symbols."""
    request = reflection_pb2.ServerReflectionRequest
    (listed,) = _reflect(channel, version, request(list_services=""))
    names = {service.name for service in listed.list_services_response.service}
    wanted = {service.full_name for service in SERVICES} | {
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert names == wanted
    symbols = [*names, *NAMES, "mlxgui.v1.SamplingParams", "mlxgui.v1.Role"]
    replies = _reflect(channel, version, *(request(file_containing_symbol=symbol) for symbol in symbols))
    for symbol, reply in zip(symbols, replies, strict=True):
        assert reply.file_descriptor_response.file_descriptor_proto, symbol
    for missing in ("no.such.Thing", "mlxgui.v1.ModelService.NoMethod", "mlxgui.v1", ""):
        (reply,) = _reflect(channel, version, request(file_containing_symbol=missing))
        assert reply.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_health_is_told_per_service_and_watched(channel: grpc.Channel, inference: Any) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    for name in ("", *(service.full_name for service in SERVICES)):
        assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == serving
    watch: Iterator[Any] = health.Watch(
        health_pb2.HealthCheckRequest(service=SERVICES[1].full_name), timeout=CALL_SECONDS
    )
    assert next(watch).status == serving
    inference.Chat(chat("What is the capital of France?"))
    assert health.Check(health_pb2.HealthCheckRequest(service="model/demo")).status == serving
    failure = fails(lambda: health.Check(health_pb2.HealthCheckRequest(service="model/none")))
    assert failure.code == grpc.StatusCode.NOT_FOUND


def test_unknown_methods_and_services_are_unimplemented(channel: grpc.Channel) -> None:
    paths: Iterable[str] = ("/mlxgui.v1.ModelService/Nothing", "/no.Such/Thing", "/")
    for path in paths:
        call = channel.unary_unary(path, lambda data: data, lambda data: data)
        assert fails(lambda call=call: call(b"")).code == grpc.StatusCode.UNIMPLEMENTED  # type: ignore[misc]
