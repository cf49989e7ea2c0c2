"""The API's description: every route is in it, what it says fits together, and the page shows it."""

import json
import re
from typing import Any

import jsonschema_rs
import pytest

from rest_bridge.errors import ApiError, JsonObject
from rest_bridge.messages import error_event
from rest_bridge.openai.field_lists import HONOURED, WITHOUT_EFFECT
from rest_bridge.schema import openai_requests
from rest_bridge.schema.document import document
from rest_bridge.schema.operations import OPERATIONS
from rest_bridge.schema.page import reference
from tests.http.routes import BODIES, url_map
from tests.unit.test_bridge_openai_fields import names

DIALECT = "https://json-schema.org/draft/2020-12/schema"
# They are refused as not implemented, until a later version.
LATER = {"adapter", "draft_model", "prompt_lookup_tokens"}


@pytest.fixture(scope="module")
def described() -> JsonObject:
    return document(url_map(), "1.0")


def test_every_route_is_described_and_no_other(described: JsonObject) -> None:
    """Each rule of the application once, with its method; each entry of the table has a route."""
    rules = [
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in url_map().iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    ]
    paths = [(path, method) for path, item in described["paths"].items() for method in item]
    assert sorted(paths) == sorted(rules)
    assert {rule.endpoint for rule in url_map().iter_rules()} == set(OPERATIONS)
    assert described["openapi"] == "3.1.0"


def test_it_is_well_formed(described: JsonObject) -> None:
    """Schemas are JSON Schemas, references lead somewhere, ids are unique, no model has a made-up name."""
    schemas = described["components"]["schemas"]
    for name, schema in schemas.items():
        jsonschema_rs.meta.validate({"$schema": DIALECT, **schema})
        assert re.fullmatch(r"\w+", name) and "__" not in name
    text = json.dumps(described)
    used = set(re.findall(r'"\$ref": "#/components/schemas/(\w+)"', text))
    assert used <= set(schemas)
    operations = [operation for item in described["paths"].values() for operation in item.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for operation in operations:
        assert operation["summary"].endswith(".") and operation["responses"]
        assert set(operation["tags"]) <= {tag["name"] for tag in described["tags"]}


def test_messages_are_described_as_anthropic_s_clients_have_them(described: JsonObject) -> None:
    """The key in its header, the headers of an answer, and the error that ends a stream."""
    schemes = described["components"]["securitySchemes"]
    assert {"x-api-key": []} in described["security"]
    assert schemes["x-api-key"] == {"type": "apiKey", "in": "header", "name": "X-Api-Key"}
    answer = described["paths"]["/v1/messages"]["post"]["responses"]["200"]
    assert set(answer["headers"]) == {"X-Request-Id", "Request-Id", "X-MLXGUI-Warnings"}
    event, error = answer["content"]["text/event-stream"]["x-event"]["anyOf"]
    models = described["components"]["schemas"]
    said = sse_payload(error_event(ApiError("QUEUE_FULL", "Too much.", "messages")))
    for place, is_valid in ((event, False), (error, True)):
        schema = {**place, "components": {"schemas": models}}
        assert jsonschema_rs.is_valid(schema, said) is is_valid


def sse_payload(event: bytes) -> Any:
    return json.loads(event.partition(b"data: ")[2])


def test_the_models_of_requests_have_the_fields_of_the_lists(described: JsonObject) -> None:
    """And say of each what the lists say."""
    for route, model in (
        ("chat", openai_requests.ChatCompletionRequest),
        ("completions", openai_requests.CompletionRequest),
    ):
        listed = {*names(HONOURED, route), *names(WITHOUT_EFFECT, route)} - LATER  # type: ignore[arg-type]
        fields = {field.alias or name for name, field in model.model_fields.items()}
        assert fields == listed
        properties: dict[str, Any] = described["components"]["schemas"][model.__name__]["properties"]
        assert [name for name, prop in properties.items() if not prop.get("description")] == []


@pytest.mark.parametrize("endpoint", BODIES)
def test_the_models_of_requests_take_what_the_tests_send(endpoint: str) -> None:
    body = OPERATIONS[endpoint].body
    assert body is not None
    body.model_validate(BODIES[endpoint])


def test_the_page_shows_all_of_it_without_scripts(described: JsonObject) -> None:
    """Every link leads to a heading of the same page."""
    page = reference(described)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    for path in described["paths"]:
        assert f" {path}<" in page
    assert not re.search(r'<script|src=|href="[^#/]', page)
