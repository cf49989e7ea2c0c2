"""Messages of the contract as JSON, by their descriptors and a table of the documented names. Pure."""

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

from google.protobuf import duration_pb2, timestamp_pb2
from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message

from rest_bridge.errors import JsonObject

GIB = 1024**3

# The contract's names on the left, the document's on the right.
_NAMES = {
    "state": "status",
    "create_time": "created_at",
    "update_time": "updated_at",
    "last_use_time": "last_used_at",
    "load_time": "loaded_at",
    "expire_time": "expires_at",
    "queue_time": "queued_at",
    "remaining": "remaining_seconds",
    "start_time": "started_at",
    "metadata_json": "metadata",
    "download_count": "downloads",
    "like_count": "likes",
    "loaded_model_count": "loaded_models_count",
    "queued_load_count": "queue_size",
    "inactivity_timeout": "inactivity_timeout_minutes",
}


def message_json(
    message: Message, names: Mapping[str, str] = _NAMES, *, exact_bytes: bool = False
) -> JsonObject:
    """Every field of a message: unset ones as null, enums as lower-case words, instants in UTC without a zone.

    Sizes are GiB under a name in `_gb`, as documented, or with `exact_bytes` what they are.
    """
    body: JsonObject = {}
    for field in message.DESCRIPTOR.fields:
        name = json_name(field, exact_bytes, names)
        value = _field_json(message, field, names, exact_bytes)
        if name.endswith("_gb") and field.name.endswith("_bytes"):
            value = None if value is None else gigabytes(value)
        elif name.endswith("_minutes") and field.name == "inactivity_timeout":
            value = None if value is None else _whole(value / 60)
        body[name] = value
    return body


def json_name(field: Any, exact_bytes: bool = False, names: Mapping[str, str] = _NAMES) -> str:
    """What a field of a message is called in JSON."""
    name: str = names.get(field.name, field.name)
    if field.name.endswith("_bytes") and not exact_bytes and not field.is_repeated:
        return name.removesuffix("_bytes") + "_gb"
    return name


def gigabytes(size_bytes: int) -> float:
    """GiB, to four significant digits."""
    if size_bytes == 0:
        return 0.0
    size = size_bytes / GIB
    return round(size, 3 - math.floor(math.log10(abs(size))))


def instant(time: timestamp_pb2.Timestamp) -> str:
    """The document's form of an instant: UTC, to the second, without a zone."""
    return time.ToDatetime().replace(microsecond=0).isoformat()


def _field_json(message: Message, field: Any, names: Mapping[str, str], exact_bytes: bool) -> Any:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(value)
    if field.is_repeated:
        return [_value_json(item, field, names, exact_bytes) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _value_json(value, field, names, exact_bytes)


def _value_json(value: Any, field: Any, names: Mapping[str, str], exact_bytes: bool) -> Any:
    match value:
        case timestamp_pb2.Timestamp():
            return instant(value)
        case duration_pb2.Duration():
            return _whole(value.seconds + value.nanos / 1e9)
        case Message():
            return message_json(value, names, exact_bytes=exact_bytes)
        case bytes():
            return base64.b64encode(value).decode()
        case str() if field.name.endswith("_json"):
            return json.loads(value) if value else {}
        # An empty text means "none" all over the contract, and the document says null.
        case "":
            return None
    if field.enum_type is not None:
        return enum_word(field.enum_type, value)
    return value


def enum_word(enum: EnumDescriptor, number: int) -> str | None:
    """The word for a value of an enum: lower case, without the enum's prefix. None: unspecified or unknown."""
    value = enum.values_by_number.get(number)
    if value is None or number == 0:
        return None
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return value.name.removeprefix(prefix).lower()


def _whole(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number
