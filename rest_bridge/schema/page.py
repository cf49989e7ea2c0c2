"""The OpenAPI document as a part of a page: routes, fields and examples, without any script."""

import json
from collections.abc import Iterable, Iterator
from html import escape

from rest_bridge.errors import JsonObject

_PREFIX = "#/components/schemas/"


def reference(document: JsonObject) -> str:
    """The HTML of the document: its routes by section, then the models that they refer to."""
    parts = ['<h2 id="api-reference">API reference</h2>', '<p><a href="/openapi.json">OpenAPI 3.1</a></p>']
    for tag in document["tags"]:
        parts.append(f"<h3>{escape(tag['name'])}</h3>")
        for path, item in document["paths"].items():
            for method, operation in item.items():
                if tag["name"] in operation["tags"]:
                    parts.extend(_operation(path, method, operation, document))
    parts.append("<h3>Models</h3>")
    for name, schema in document["components"]["schemas"].items():
        parts.extend(_model(name, schema))
    return "".join(parts)


def _operation(path: str, method: str, operation: JsonObject, document: JsonObject) -> Iterator[str]:
    head = f"{method.upper()} {path}"
    yield f'<h4 id="{operation["operationId"]}"><code>{escape(head)}</code></h4>'
    yield f"<p>{escape(operation['summary'])}</p>"
    parameters = [(one["name"], one["schema"], one) for one in operation["parameters"]]
    if parameters:
        yield _table(
            (name, _type(schema), escape(about.get("description", ""))) for name, schema, about in parameters
        )
    body = operation.get("requestBody")
    if body is not None:
        schema = body["content"]["application/json"]["schema"]
        needed = "" if body["required"] else ", or none"
        yield f"<p>Takes {_type(schema)}{needed}.</p>"
        example = _example(schema, document)
        if example:
            command = f"curl http://127.0.0.1:8000{path} -d '{json.dumps(example, ensure_ascii=False)}'"
            yield f"<pre>{escape(command)}</pre>"
    for status, response in operation["responses"].items():
        answers = [_media(kind, media) for kind, media in response["content"].items()]
        yield f"<p><code>{status}</code> {escape(response['description'])} {'; '.join(answers)}</p>"


def _media(kind: str, media: JsonObject) -> str:
    if "x-event" in media:
        events = " or ".join(_type(schema) for schema in media["x-event"]["anyOf"])
        return f"As events (<code>{escape(kind)}</code>): {events}"
    return _type(media["schema"]) if kind == "application/json" else f"<code>{escape(kind)}</code>"


def _model(name: str, schema: JsonObject) -> Iterator[str]:
    yield f'<h4 id="{escape(name)}"><code>{escape(name)}</code></h4>'
    about = schema.get("description")
    if about:
        yield f"<p>{escape(about)}</p>"
    required = schema.get("required", [])
    properties = schema.get("properties")
    if properties is None:
        yield f"<p>{_type(schema)}</p>"
        return
    yield _table(
        (
            key + ("" if key in required else "?"),
            _type(prop),
            escape(" ".join([prop.get("description", ""), _bounds(prop)]).strip()),
        )
        for key, prop in properties.items()
    )


def _table(rows: Iterable[tuple[str, str, str]]) -> str:
    lines = (
        f"<tr><td><code>{escape(name)}</code></td><td>{kind}</td><td>{about}</td></tr>"
        for name, kind, about in rows
    )
    return f"<table>{''.join(lines)}</table>"


def _type(schema: JsonObject) -> str:
    """What a schema is, in a few words of HTML."""
    match schema:
        case {"$ref": str(place)}:
            name = escape(place.removeprefix(_PREFIX))
            return f'<a href="#{name}">{name}</a>'
        case {"anyOf": list(kinds)}:
            return " or ".join(_type(kind) for kind in kinds)
        case {"enum": list(words)} | {"const": (str() | bool() | None) as words}:
            words = words if isinstance(words, list) else [words]
            return " or ".join(f"<code>{escape(json.dumps(word))}</code>" for word in words)
        case {"type": "array", "items": items}:
            return f"list of {_type(items)}"
        case {"type": "object", "additionalProperties": dict(values)}:
            return f"object of {_type(values)}"
        case {"type": str(kind)}:
            return escape(kind)
    return "anything"


def _bounds(prop: JsonObject) -> str:
    kinds = [prop, *prop.get("anyOf", [])]
    words = []
    for key, word in (
        ("minimum", "from"),
        ("exclusiveMinimum", "above"),
        ("maximum", "to"),
        ("exclusiveMaximum", "below"),
        ("maxItems", "at most"),
        ("pattern", "as"),
    ):
        words += [f"{word} {kind[key]}" for kind in kinds if key in kind]
    return ", ".join(words)


def _example(schema: JsonObject, document: JsonObject) -> JsonObject:
    """A body of the examples that its fields have."""
    model = document["components"]["schemas"].get(schema.get("$ref", "").removeprefix(_PREFIX), {})
    return {
        name: prop["examples"][0]
        for name, prop in model.get("properties", {}).items()
        if "examples" in prop and name != "keep_alive"
    }
