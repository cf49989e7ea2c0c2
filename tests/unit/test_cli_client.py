"""The pure parts of the typed client: requests, service config, failures."""

import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from mlxgui.v1 import common_pb2, inference_pb2, model_pb2
from mlxgui_grpc.client import (
    AsyncClient,
    Client,
    Sampling,
    ServerUnreachableError,
    chat_message,
    discover,
    finish_reason,
    management,
    messages,
)
from mlxgui_grpc.client.address import ServerAddress
from mlxgui_grpc.client.channel import channel_options, service_config
from mlxgui_grpc.client.failures import failure_of_call, failure_of_operation
from mlxgui_grpc.errors import (
    BY_REASON,
    InternalError,
    InvalidRequestError,
    ModelServerError,
    PayloadTooLargeError,
    QueueFullError,
    SettingNotFoundError,
)


class FailedCall(grpc.RpcError):
    """What grpc raises: an error that is its call."""

    def __init__(self, code: grpc.StatusCode, details: str, *values: Message) -> None:
        self._code, self._details = code, details
        status = status_pb2.Status(code=code.value[0], message=details)
        for value in values:
            status.details.add().Pack(value)
        self._metadata = (
            [("x", "y"), ("grpc-status-details-bin", status.SerializeToString())] if values else []
        )

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._metadata


@pytest.mark.parametrize("cls", BY_REASON.values(), ids=BY_REASON)
def test_a_failure_comes_back_as_the_class_that_was_raised(cls: type[ModelServerError]) -> None:
    """By its reason, with message, metadata, field and time to wait."""
    error = failure_of_call(
        FailedCall(
            cls.status,
            "Something is so",
            error_details_pb2.ErrorInfo(reason=cls.reason, domain="mlxgui.v1", metadata={"model": "m"}),
            error_details_pb2.BadRequest(
                field_violations=[error_details_pb2.BadRequest.FieldViolation(field="sampling.top_p")]
            ),
            error_details_pb2.RetryInfo(retry_delay=Duration(seconds=2)),
        ),
        "in /h",
    )
    assert type(error) is cls
    assert error.message == "Something is so"
    assert error.metadata == {"model": "m"}
    assert error.field == "sampling.top_p"
    assert error.retry_after_seconds == 2.0


@pytest.mark.parametrize(
    ("details", "words"),
    [
        ("failed to connect to all addresses; last error: UNKNOWN: Connection refused", "mlxgui serve"),
        (
            "failed to connect to all addresses; last error: connect failed: No such file or directory",
            "mlxgui serve",
        ),
        ("failed to connect to all addresses; last error: Tls handshake failed", "--root-certificate"),
        ("failed to connect to all addresses; last error: Socket closed", "--root-certificate"),
        ("errors resolving nowhere:1", "--target"),
        ("Socket closed", "mlxgui logs"),
        (
            "failed to connect to all addresses; last error: UNAVAILABLE: ipv4:127.0.0.1:80: Failed parsing HTTP/2 "
            "(Expected SETTINGS frame as the first frame, got frame type 80)",
            "does not speak gRPC",
        ),
    ],
)
def test_a_broken_transport_is_unreachable_and_names_the_way_out(details: str, words: str) -> None:
    """Whatever words gRPC finds for it."""
    error = failure_of_call(FailedCall(grpc.StatusCode.UNAVAILABLE, details), "in /h")
    assert isinstance(error, ServerUnreachableError)
    assert words in error.message
    assert "in /h" in error.message


