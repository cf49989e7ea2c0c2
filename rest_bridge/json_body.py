"""Reads JSON bodies strictly: every fault is a 400 that names the field."""

import json
import math
from typing import Any, NoReturn

from rest_bridge.errors import JsonObject, invalid

MAX_DEPTH = 64
# Each array or object costs some 64 bytes of memory whatever it holds; two bytes of JSON make one.
MAX_CONTAINER_COUNT = 2_000_000

INT32_LIMIT = 2**31
INT64_LIMIT = 2**63
# Largest float32; a larger number would become infinite on its way.
FLOAT32_MAX = 3.4028234663852886e38

_ENCODE_TEXT = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def parse_object(raw: bytes) -> JsonObject:
    """The JSON object in `raw`. Raises ApiError (400) for anything else."""
    if not raw.strip():
        raise invalid("The body is empty; send a JSON object.", None)
    if raw.count(b"[") + raw.count(b"{") > MAX_CONTAINER_COUNT:
        raise invalid("The body has too many arrays and objects.", None)
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_object_without_duplicates)
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError:
        raise invalid("The body is not UTF-8.", None) from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise invalid(f"The body is not JSON: {error.msg} at {place}.", None) from None
    except ValueError as error:
        # Also int() of more than 4,300 digits.
        raise invalid(f"The body holds a number that cannot be read: {error}.", None) from None
    if not isinstance(value, dict):
        raise invalid(f"The body must be a JSON object, not {type_name(value)}.", None)
    _check_depth(value)
    return value


def type_name(value: object) -> str:
    """What JSON calls the type of a value, with its article."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
    return "an object"


def text_value(value: object, name: str) -> str:
    """A string that can be sent as UTF-8."""
    if not isinstance(value, str):
        raise invalid(f"`{name}` must be a string, not {type_name(value)}.", name)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise invalid(f"`{name}` holds half of a surrogate pair, which is no character.", name) from None
    return value


def json_text(value: object, name: str) -> str:
    """A value as compact JSON, its keys in their order: they reach the prompt."""
    try:
        return text_value(_ENCODE_TEXT(value), name)
    except ValueError:
        raise invalid(f"`{name}` holds a number that is not finite.", name) from None


def integer_value(value: object, name: str, limit: int = INT32_LIMIT) -> int:
    """A whole number in [-limit, limit); 5.0 counts as 5, as JSON does not tell them apart."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise invalid(f"`{name}` must be finite.", name)
    if isinstance(value, bool) or not isinstance(value, int):
        described = "a fraction" if isinstance(value, float) else type_name(value)
        raise invalid(f"`{name}` must be an integer, not {described}.", name)
    if not -limit <= value < limit:
        raise invalid(f"`{name}` is out of range.", name)
    return value


def number_value(value: object, name: str) -> float:
    """A number that a float32 can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid(f"`{name}` must be a number, not {type_name(value)}.", name)
    # Python's reader takes NaN and Infinity, and 1e999 for infinite; here the field at fault is known.
    if isinstance(value, float) and not math.isfinite(value):
        raise invalid(f"`{name}` must be finite.", name)
    # Compared before float(): an int of 400 digits does not convert.
    if not -FLOAT32_MAX <= value <= FLOAT32_MAX:
        raise invalid(f"`{name}` is out of range.", name)
    return float(value)


class Fields:
    """The members of one JSON object, read by name and type. `null` is the same as absent."""

    kind = "field"
    """What errors call a member."""

    def __init__(self, values: JsonObject, path: str = "") -> None:
        self._values = values
        self._path = path
        self._known: set[str] = set()
        self._children: list[Fields] = []

    @classmethod
    def of(cls, value: object, path: str) -> "Fields":
        """The members of `value`, which must be an object and is called `path` in errors."""
        if not isinstance(value, dict):
            raise invalid(f"`{path}` must be an object, not {type_name(value)}.", path)
        return cls(value, path)

    @property
    def path(self) -> str:
        """What errors call the object itself."""
        return self._path

    def name(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def raw(self, key: str) -> Any:
        self._known.add(key)
        return self._values.get(key)

    def text(self, key: str) -> str | None:
        value = self.raw(key)
        return None if value is None else text_value(value, self.name(key))

    def required_text(self, key: str) -> str:
        value = self.text(key)
        if value is None:
            self.missing(key)
        if not value:
            raise invalid(f"`{self.name(key)}` is empty.", self.name(key))
        return value

    def integer(self, key: str, limit: int = INT32_LIMIT) -> int | None:
        value = self.raw(key)
        return None if value is None else integer_value(value, self.name(key), limit)

    def integer_between(self, key: str, low: int, high: int) -> int | None:
        value = self.integer(key, INT64_LIMIT)
        if value is not None and not low <= value <= high:
            raise invalid(f"`{self.name(key)}` must be between {low} and {high}.", self.name(key))
        return value

    def number(self, key: str) -> float | None:
        value = self.raw(key)
        return None if value is None else number_value(value, self.name(key))

    def boolean(self, key: str) -> bool | None:
        value = self.raw(key)
        if value is not None and not isinstance(value, bool):
            raise invalid(f"`{self.name(key)}` must be a boolean, not {type_name(value)}.", self.name(key))
        return value

    def array(self, key: str) -> list[Any] | None:
        value = self.raw(key)
        if value is not None and not isinstance(value, list):
            raise invalid(f"`{self.name(key)}` must be an array, not {type_name(value)}.", self.name(key))
        return value

    def members(self, key: str) -> "Fields | None":
        value = self.raw(key)
        return None if value is None else self.child(value, self.name(key))

    def child(self, value: object, path: str) -> "Fields":
        """The members of an object inside this one; what is unread of them is unread of this."""
        fields = Fields.of(value, path)
        self._children.append(fields)
        return fields

    def free_object(self, key: str) -> JsonObject | None:
        """An object whose members are not ours to know."""
        value = self.raw(key)
        if value is not None and not isinstance(value, dict):
            raise invalid(f"`{self.name(key)}` must be an object, not {type_name(value)}.", self.name(key))
        return value

    def missing(self, key: str) -> NoReturn:
        raise invalid(f"`{self.name(key)}` is missing.", self.name(key))

    def refuse(self, key: str, why: str) -> None:
        """Refuses a key for which the answer would be wrong, if it is there."""
        if self.raw(key) is not None:
            raise invalid(f"`{self.name(key)}` is not supported: {why}", self.name(key))

    def unread(self) -> list[str]:
        """Names of the members that nothing has asked for, here and inside, nulls aside."""
        own = [
            self.name(key)
            for key, value in self._values.items()
            if key not in self._known and value is not None
        ]
        return own + [name for child in self._children for name in child.unread()]

    def refuse_unread(self) -> None:
        """Refuses a member that nothing has asked for, by name."""
        for name in (self.name(key) for key in self._values if key not in self._known):
            known = f"known are {', '.join(sorted(self._known))}" if self._known else "none is known here"
            raise invalid(f"Unknown {self.kind} `{name[:64]}`; {known}.", name[:64])


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> JsonObject:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise invalid(f"`{key[:64]}` is there twice.", key[:64])
            seen.add(key)
    return values


def _check_depth(value: JsonObject) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for container in level
            for child in (container.values() if type(container) is dict else container)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> Exception:
    return invalid(f"The body is nested deeper than {MAX_DEPTH} levels.", None)
