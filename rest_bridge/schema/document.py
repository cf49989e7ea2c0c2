"""The OpenAPI 3.1 document, made from the routes of the application and their models."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from werkzeug.routing import Map

from rest_bridge.errors import JsonObject
from rest_bridge.openai.field_lists import HONOURED, WITHOUT_EFFECT, Route
from rest_bridge.schema.base import Answer
from rest_bridge.schema.openai_answers import OpenAIError
from rest_bridge.schema.operations import ERROR_EVENTS, ERRORS, HEADERS, OPERATIONS, TITLES, Operation

_REFERENCE = "#/components/schemas/{model}"
_PLACE = re.compile(r"<(?:\w+:)?(\w+)>")
_LISTED: dict[str, Route] = {"ChatCompletionRequest": "chat", "CompletionRequest": "completions"}
_ABOUT = {
    "name": "Installed name or hub id, slashes included.",
    "model_id": "A repository of the hub, `owner/name`.",
    "operation_id": "Id of a long action.",
    "key": "Name of a setting.",
}


def document(routes: Map, version: str) -> JsonObject:
    """The description of every route of the map. Raises KeyError for one that has no entry in `OPERATIONS`."""
    models = _Models()
    paths: dict[str, JsonObject] = {}
    for path, method, endpoint in routes_of(routes):
        operation = OPERATIONS[endpoint]
        item = {
            "operationId": f"{method.lower()}_{re.sub(r'[^a-z0-9]+', '_', path.lower()).strip('_')}",
            "tags": [TITLES[endpoint.partition(".")[0]]],
            "summary": operation.summary,
            "parameters": [*_path_parameters(path), *models.query_parameters(operation)],
            "responses": models.responses(operation),
        }
        body = operation.body or (operation.parameters if operation.either else None)
        if body is not None:
            item["requestBody"] = {
                "required": operation.body is not None,
                "content": {"application/json": {"schema": models.reference(body, "validation")}},
            }
        paths.setdefault(path, {})[method.lower()] = item
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "MLX-GUI API",
            "version": version,
            "description": "A model server for MLX. OpenAI's clients use it with this address and `/v1`.",
        },
        "tags": [{"name": title} for title in dict.fromkeys(TITLES.values())],
        "security": [{}, {"key": []}, {"x-api-key": []}],
        "paths": paths,
        "components": {
            "schemas": models.definitions(),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
    }


def routes_of(routes: Map) -> Iterator[tuple[str, str, str]]:
    """Each path in OpenAPI's form with its method and endpoint, in the order of the sections and paths."""
    order = list(dict.fromkeys(TITLES.values()))
    found = [
        (_PLACE.sub(r"{\1}", rule.rule), method, rule.endpoint)
        for rule in routes.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    ]
    yield from sorted(
        found, key=lambda route: (order.index(TITLES[route[2].partition(".")[0]]), route[0], route[1])
    )


def _path_parameters(path: str) -> Iterable[JsonObject]:
    for name in re.findall(r"\{(\w+)\}", path):
        yield {
            "name": name,
            "in": "path",
            "required": True,
            "description": _ABOUT[name],
            "schema": {"type": "string", "minLength": 1},
        }


class _Models:
    """Collects the models that the document refers to."""

    def __init__(self) -> None:
        self._generator = GenerateJsonSchema(ref_template=_REFERENCE)
        self._inputs: list[Any] = []
        self._references: list[JsonObject] = []

    def reference(self, model: Any, mode: str) -> JsonObject:
        """A place in the document for the schema of a model, which `definitions` fills."""
        place: JsonObject = {}
        self._inputs.append((len(self._inputs), mode, TypeAdapter(model).core_schema))
        self._references.append(place)
        return place

    def definitions(self) -> JsonObject:
        """The schemas of all models referred to, by name."""
        found, definitions = self._generator.generate_definitions(self._inputs)
        for index, (key, mode, _) in enumerate(self._inputs):
            self._references[index].update(found[key, mode])
        answers = {model.__name__ for model in _descendants(Answer)}
        for name, schema in definitions.items():
            _tidy(schema, _about(name))
            # What a later version adds to an answer is no fault of it.
            if name in answers:
                schema.pop("additionalProperties", None)
        return dict(sorted(definitions.items()))

    def query_parameters(self, operation: Operation) -> Iterable[JsonObject]:
        if operation.parameters is None:
            return
        schema = operation.parameters.model_json_schema()
        _tidy(schema, {})
        for name, prop in schema["properties"].items():
            about = prop.pop("description", None)
            yield {
                "name": name,
                "in": "query",
                **({"description": about} if about else {}),
                "schema": _without_null(prop),
            }

    def responses(self, operation: Operation) -> JsonObject:
        content: JsonObject = {}
        if operation.answer is not None:
            content["application/json"] = {"schema": self.reference(operation.answer, "validation")}
        if operation.events is not None:
            # A stream is no JSON: what one event holds is told by `x-event`.
            content["text/event-stream"] = {
                "schema": {"type": "string"},
                "x-event": {
                    "anyOf": [
                        self.reference(operation.events, "validation"),
                        self.reference(ERROR_EVENTS[operation.dialect], "validation"),
                    ]
                },
            }
        if operation.media_type:
            content[operation.media_type] = {"schema": {"type": "string"}}
        responses: JsonObject = {}
        if content:
            headers = {name: {"schema": {"type": "string"}} for name in HEADERS[operation.dialect]}
            responses["200"] = {"description": "Done.", "content": content, "headers": headers}
        if operation.later is not None:
            responses["202"] = self._json("It goes on; the header Location leads to it.", operation.later)
        if operation.unready is not None:
            responses["503"] = self._json("Not ready.", operation.unready)
        error = ERRORS[operation.dialect]
        if operation.dialect == "native":
            responses["401"] = self._json("A key is required and missing or wrong.", OpenAIError)
        responses["4XX"] = self._json("The request is at fault.", error)
        responses["5XX"] = self._json("The server is at fault, or does not do it.", error)
        return responses

    def _json(self, description: str, model: Any) -> JsonObject:
        return {
            "description": description,
            "content": {"application/json": {"schema": self.reference(model, "validation")}},
        }


def _descendants(model: type[Answer]) -> Iterator[type[Answer]]:
    for child in model.__subclasses__():
        yield child
        yield from _descendants(child)


def _about(model: str) -> dict[str, str]:
    """What the fields of a request do, as the lists say it."""
    route = _LISTED.get(model)
    fields = [field for field in (*HONOURED, *WITHOUT_EFFECT) if route in field.routes]
    return {name: field.about for field in fields for name in field.names}


def _tidy(schema: JsonObject, about: dict[str, str]) -> None:
    """Drops the titles that pydantic makes of names, and says what the fields of requests do."""
    schema.pop("title", None)
    for name, prop in schema.get("properties", {}).items():
        if isinstance(prop, dict):
            prop.pop("title", None)
            if prop.get("default", 0) is None:
                del prop["default"]
            if "description" not in prop and name in about and "$ref" not in prop:
                prop["description"] = about[name]


def _without_null(prop: JsonObject) -> JsonObject:
    """A parameter that is not sent is absent; a query string has no null."""
    kinds = [kind for kind in prop.get("anyOf", []) if kind != {"type": "null"}]
    if len(kinds) == 1:
        return {**{key: value for key, value in prop.items() if key != "anyOf"}, **kinds[0]}
    return {**prop, "anyOf": kinds} if kinds else prop
