"""The one place that turns a gRPC status, or a fault found here, into an HTTP answer."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from mlxgui.v1 import common_pb2

JsonObject = dict[str, Any]


class _Kind(NamedTuple):
    http_status: int
    type: str
    # Whether OpenAI's SDK, which repeats 409, 429 and 5xx by itself, may do so.
    repeat_may_help: bool = True


_REQUEST = _Kind(400, "invalid_request_error")
_NOT_FOUND = _Kind(404, "invalid_request_error")
_CONFLICT = _Kind(409, "conflict", repeat_may_help=False)
_TOO_LARGE = _Kind(413, "invalid_request_error")
_RATE = _Kind(429, "rate_limit_error")
_FAULT = _Kind(500, "server_error", repeat_may_help=False)
_UNAVAILABLE = _Kind(503, "server_error")

# By ErrorReason, without its prefix. A test asserts that every reason of the contract is here.
BY_REASON: dict[str, _Kind] = {
    "MODEL_NOT_FOUND": _NOT_FOUND,
    "MODEL_NOT_LOADED": _REQUEST,
    "MODEL_INCOMPATIBLE": _REQUEST,
    "MODEL_TYPE_MISMATCH": _REQUEST,
    "MODEL_UNSAFE": _REQUEST,
    "MODEL_IN_USE": _CONFLICT,
    "MODEL_ALREADY_EXISTS": _CONFLICT,
    "MODEL_LOAD_FAILED": _FAULT,
    "MODEL_DELETE_FAILED": _FAULT,
    "INSUFFICIENT_MEMORY": _REQUEST,
    "OUT_OF_MEMORY": _FAULT,
    "HARDWARE_INCOMPATIBLE": _REQUEST,
    "DISK_FULL": _Kind(507, "server_error", repeat_may_help=False),
    "INVALID_PARAMETER": _REQUEST,
    "CONTEXT_LENGTH_EXCEEDED": _REQUEST,
    "PAYLOAD_TOO_LARGE": _TOO_LARGE,
    "INVALID_IMAGE": _REQUEST,
    "INVALID_AUDIO": _REQUEST,
    "URL_BLOCKED": _REQUEST,
    "URL_FETCH_FAILED": _REQUEST,
    "GENERATION_FAILED": _FAULT,
    "TRANSCRIPTION_FAILED": _FAULT,
    "SYNTHESIS_FAILED": _FAULT,
    "QUEUE_FULL": _RATE,
    "SLOW_CONSUMER": _Kind(429, "rate_limit_error", repeat_may_help=False),
    "SERVER_DRAINING": _UNAVAILABLE,
    "ENGINE_DEAD": _UNAVAILABLE,
    "DEADLINE": _Kind(504, "server_error", repeat_may_help=False),
    # Ended by somebody else while its client waits: by an unload, say.
    "CANCELLED": _CONFLICT,
    "HUB_UNAVAILABLE": _Kind(502, "server_error"),
    "HUB_RATE_LIMITED": _RATE,
    "HUB_REPO_NOT_FOUND": _NOT_FOUND,
    "HUB_ACCESS_DENIED": _Kind(403, "permission_error"),
    "SETTING_NOT_FOUND": _NOT_FOUND,
    "OPERATION_NOT_FOUND": _NOT_FOUND,
    "ADAPTER_NOT_FOUND": _NOT_FOUND,
    "NOT_IMPLEMENTED": _Kind(501, "server_error", repeat_may_help=False),
    "UNAUTHENTICATED": _Kind(401, "authentication_error"),
    "PERMISSION_DENIED": _Kind(403, "permission_error"),
    "STATE_DIR_LOCKED": _CONFLICT,
    "INTERNAL": _FAULT,
    # Found by the bridge itself; the contract has no need of them.
    "THREAD_UNSUPPORTED_REQUEST": _REQUEST,
    "CLIENT_GONE": _Kind(499, "server_error", repeat_may_help=False),
    "SERVER_UNREACHABLE": _UNAVAILABLE,
    "ROUTE_NOT_FOUND": _NOT_FOUND,
    "METHOD_NOT_ALLOWED": _Kind(405, "invalid_request_error"),
    "UNSUPPORTED_MEDIA_TYPE": _Kind(415, "invalid_request_error"),
}

# Where a status comes without a reason, mostly from the transport: the reason that says the same.
_BY_CODE: dict[grpc.StatusCode, str] = {
    grpc.StatusCode.INVALID_ARGUMENT: "INVALID_PARAMETER",
    grpc.StatusCode.OUT_OF_RANGE: "INVALID_PARAMETER",
    grpc.StatusCode.FAILED_PRECONDITION: "MODEL_INCOMPATIBLE",
    grpc.StatusCode.NOT_FOUND: "ROUTE_NOT_FOUND",
    grpc.StatusCode.ALREADY_EXISTS: "MODEL_ALREADY_EXISTS",
    grpc.StatusCode.ABORTED: "MODEL_IN_USE",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "QUEUE_FULL",
    grpc.StatusCode.UNAVAILABLE: "SERVER_UNREACHABLE",
    grpc.StatusCode.DEADLINE_EXCEEDED: "DEADLINE",
    grpc.StatusCode.CANCELLED: "CANCELLED",
    grpc.StatusCode.UNIMPLEMENTED: "NOT_IMPLEMENTED",
    grpc.StatusCode.UNAUTHENTICATED: "UNAUTHENTICATED",
    grpc.StatusCode.PERMISSION_DENIED: "PERMISSION_DENIED",
}
_CODE_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(eq=False)
class ApiError(Exception):
    """A request that cannot be answered: what to say and with which HTTP status."""

    reason: str
    message: str
    param: str | None = None
    """The field at fault, as the caller wrote it."""
    retry_after_seconds: float | None = None
    extra_headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.message)

    @property
    def kind(self) -> _Kind:
        return BY_REASON.get(self.reason, _FAULT)

    @property
    def http_status(self) -> int:
        return self.kind.http_status

    def headers(self) -> dict[str, str]:
        """Headers of the answer besides those that every answer has."""
        headers = dict(self.extra_headers)
        if not self.kind.repeat_may_help:
            headers["X-Should-Retry"] = "false"
        elif self.http_status in (429, 503):
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_seconds or 0)))
        return headers

    def openai_error(self) -> JsonObject:
        """The `error` object that OpenAI's clients read."""
        return {
            "message": self.message,
            "type": self.kind.type,
            "param": self.param,
            "code": self.reason.lower(),
        }

    def native_body(self) -> JsonObject:
        """The documented body."""
        return {"detail": self.message}

    def openai_body(self) -> JsonObject:
        """OpenAI's body, which is the documented one as well."""
        return {"error": self.openai_error(), "detail": self.message}


