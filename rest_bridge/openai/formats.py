"""What an answer's text has to be, as a constraint on its decoding."""

import re
from typing import Any

from mlxgui.v1 import common_pb2
from rest_bridge.errors import invalid
from rest_bridge.json_body import Fields, json_text, text_value, type_name
from rest_bridge.openai.options import Options

# Where vLLM's clients put a constraint, and which one it is.
_GUIDES = ("json", "regex", "grammar", "choice")
_CONTRACT = {"json": "json_schema", "regex": "regex", "grammar": "grammar", "choice": "regex"}
_MAX_CHOICE_COUNT = 1024
_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&~-]")


def read_constraint(fields: Fields, sampling: common_pb2.SamplingParams, options: Options) -> None:
    """Reads `response_format` and vLLM's fields, of which a request may have one. Raises ApiError (400)."""
    read_response_format(fields.members("response_format"), sampling)
    source = "response_format" if sampling.WhichOneof("constraint") else None
    outputs = fields.members("structured_outputs")
    guides = [(kind, fields, f"guided_{kind}") for kind in _GUIDES]
    if outputs is not None:
        guides += [(kind, outputs, kind) for kind in _GUIDES]
    for kind, members, key in guides:
        value = members.raw(key)
        if value is None:
            continue
        name = members.name(key)
        if source is not None:
            raise invalid(f"Send `{source}` or `{name}`, not both.", name)
        source = name
        setattr(sampling, _CONTRACT[kind], _guide_text(kind, value, name))
        options.param_names[_CONTRACT[kind]] = name


def read_response_format(fields: Fields | None, sampling: common_pb2.SamplingParams) -> None:
    """Reads OpenAI's `response_format`. Raises ApiError (400)."""
    if fields is None:
        return
    match fields.required_text("type"):
        case "text":
            pass
        case "json_object":
            sampling.json_object = True
        case "json_schema":
            schema = fields.members("json_schema")
            if schema is None:
                fields.missing("json_schema")
            read_json_schema(schema, sampling)
        case other:
            raise invalid(
                f"`response_format.type` is {other[:32]!r}; it must be text, json_object or json_schema.",
                "response_format.type",
            )


def read_json_schema(fields: Fields, sampling: common_pb2.SamplingParams) -> None:
    """Reads a named schema, to which the answer keeps whether or not it is `strict`. Raises ApiError (400)."""
    wanted = fields.free_object("schema")
    if wanted is None:
        fields.missing("schema")
    sampling.json_schema = json_text(wanted, fields.name("schema"))
    fields.boolean("strict")
    # Its name and description are the caller's own.
    fields.text("name")
    fields.text("description")


def _guide_text(kind: str, value: Any, name: str) -> str:
    match kind, value:
        case "json", dict():
            return json_text(value, name)
        case "choice", list():
            if not 0 < len(value) <= _MAX_CHOICE_COUNT:
                raise invalid(f"`{name}` must have from 1 to {_MAX_CHOICE_COUNT} texts.", name)
            choices = [text_value(choice, f"{name}[{index}]") for index, choice in enumerate(value)]
            return "|".join(_SPECIAL.sub(r"\\\g<0>", choice) for choice in choices)
        case "choice", _:
            raise invalid(f"`{name}` must be an array, not {type_name(value)}.", name)
    text = text_value(value, name)
    if not text:
        raise invalid(f"`{name}` is empty.", name)
    return text
