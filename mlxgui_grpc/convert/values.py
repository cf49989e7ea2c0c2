"""Single values of the contract to plain ones and back, and the JSON that requests carry."""

import json
import math
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from mlxgui.v1 import common_pb2
from mlxgui_grpc.errors import InvalidRequestError, ModelServerError

MAX_MODEL_BYTES = 512


def priority(value: int) -> int:
    """A place in a queue: larger goes first."""
    if not -100 <= value <= 100:
        raise InvalidRequestError("priority must be between -100 and 100", field="priority")
    return value


def keep_alive_seconds(request: Any) -> float | None:
    """How long a model stays after its last use; infinity: for good. None: the request does not say."""
    if not request.HasField("keep_alive"):
        return None
    seconds: float = request.keep_alive.seconds + request.keep_alive.nanos / 1e9
    return math.inf if seconds < 0 else seconds


def model_name(name: str, field: str = "model", *, may_be_empty: bool = False) -> str:
    """The name of a model as a request gives it; one that `may_be_empty` is for the settings to say."""
    if not name and not may_be_empty:
        raise InvalidRequestError(f"{field} must not be empty", field=field)
    if len(name.encode("utf-8", "replace")) > MAX_MODEL_BYTES:
        raise InvalidRequestError(f"{field} is longer than {MAX_MODEL_BYTES} bytes", field=field)
    return name


def json_object(text: str, field: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{field} is not JSON: {error}", field=field) from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{field} must be a JSON object", field=field)
    json_bytes(value, field)
    return value


def json_bytes(value: Any, field: str) -> bytes:
    """JSON, which an escape like `\\ud800` in a caller's own JSON cannot be a part of: it is no character."""
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        raise InvalidRequestError(
            f"{field} has half of a surrogate pair in it, or is nested too deeply", field=field
        ) from None


def timestamp(seconds: float) -> Timestamp:
    """Unix seconds."""
    whole = math.floor(seconds)
    return Timestamp(seconds=whole, nanos=int((seconds - whole) * 1e6) * 1_000)


def duration(seconds: float) -> Duration:
    """A span that is not negative."""
    microseconds = max(0, round(seconds * 1e6))
    return Duration(seconds=microseconds // 1_000_000, nanos=microseconds % 1_000_000 * 1_000)


def error_to_proto(error: ModelServerError) -> common_pb2.OperationError:
    """An error inside an operation or a session."""
    return common_pb2.OperationError(
        code=error.status.value[0],
        reason=common_pb2.ErrorReason.Value(f"ERROR_REASON_{error.reason}"),
        message=error.message,
        metadata=error.metadata,
        field=error.field,
        retry_after=None if error.retry_after_seconds is None else duration(error.retry_after_seconds),
    )
