"""Turns a failed call back into the exception that the server raised."""

from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from mlxgui.v1 import common_pb2
from mlxgui_grpc.errors import (
    BY_REASON,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    ModelServerError,
    NotImplementedYetError,
    OperationCancelledError,
    PayloadTooLargeError,
    PermissionDeniedError,
    UnauthenticatedError,
)

_DETAILS_KEY = "grpc-status-details-bin"

_BY_STATUS: dict[StatusCode, type[ModelServerError]] = {
    StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    StatusCode.CANCELLED: OperationCancelledError,
    StatusCode.UNIMPLEMENTED: NotImplementedYetError,
    StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    # Made by gRPC itself when a message is over its limit.
    StatusCode.RESOURCE_EXHAUSTED: PayloadTooLargeError,
}
"""For failures without a reason that this version knows: those of the transport, and of newer servers."""


class ServerUnreachableError(ModelServerError):
    """No server answers, or the connection to it broke. Raised by the client only, never sent."""

    status = StatusCode.UNAVAILABLE
    reason = "SERVER_UNREACHABLE"

    @classmethod
    def not_running(cls, place: str) -> "ServerUnreachableError":
        """Nobody listens there."""
        return cls(f"No server is running {place}: start it with `mlxgui serve`")

    @classmethod
    def of_transport(cls, place: str, details: str) -> "ServerUnreachableError":
        """What the words of gRPC's transport mean to a user."""
        if "Connection refused" in details or "No such file" in details:
            return cls.not_running(place)
        if "Failed parsing HTTP/2" in details or "http1" in details:
            return cls(f"The server {place} does not speak gRPC: give its gRPC address, not the one of REST")
        if "handshake failed" in details:
            return cls(f"TLS with the server {place} failed: check the root certificate (--root-certificate)")
        if "failed to connect" in details and "Socket closed" in details:
            return cls(f"The server {place} wants TLS: give its root certificate (--root-certificate)")
        if "errors resolving" in details or "hostname lookup" in details:
            return cls(f"No server {place}: the name cannot be resolved, check --target")
        return cls(f"The connection to the server {place} broke ({details}): see `mlxgui logs`")


def failure_of_call(error: grpc.RpcError, place: str) -> ModelServerError:
    """The exception that a failed call stands for; `place` says in words where the server was looked for."""
    # Every RpcError that a call raises is also that call.
    call: Any = error
    code: StatusCode = call.code()
    message: str = call.details() or code.name
    info = error_details_pb2.ErrorInfo()
    field = ""
    retry_after_seconds: float | None = None
    for key, value in call.trailing_metadata() or ():
        if key != _DETAILS_KEY:
            continue
        for detail in status_pb2.Status.FromString(value).details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                detail.Unpack(info)
            elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                bad_request = error_details_pb2.BadRequest()
                detail.Unpack(bad_request)
                field = next((violation.field for violation in bad_request.field_violations), "")
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                retry_info = error_details_pb2.RetryInfo()
                detail.Unpack(retry_info)
                retry_after_seconds = retry_info.retry_delay.ToTimedelta().total_seconds()
    if not info.reason and code is StatusCode.UNAVAILABLE:
        return ServerUnreachableError.of_transport(place, message)
    if not info.reason and (code, message) == (StatusCode.CANCELLED, "CANCELLED"):
        # A caller's own cancellation says so in other words: this is how gRPC cuts what runs when its server stops.
        return ServerUnreachableError(f"The server {place} ended before it had answered: see `mlxgui logs`")
    return _failure(info.reason, code, message, field, retry_after_seconds, dict(info.metadata))


def failure_of_usage(error: Exception) -> ModelServerError:
    """What gRPC means when it refuses to start a call: the channel is closed, or an argument is not one."""
    if "closed" in str(error):
        return ServerUnreachableError("The client is closed")
    return InvalidRequestError(f"The call cannot be made: {error}")


def failure_of_operation(error: common_pb2.OperationError) -> ModelServerError:
    """The exception that the error of an operation stands for."""
    reason = (
        common_pb2.ErrorReason.Name(error.reason) if error.reason in common_pb2.ErrorReason.values() else ""
    )
    code = next((code for code in StatusCode if code.value[0] == error.code), StatusCode.UNKNOWN)
    retry_after = error.retry_after.ToTimedelta().total_seconds() if error.HasField("retry_after") else None
    reason = reason.removeprefix("ERROR_REASON_")
    return _failure(reason, code, error.message, error.field, retry_after, dict(error.metadata))


def _failure(
    reason: str,
    code: StatusCode,
    message: str,
    field: str,
    retry_after_seconds: float | None,
    metadata: dict[str, str],
) -> ModelServerError:
    cls = BY_REASON.get(reason) or _BY_STATUS.get(code, InternalError)
    error = cls(message, field=field, retry_after_seconds=retry_after_seconds)
    error.metadata = metadata
    return error
