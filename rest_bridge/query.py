"""Reads the parameters of a query string as strictly as the members of a body."""

import re
from collections.abc import Iterable

from rest_bridge.errors import invalid
from rest_bridge.json_body import INT32_LIMIT, Fields, integer_value, number_value

_TRUE = frozenset({"true", "1", "yes"})
_FALSE = frozenset({"false", "0", "no"})
_INTEGER = re.compile(r"[+-]?\d{1,64}", re.ASCII)
_NUMBER = re.compile(r"[+-]?\d{1,64}(?:\.\d{0,64})?(?:[eE][+-]?\d{1,3})?", re.ASCII)


class Query(Fields):
    """The parameters, which all are text. Raises ApiError (400) for one that is there twice."""

    kind = "parameter"

    def __init__(self, parameters: Iterable[tuple[str, str]]) -> None:
        values: dict[str, str] = {}
        for key, text in parameters:
            if key in values:
                raise invalid(f"`{key[:64]}` is there twice.", key[:64])
            values[key] = text
        super().__init__(values)

    def integer(self, key: str, limit: int = INT32_LIMIT) -> int | None:
        text = self.raw(key)
        if text is None:
            return None
        if _INTEGER.fullmatch(text) is None:
            raise invalid(f"`{key}` must be an integer, not '{text[:32]}'.", key)
        return integer_value(int(text), key, limit)

    def number(self, key: str) -> float | None:
        text = self.raw(key)
        if text is None:
            return None
        if _NUMBER.fullmatch(text) is None:
            raise invalid(f"`{key}` must be a number, not '{text[:32]}'.", key)
        return number_value(float(text), key)

    def boolean(self, key: str) -> bool | None:
        text = self.raw(key)
        if text is None:
            return None
        if text.lower() in _TRUE:
            return True
        if text.lower() in _FALSE:
            return False
        raise invalid(f"`{key}` must be true or false, not '{text[:32]}'.", key)
