"""Models of what `message_json` makes of the contract's messages, by the same tables."""

import functools
from collections.abc import Mapping
from typing import Any, Literal

from google.protobuf import duration_pb2, timestamp_pb2
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from pydantic import create_model

from mlxgui.v1 import system_pb2
from rest_bridge.message_json import enum_word, json_name
from rest_bridge.schema.base import Answer, Instant

_TYPES: Mapping[int, type] = {
    FieldDescriptor.TYPE_BOOL: bool,
    FieldDescriptor.TYPE_STRING: str,
    FieldDescriptor.TYPE_BYTES: str,
    FieldDescriptor.TYPE_DOUBLE: float,
    FieldDescriptor.TYPE_FLOAT: float,
}


def message_model(
    descriptor: Descriptor,
    name: str = "",
    more: Mapping[str, Any] | None = None,
    *,
    without: tuple[str, ...] = (),
    exact_bytes: bool = False,
) -> type[Answer]:
    """The model of a message's JSON, with `more` fields (name to type) and `without` some of its own."""
    fields = {key: kind for key, kind in _fields(descriptor, exact_bytes).items() if key not in without}
    return answer_model(name or descriptor.name, {**fields, **(more or {})})


def answer_model(name: str, fields: Mapping[str, Any]) -> type[Answer]:
    """An answer with these fields (name to type), all of which are always there."""
    definitions: Any = {key: (kind, ...) for key, kind in fields.items()}
    return create_model(name, __base__=Answer, **definitions)


def setting_fields() -> dict[str, Any]:
    """Each setting with its JSON type; none is ever null."""
    types: dict[str, Any] = {}
    for field in system_pb2.Settings.DESCRIPTOR.fields:
        kind: Any = _TYPES.get(field.type, int)
        types[field.name] = list[kind] if field.is_repeated else kind
    return types


def word_type(enum: EnumDescriptor) -> Any:
    """The words of an enum."""
    return Literal[tuple(enum_word(enum, value.number) for value in enum.values if value.number)]


@functools.cache
def _nested(descriptor: Descriptor, exact_bytes: bool) -> type[Answer]:
    return message_model(descriptor, exact_bytes=exact_bytes)


def _fields(descriptor: Descriptor, exact_bytes: bool) -> dict[str, Any]:
    return {json_name(field, exact_bytes): _type(field, exact_bytes) for field in descriptor.fields}


def _type(field: FieldDescriptor, exact_bytes: bool) -> Any:
    kind: Any = _value_type(field, exact_bytes)
    message = field.message_type
    if message is not None and message.GetOptions().map_entry:
        value: Any = _value_type(message.fields_by_name["value"], exact_bytes)
        return dict[str, value]
    if field.is_repeated:
        return list[kind]
    # As message_json: unset messages, empty texts and unknown words are null, and so are unset optional fields.
    if (field.has_presence or field.enum_type is not None or kind is str) and kind is not dict:
        return kind | None
    return kind


def _value_type(field: FieldDescriptor, exact_bytes: bool) -> Any:
    if field.message_type is not None:
        if field.message_type is timestamp_pb2.Timestamp.DESCRIPTOR:
            return Instant
        if field.message_type is duration_pb2.Duration.DESCRIPTOR:
            return float
        return _nested(field.message_type, exact_bytes)
    if field.enum_type is not None:
        return word_type(field.enum_type)
    if field.name.endswith("_json"):
        return dict
    if field.name.endswith("_bytes") and not exact_bytes and not field.is_repeated:
        return float
    return _TYPES.get(field.type, int)
