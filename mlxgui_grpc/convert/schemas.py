"""JSON Schemas of requests: what is refused before a worker sees them."""

import re
from typing import Any
from urllib.parse import unquote

from mlxgui_grpc.convert.values import json_object
from mlxgui_grpc.errors import InvalidRequestError, PayloadTooLargeError

MAX_SCHEMA_BYTES = 128 * 1_024
"""As many as `engine/constraints.py` compiles."""
MAX_SCHEMA_DEPTH = 64

_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)


def schema_from_text(text: str, field: str) -> dict[str, Any]:
    """A JSON Schema; raises InvalidRequestError or PayloadTooLargeError, which name the field and the limit."""
    if len(text.encode("utf-8", "replace")) > MAX_SCHEMA_BYTES:
        raise PayloadTooLargeError(f"{field} is longer than {MAX_SCHEMA_BYTES >> 10} KiB", field=field)
    if _depth(text) > MAX_SCHEMA_DEPTH:
        raise InvalidRequestError(f"{field} is nested more than {MAX_SCHEMA_DEPTH} levels deep", field=field)
    schema = json_object(text, field)
    _refuse_circles(schema, field)
    return schema


def _depth(text: str) -> int:
    """How deep the objects and lists of a JSON text are nested; without parsing, which recurses."""
    depth = deepest = 0
    for found in _STRING_OR_BRACKET.finditer(text):
        if found[0] in "{[":
            depth += 1
            deepest = max(deepest, depth)
        elif found[0] in "}]":
            depth -= 1
    return deepest


def _refuse_circles(schema: dict[str, Any], field: str) -> None:
    """A `$ref` that leads through nothing but others back to itself says nothing, and resolving it never ends."""
    harmless: set[int] = set()
    unseen: list[Any] = [schema]
    while unseen:
        node = unseen.pop()
        unseen += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        path: set[int] = set()
        first = node.get("$ref") if isinstance(node, dict) else None
        while isinstance(node, dict) and isinstance(node.get("$ref"), str) and id(node) not in harmless:
            if id(node) in path:
                raise InvalidRequestError(f"{field}: the $ref '{first}' leads only to itself", field=field)
            path.add(id(node))
            node = _target(schema, node["$ref"])
        harmless |= path


def _target(schema: dict[str, Any], reference: str) -> Any:
    """What a `$ref` into the same schema points at; None when it points elsewhere or at nothing."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    node: Any = schema
    for part in reference.split("/")[1:]:
        key = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict):
            node = node.get(key)
        elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            return None
    return node
