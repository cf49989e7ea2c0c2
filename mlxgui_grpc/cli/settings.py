"""`settings`: what the server's settings are, and changing them."""

import sys
from collections.abc import Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from mlxgui.v1 import system_pb2
from mlxgui_grpc.cli.connection import Connection
from mlxgui_grpc.cli.failures import EXIT_USAGE, CommandError
from mlxgui_grpc.cli.output import enum_word, print_json, print_table, to_json
from mlxgui_grpc.client.management import check_setting

FIELDS: dict[str, FieldDescriptor] = dict(system_pb2.Settings.DESCRIPTOR.fields_by_name)

_TRUTHS = {"true": True, "yes": True, "on": True, "1": True}
_TRUTHS |= {"false": False, "no": False, "off": False, "0": False}


def list_settings(connection: Connection, as_json: bool) -> None:
    """Every setting with its value, where that comes from, and what there is to know about it."""
    with connection.open() as client:
        answer = client.settings()
    if as_json:
        print_json({"settings": [_entry(answer.settings, detail) for detail in answer.details]})
        return
    rows = [
        (
            detail.key,
            text(value_of(answer.settings, detail.key)),
            source_word(detail),
            "after restart" if detail.pending_restart else "",
            detail.note,
        )
        for detail in answer.details
    ]
    print_table(("KEY", "VALUE", "SOURCE", "PENDING", "NOTE"), rows)
    if any(detail.pending_restart for detail in answer.details):
        print("Some take effect after a restart: `mlxgui restart`", file=sys.stderr)


def get_setting(connection: Connection, key: str, as_json: bool) -> None:
    """The value alone, for scripts; what there is to know about it goes to stderr."""
    field_of(key)
    with connection.open() as client:
        answer = client.settings()
    detail = next((each for each in answer.details if each.key == key), system_pb2.SettingDetail(key=key))
    if as_json:
        print_json(_entry(answer.settings, detail))
        return
    print(text(value_of(answer.settings, key)))
    if detail.note:
        print(f"Note: {detail.note}", file=sys.stderr)


def set_setting(connection: Connection, key: str, words: Sequence[str], as_json: bool) -> None:
    """Change one setting, and say what that does."""
    value = parse(key, words)
    with connection.open() as client:
        answer = client.set_settings(**{key: value})
    _say(key, answer, "is now", as_json)


def reset_setting(connection: Connection, key: str, as_json: bool) -> None:
    """Forget what was set, and say what counts now."""
    field_of(key)
    with connection.open() as client:
        answer = client.reset_settings(key)
    _say(key, answer, "is again", as_json)


def _say(key: str, answer: system_pb2.UpdateSettingsResponse, is_now: str, as_json: bool) -> None:
    detail = next((each for each in answer.details if each.key == key), system_pb2.SettingDetail(key=key))
    if as_json:
        print_json(_entry(answer.settings, detail))
        return
    value = text(value_of(answer.settings, key)) or "empty"
    if detail.pending_restart:
        print(f"{key} stays {value} until the server is restarted: `mlxgui restart`")
    elif detail.source > system_pb2.SETTING_SOURCE_STORED:
        print(f"{key} stays {value}: the server was started with it")
    else:
        print(f"{key} {is_now} {value}")
    if detail.note:
        print(f"Note: {detail.note}", file=sys.stderr)


def parse(key: str, words: Sequence[str]) -> Any:
    """The value that the words say, of the setting's own type; CommandError where they say none of it."""
    field = field_of(key)
    if field.is_repeated:
        return [name for word in words for name in word.split(",") if name]
    if len(words) != 1:
        raise CommandError(f"{key} takes one value: quote one that has spaces", EXIT_USAGE)
    (word,) = words
    try:
        if field.type == FieldDescriptor.TYPE_BOOL:
            return _TRUTHS[word.lower()]
        if field.type == FieldDescriptor.TYPE_INT32:
            return int(word)
        return float(word) if field.type == FieldDescriptor.TYPE_DOUBLE else word
    except (KeyError, ValueError):
        kinds = {FieldDescriptor.TYPE_BOOL: "true or false", FieldDescriptor.TYPE_INT32: "a whole number"}
        raise CommandError(
            f"{key} must be {kinds.get(field.type, 'a number')}, not '{word}'", EXIT_USAGE
        ) from None


def field_of(key: str) -> FieldDescriptor:
    """The field of a setting; SettingNotFoundError where there is none."""
    check_setting(key)
    return FIELDS[key]


def value_of(settings: system_pb2.Settings, key: str) -> Any:
    """The plain value of a field; None for one of a newer server."""
    if key not in FIELDS:
        return None
    value: Any = getattr(settings, key)
    return list(value) if FIELDS[key].is_repeated else value


def text(value: Any) -> str:
    """A value as the user would type it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)


def source_word(detail: system_pb2.SettingDetail) -> str:
    """`config file`, `stored`, ..."""
    return enum_word(system_pb2.SettingSource.DESCRIPTOR, detail.source).replace("_", " ")


def _entry(settings: system_pb2.Settings, detail: system_pb2.SettingDetail) -> dict[str, Any]:
    return {"key": detail.key, "value": value_of(settings, detail.key), **to_json(detail)}
