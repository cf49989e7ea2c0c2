"""The parameters of a tool one by one, for tool formats that write each argument by itself."""

import json
import keyword
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from mlxgui_grpc.errors import InvalidRequestError

_ENFORCED_OF_OBJECTS = frozenset(
    {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "$id"}
    | {"title", "description", "default", "examples", "deprecated", "$comment", "x-guidance"}
)
_ENFORCED_OF_STRINGS = frozenset(
    {"type", "enum", "const", "minLength", "maxLength", "title", "description", "default", "examples"}
)
_TYPES = frozenset({"string", "integer", "number", "boolean", "array", "object"})


def refuse(field: str, why: str) -> NoReturn:
    """Raise what a schema is refused with that this format cannot enforce."""
    raise InvalidRequestError(f"{field}: {why}; use other parameters, or leave out strict", field=field)


@dataclass(frozen=True, slots=True)
class ValueStyle:
    """How mlx-lm's parser of a format reads the text of a value."""

    name: str
    strips: bool = False  # white space round it is lost
    reads_null: bool = False  # the text null is no string
    reads_types: bool = False  # by the single type of its schema; else JSON unless that is `string`
    is_joint: bool = False  # all calls of a reply stand between one pair of tags


class Parameters:
    """The properties of a tool's schema in their order. What a format cannot enforce is refused where the tool is
    strict, and passed over where it is not."""

    def __init__(self, schema: dict[str, Any], field: str, *, is_strict: bool) -> None:
        self._schema = schema
        self._field = field
        self._is_strict = is_strict
        self._definitions: dict[str, Any] = {
            key: schema[key] for key in ("$defs", "definitions") if key in schema
        }
        if is_strict and (unknown := sorted(schema.keys() - _ENFORCED_OF_OBJECTS)):
            refuse(field, f"the keyword '{unknown[0]}' cannot be enforced in this model's tool format")

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any], bool]]:
        """Name, schema, and whether it is required."""
        required = self._schema.get("required") or ()
        properties: dict[str, Any] = self._schema.get("properties") or {}
        for name in required:
            if name not in properties:
                refuse(self._field, f"'{name}' is required and not among the properties")
        for name, schema in properties.items():
            if any(char in "<>{}=\"'" or char.isspace() for char in name) or not name:
                refuse(self._field, f"'{name}' is no name of a parameter in this model's tool format")
            yield name, schema if isinstance(schema, dict) else {}, name in required

    def whole(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The schema of one parameter, which may refer to definitions."""
        return {**self._definitions, **schema}

    def listed(
        self,
        prefix: str,
        rule: Callable[[str, str], None],
        write: Callable[[str, dict[str, Any]], str],
    ) -> str:
        """`write`'s arguments with ", " between them, those that are not required may be missing; the first rule."""
        parameters = list(self)
        for at, (name, schema, is_required) in enumerate(parameters):
            if not name.isidentifier() or keyword.iskeyword(name):
                refuse(
                    self._field, f"'{name}' is no name of a parameter in this model's tool format, pythonic"
                )
            rule(f"{prefix}_{at}", write(name, self.whole(schema)))
            first = f"{prefix}_{at} {prefix}_next_{at + 1}"
            skip = "" if is_required else f" | {prefix}_{{}}_{at + 1}"
            rule(f"{prefix}_first_{at}", first + skip.format("first"))
            rule(f"{prefix}_next_{at}", f'", " {first}' + skip.format("next"))
        rule(f"{prefix}_first_{len(parameters)}", '""')
        rule(f"{prefix}_next_{len(parameters)}", '""')
        return f"{prefix}_first_0"

    def value(
        self,
        name: str,
        schema: dict[str, Any],
        style: ValueStyle,
        texts: str,
        write_json: Callable[[dict[str, Any]], str],
    ) -> str:
        """A value as the format's parser reads it back: a regular expression that `texts` begins, or a rule."""
        resolved = self._resolved(schema)
        kind = resolved.get("type")
        if not style.reads_types:
            return (
                self._text(name, resolved, style, texts)
                if schema.get("type") == "string"
                else write_json(self.whole(schema))
            )
        if kind not in _TYPES or (resolved is not schema and kind not in ("string", "array", "object")):
            if self._is_strict:
                refuse(
                    self._field,
                    f"parameter '{name}' needs one 'type' in this model's tool format, {style.name}",
                )
            return texts
        return (
            self._text(name, resolved, style, texts) if kind == "string" else write_json(self.whole(schema))
        )

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        """What a reference to a definition stands for."""
        for _ in range(8):
            reference = schema.get("$ref")
            if not isinstance(reference, str):
                break
            _, _, path = reference.partition("#/")
            group, _, name = path.partition("/")
            found = self._definitions.get(group, {}).get(name)
            if not isinstance(found, dict):
                break
            schema = found
        return schema

    def _text(self, name: str, schema: dict[str, Any], style: ValueStyle, texts: str) -> str:
        if self._is_strict and (unknown := sorted(schema.keys() - _ENFORCED_OF_STRINGS)):
            refuse(
                self._field,
                f"the keyword '{unknown[0]}' of parameter '{name}' cannot be enforced in this model's tool "
                f"format, {style.name}",
            )
        choices = [schema["const"]] if "const" in schema else schema.get("enum")
        if choices is not None:
            strings = [choice for choice in choices if isinstance(choice, str)]
            lossy = [text for text in strings if style.strips and text != text.strip()]
            lossy += [
                text for text in strings if "<" in text or (style.reads_null and text.lower() == "null")
            ]
            if not strings or (lossy and self._is_strict):
                refuse(
                    self._field, f"a choice of parameter '{name}' cannot be told in this model's tool format"
                )
            return "(" + " | ".join(json.dumps(text) for text in strings if text not in lossy) + ")"
        limits = schema.get("minLength", 0), schema.get("maxLength")
        if limits != (0, None):
            least, most = limits
            texts += f" & /(?s:.){{{least},{'' if most is None else most}}}/"
        if style.strips:
            texts += r" & /(\S(?s:.*)\S|\S)?/"
        if style.reads_null:
            texts += " & ~/(?i:null)/"
        return texts