def test_failures_without_a_known_reason_go_by_their_status() -> None:
    """Those of gRPC itself, and reasons of a newer server."""
    newer = error_details_pb2.ErrorInfo(reason="INVENTED_LATER")
    cut = failure_of_call(FailedCall(grpc.StatusCode.CANCELLED, "CANCELLED"), "in /h")
    assert isinstance(cut, ServerUnreachableError) and "ended before" in cut.message
    too_large = failure_of_call(FailedCall(grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max"), "")
    invalid = failure_of_call(FailedCall(grpc.StatusCode.INVALID_ARGUMENT, "no", newer), "")
    unknown = failure_of_call(FailedCall(grpc.StatusCode.UNKNOWN, "?", newer), "")
    assert type(too_large) is PayloadTooLargeError
    assert type(invalid) is InvalidRequestError
    assert type(unknown) is InternalError


def test_the_error_of_an_operation_is_an_exception_too() -> None:
    """As if the call itself had failed."""
    error = failure_of_operation(
        common_pb2.OperationError(
            code=8,
            reason=common_pb2.ERROR_REASON_QUEUE_FULL,
            message="Full",
            metadata={"model": "m"},
            field="x",
            retry_after=Duration(seconds=1),
        )
    )
    assert type(error) is QueueFullError
    assert (error.message, error.metadata, error.field, error.retry_after_seconds) == (
        "Full",
        {"model": "m"},
        "x",
        1.0,
    )


def test_only_harmless_unary_methods_are_repeated() -> None:
    """Never a generation, never a stream."""
    (entry,) = json.loads(service_config())["methodConfig"]
    names = {f"{name['service'].removeprefix('mlxgui.v1.')}.{name['method']}" for name in entry["name"]}
    assert names >= {"ModelService.ListModels", "ModelService.UnloadModel", "InferenceService.CountTokens"}
    assert not names & {
        "InferenceService.Generate",
        "InferenceService.GenerateStream",
        "InferenceService.Chat",
        "InferenceService.ChatStream",
        "ModelService.InstallModel",
        "ModelService.LoadModel",
        "ModelService.DeleteModel",
    }
    assert entry["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]


def test_calls_to_this_machine_pass_by_the_proxy() -> None:
    """gRPC would send them through `http_proxy`."""
    assert ("grpc.enable_http_proxy", 0) in channel_options(ServerAddress.of("127.0.0.1:1"))
    assert ("grpc.enable_http_proxy", 0) not in channel_options(ServerAddress.of("example.org:1"))


def test_sampling_has_the_fields_of_the_contract() -> None:
    """All of them, none else."""
    assert set(get_type_hints(Sampling)) == {
        field.name for field in common_pb2.SamplingParams.DESCRIPTOR.fields
    }


def test_both_clients_have_the_same_methods() -> None:
    """What one can do, the other can."""
    blocking = {name for name in dir(Client) if not name.startswith("_")}
    asynchronous = {name for name in dir(AsyncClient) if not name.startswith("_")}
    assert blocking == asynchronous >= {"chat", "models", "watch_manager", "search", "settings", "restart"}
    for name in blocking:
        mine, other = inspect.signature(getattr(Client, name)), inspect.signature(getattr(AsyncClient, name))
        assert mine.parameters == other.parameters, name


def test_messages_may_be_text_mappings_or_the_contracts_own() -> None:
    """One alone counts as a conversation."""
    mine = chat_message("assistant", "Yes?")
    request = messages.chat_request(
        "m", ["Hi", {"role": "system", "content": "Be brief"}, mine], {"stop": "x"}
    )
    assert [message.role for message in request.messages] == [
        inference_pb2.ROLE_USER,
        inference_pb2.ROLE_SYSTEM,
        inference_pb2.ROLE_ASSISTANT,
    ]
    assert list(request.sampling.stop) == ["x"]
    assert not request.sampling.HasField("temperature")
    assert not request.HasField("keep_alive")
    assert messages.chat_request("m", "Hi", {}) == messages.chat_request("m", ["Hi"], {})


@pytest.mark.parametrize(
    ("call", "field", "words"),
    [
        (lambda client: client.chat("m", [{"role": "robot", "content": "Hi"}]), "messages.role", "robot"),
        (lambda client: client.chat("m", [{"role": "user"}]), "messages.content", "content"),
        (lambda client: client.chat("m", [{"content": "Hi"}]), "messages.role", "role"),
        (lambda client: client.chat("m", [7]), "", "int"),
        (lambda client: client.chat("m", "Hi", seed=10**20), "sampling.seed", "seed"),
        (lambda client: client.generate("m", "Hi", top_p="high"), "sampling.top_p", "high"),
        (lambda client: client.generate("m", "Hi", warmth=1), "sampling.warmth", "warmth"),
        (lambda client: client.generate("m", "\ud800"), "", "surrogates"),
        (lambda client: client.load("m", keep_alive_seconds=math.nan), "keep_alive", "nan"),
        (lambda client: client.load("m", keep_alive_seconds=-math.inf), "keep_alive", "inf"),
        (lambda client: client.load("m", keep_alive_seconds=1e30), "keep_alive", "1e+30"),
        (lambda client: client.model(5), "", "argument"),
        (lambda client: client.set_priority("m", 10**10), "", "argument"),
        (lambda client: client.estimate("m", tokens_per_request="many"), "", "argument"),
        (lambda client: client.search(sort="size"), "sort", "downloads, likes, created, updated"),
        (lambda client: client.search(kind="cat"), "kind", "any, embedding"),
        (lambda client: client.search(limit=0), "limit", "between 1 and 1000"),
        (lambda client: client.search(max_memory_bytes=10**30), "", "argument"),
        (lambda client: client.set_settings(server_port="eighty"), "server_port", "'eighty'"),
        (lambda client: client.set_settings(server_port=10**12), "server_port", "server_port cannot be"),
        (lambda client: client.set_settings(preload_models="a"), "preload_models", "a list"),
        (lambda client: client.shutdown(grace_seconds=math.inf), "grace", "inf"),
        (lambda client: client.restart(grace_seconds=1e30), "grace", "1e+30"),
        (lambda client: client.chat("m", "Hi", timeout_seconds="long"), "", "call"),
    ],
)
async def test_arguments_that_do_not_fit_are_the_callers_mistake(
    call: Callable[[Any], Any], field: str, words: str
) -> None:
    """As the server would say it, from both clients, and before anything is sent."""
    with (
        Client("unix:/nowhere") as client,
        pytest.raises(InvalidRequestError, match=re.escape(words)) as refused,
    ):
        call(client)
    assert refused.value.field == field
    async with AsyncClient("unix:/nowhere") as other:
        with pytest.raises(InvalidRequestError, match=re.escape(words)) as refused:
            await call(other)
    assert refused.value.field == field


async def test_a_setting_that_there_is_not_is_not_found() -> None:
    """With the one that was perhaps meant; nothing is sent."""
    with Client("unix:/nowhere") as client:
        with pytest.raises(SettingNotFoundError, match="did you mean server_port"):
            client.set_settings(server_prot=1)  # type: ignore[call-arg]
        with pytest.raises(SettingNotFoundError, match="`mlxgui settings`"):
            client.reset_settings("colour")
    async with AsyncClient("unix:/nowhere") as other:
        with pytest.raises(SettingNotFoundError):
            await other.reset_settings("colour")


def test_masks_name_what_is_changed_and_what_is_forgotten() -> None:
    """And nothing else: a default is a value too."""
    change = management.settings_request({"server_port": 0, "preload_models": ["a", "b"]})
    assert list(change.update_mask.paths) == ["server_port", "preload_models"]
    assert list(change.settings.preload_models) == ["a", "b"]
    forget = management.reset_request(["log_level"])
    assert list(forget.reset_mask.paths) == ["log_level"] and not forget.HasField("update_mask")


def test_a_search_tells_no_limit_from_what_there_is() -> None:
    """Unset is whatever the size, 0 what the machine has."""
    assert not management.search_request("q", "likes", "any", None, 5).HasField("max_memory_bytes")
    here = management.search_request("q", "likes", "embedding", 0, 500)
    assert here.HasField("max_memory_bytes") and here.page_size == management.MAX_PAGE_SIZE
    assert (here.sort, here.kind) == (model_pb2.CATALOG_SORT_LIKES, model_pb2.CATALOG_KIND_EMBEDDING)


def test_a_key_that_no_header_can_carry_is_refused() -> None:
    """gRPC itself would only say that metadata is invalid."""
    with pytest.raises(InvalidRequestError, match="API key") as refused:
        Client("unix:/nowhere", token="two\nlines")
    assert "two" not in str(refused.value)


async def test_a_closed_client_says_so() -> None:
    """From calls and from streams, blocking or not."""
    client, other = Client("unix:/nowhere"), AsyncClient("unix:/nowhere")
    client.close()
    await other.close()
    for call in (client.server_info, lambda: client.load("m"), lambda: other.load("m")):
        with pytest.raises(ServerUnreachableError, match="closed"):
            call()
    with pytest.raises(ServerUnreachableError, match="closed"):
        await other.server_info()


def test_images_come_before_the_text() -> None:
    """As chat templates expect them."""
    message = chat_message("user", "What is this?", [b"png"])
    assert [part.WhichOneof("part") for part in message.content] == ["image", "text"]
    assert message.content[0].image.data == b"png"


def test_spans_keep_their_sign_and_fraction() -> None:
    """-1 is for ever, 0.5 half a second."""
    assert messages.duration(None) is None
    assert messages.duration(-1) == Duration(seconds=-1)
    assert messages.duration(0.5) == Duration(nanos=500_000_000)


def test_finish_reasons_are_words() -> None:
    """Also one that a newer server invents."""
    assert finish_reason(common_pb2.FINISH_REASON_TOOL_CALLS) == "tool_calls"
    assert finish_reason(77) == "unspecified"


def test_the_running_server_is_found_in_its_state_folder(tmp_path: Path) -> None:
    """By its unix socket, else by its port; without either there is none."""
    with pytest.raises(ServerUnreachableError, match="mlxgui serve"):
        discover(tmp_path)
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "address.json"
    file.write_text('{"pid": 1, "unix": "/s", "grpc": "127.0.0.1:5", "rest": ""}')
    assert discover(environ={"MLX_GUI_HOME": str(tmp_path)}).target == "unix:/s"
    file.write_text('{"pid": 1, "unix": "", "grpc": "127.0.0.1:5"}')
    assert discover(tmp_path).target == "127.0.0.1:5"
    file.write_text('{"pid": 1')
    with pytest.raises(ServerUnreachableError):
        discover(tmp_path)
