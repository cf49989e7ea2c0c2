"""What the bridge answers to each way a call can fail."""

from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2

from mlxgui.v1 import common_pb2
from rest_bridge import errors


class _Failure(grpc.RpcError):
    """A failed call as grpcio presents it."""

    def __init__(
        self, code: grpc.StatusCode, details: str, trailing: Sequence[tuple[str, bytes]] = ()
    ) -> None:
        super().__init__()
        self._code, self._details, self._trailing = code, details, trailing

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._trailing


def _failure(code: grpc.StatusCode, message: str, *details: Any) -> _Failure:
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return _Failure(code, message, [("grpc-status-details-bin", status.SerializeToString())])


def _info(reason: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain="mlxgui.v1")


def test_every_reason_of_the_contract_has_an_answer() -> None:
    """A reason that is added to the contract needs a line here."""
    reasons = {
        name.removeprefix("ERROR_REASON_") for name in common_pb2.ErrorReason.DESCRIPTOR.values_by_name
    } - {"UNSPECIFIED"}
    assert reasons <= set(errors.BY_REASON)


@pytest.mark.parametrize(
    ("code", "reason", "http_status"),
    [
        (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", 404),
        (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NOT_LOADED", 400),
        (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_IN_USE", 409),
        (grpc.StatusCode.ALREADY_EXISTS, "MODEL_ALREADY_EXISTS", 409),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", 429),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "PAYLOAD_TOO_LARGE", 413),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL", 507),
        (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD", 503),
        (grpc.StatusCode.UNAVAILABLE, "HUB_UNAVAILABLE", 502),
        (grpc.StatusCode.PERMISSION_DENIED, "HUB_ACCESS_DENIED", 403),
        (grpc.StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED", 501),
        (grpc.StatusCode.INTERNAL, "GENERATION_FAILED", 500),
        (grpc.StatusCode.INTERNAL, "MODEL_LOAD_FAILED", 500),
        (grpc.StatusCode.INTERNAL, "MODEL_DELETE_FAILED", 500),
        (grpc.StatusCode.INTERNAL, "OUT_OF_MEMORY", 500),
        (grpc.StatusCode.FAILED_PRECONDITION, "INSUFFICIENT_MEMORY", 400),
        (grpc.StatusCode.FAILED_PRECONDITION, "HARDWARE_INCOMPATIBLE", 400),
        (grpc.StatusCode.CANCELLED, "CANCELLED", 409),
        # A reason of a later version: by the status.
        (grpc.StatusCode.INVALID_ARGUMENT, "SOMETHING_NEW", 400),
    ],
)
def test_the_reason_decides_before_the_status(code: grpc.StatusCode, reason: str, http_status: int) -> None:
    """One gRPC status stands for several HTTP ones."""
    error = errors.from_rpc(_failure(code, "Words.", _info(reason)))
    assert (error.http_status, error.message) == (http_status, "Words.")


def test_field_and_wait_come_through() -> None:
    """BadRequest names the field, RetryInfo the pause."""
    error = errors.from_rpc(
        _failure(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "Full.",
            _info("QUEUE_FULL"),
            error_details_pb2.BadRequest(
                field_violations=[error_details_pb2.BadRequest.FieldViolation(field="sampling.n")]
            ),
            error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=200_000_000)),
        )
    )
    assert error.param == "sampling.n"
    assert error.headers() == {"Retry-After": "2"}


@pytest.mark.parametrize(
    ("failure", "http_status"),
    [
        (_Failure(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses"), 503),
        (_Failure(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"), 504),
        (_Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (5 vs. 4)"), 413),
        (_Failure(grpc.StatusCode.UNIMPLEMENTED, "Method not found!"), 501),
        (_Failure(grpc.StatusCode.UNKNOWN, "boom"), 500),
        (_Failure(grpc.StatusCode.UNAVAILABLE, "x", [("grpc-status-details-bin", b"\xff\xff")]), 503),
    ],
)
def test_a_failure_of_the_transport_has_a_status_too(failure: _Failure, http_status: int) -> None:
    """Errors that no servicer raised carry no reason."""
    assert errors.from_rpc(failure).http_status == http_status


@pytest.mark.parametrize(
    "reason", ["MODEL_LOAD_FAILED", "OUT_OF_MEMORY", "GENERATION_FAILED", "MODEL_IN_USE"]
)
def test_clients_are_told_not_to_repeat_what_a_repeat_cannot_mend(reason: str) -> None:
    """OpenAI's SDK would send each of them three times."""
    assert errors.ApiError(reason, "Words.").headers()["X-Should-Retry"] == "false"


def test_an_operation_fails_as_a_call_does() -> None:
    """The same reason is the same answer, wherever it comes from."""
    error = errors.from_operation(
        common_pb2.OperationError(
            code=5,
            reason=common_pb2.ERROR_REASON_HUB_REPO_NOT_FOUND,
            message="No such repository.",
            field="model_id",
        )
    )
    assert (error.http_status, error.param) == (404, "model_id")
    assert errors.from_operation(common_pb2.OperationError(code=14, message="?")).http_status == 503


def test_both_shapes_of_an_error() -> None:
    """Native routes say `detail` alone, OpenAI's both."""
    error = errors.ApiError("MODEL_NOT_FOUND", "Model 'x' not found")
    assert error.native_body() == {"detail": "Model 'x' not found"}
    assert error.openai_body() == {
        "error": {
            "message": "Model 'x' not found",
            "type": "invalid_request_error",
            "param": None,
            "code": "model_not_found",
        },
        "detail": "Model 'x' not found",
    }