def invalid(message: str, param: str | None) -> ApiError:
    """A field that has a value that it cannot have."""
    return ApiError("INVALID_PARAMETER", message, param)


def too_large(message: str, param: str | None = None) -> ApiError:
    """A size in bytes over its limit."""
    return ApiError("PAYLOAD_TOO_LARGE", message, param)


def from_rpc(error: grpc.RpcError) -> ApiError:
    """What a failed call means: by the reason in its details first, by its status second."""
    code = error.code()
    message = error.details() or ""
    status = _status_details(error)
    if status is None:
        return _without_reason(code, message)
    reason = ""
    param: str | None = None
    retry_after: float | None = None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            reason = info.reason
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad_request = error_details_pb2.BadRequest()
            detail.Unpack(bad_request)
            if bad_request.field_violations:
                param = bad_request.field_violations[0].field or None
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    if reason not in BY_REASON:
        reason = _BY_CODE.get(code, "INTERNAL")
    # The status in the details is the server's own; the call's may have been shortened.
    return ApiError(reason, status.message or message, param, retry_after)


def from_operation(error: common_pb2.OperationError) -> ApiError:
    """What an operation's error means; the same answer as if it had come as a status."""
    reason = reason_name(error.reason)
    if reason not in BY_REASON:
        reason = _BY_CODE.get(_CODE_BY_NUMBER.get(error.code, grpc.StatusCode.INTERNAL), "INTERNAL")
    retry_after = error.retry_after.ToTimedelta().total_seconds() if error.HasField("retry_after") else None
    return ApiError(reason, error.message, error.field or None, retry_after)


def reason_name(reason: int) -> str:
    """The word for a reason; empty for one that this version does not know."""
    value = common_pb2.ErrorReason.DESCRIPTOR.values_by_number.get(reason)
    return "" if value is None else value.name.removeprefix("ERROR_REASON_")


def _status_details(error: grpc.RpcError) -> status_pb2.Status | None:
    trailing: Iterable[Any] = error.trailing_metadata() or ()
    for key, value in trailing:
        if key == "grpc-status-details-bin":
            status = status_pb2.Status()
            try:
                status.ParseFromString(value)
            except DecodeError:
                return None
            return status
    return None


def _without_reason(code: grpc.StatusCode, message: str) -> ApiError:
    """An error that the server's own code did not make."""
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            return ApiError(
                "SERVER_UNREACHABLE",
                "The model server cannot be reached; it is starting or has ended.",
                None,
                1.0,
            )
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return ApiError("DEADLINE", "The model server did not answer in time.")
        case grpc.StatusCode.CANCELLED:
            return ApiError("CANCELLED", "The request was cancelled.")
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in message:
            return too_large("The request is larger than the model server takes.")
    return ApiError(_BY_CODE.get(code, "INTERNAL"), message or "The model server failed.")
