"""Holds every answer of the bridge to the model that the API's description has for its route."""

import functools
import json
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
from pydantic import TypeAdapter
from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map

from rest_bridge.schema.openai_answers import ErrorEvent, OpenAIError
from rest_bridge.schema.operations import ERRORS, OPERATIONS, Operation


def check_answer(response: requests.Response, method: str) -> None:
    """Raises ValidationError where an answer, or an event of a stream, is not what is documented."""
    if method not in ("GET", "POST", "PUT", "DELETE"):
        return
    operation = _operation(unquote(urlsplit(response.url).path), method)
    kind = response.headers.get("Content-Type", "").partition(";")[0]
    if kind == "text/event-stream" and operation is not None:
        for line in response.content.splitlines():
            if line.startswith(b"data: {"):
                # Those of Responses and Messages have a type, as all their events.
                is_error = b'"error"' in line and set(json.loads(line[6:])) == {"error"}
                _adapter(ErrorEvent if is_error else operation.events).validate_json(line[6:])
    elif kind == "application/json":
        _adapter(_model(operation, response.status_code)).validate_json(response.content)


def _model(operation: Operation | None, status: int) -> Any:
    if operation is None:
        return OpenAIError
    if status >= 400:
        if status == 503 and operation.unready is not None:
            return operation.unready
        is_key = status == 401 and operation.dialect == "native"
        return OpenAIError if is_key else ERRORS[operation.dialect]
    model = {200: operation.answer, 202: operation.later}[status]
    assert model is not None, f"{operation.summary} {status} is not documented"
    return model


@functools.cache
def _adapter(model: Any) -> TypeAdapter[Any]:
    return TypeAdapter(model)


@functools.cache
def _routes() -> Map:
    from tests.http.routes import url_map

    return url_map()


def _operation(path: str, method: str) -> Operation | None:
    """None: no route of ours."""
    try:
        endpoint, _ = _routes().bind("localhost").match(path, method)
    except HTTPException:
        return None
    return OPERATIONS[endpoint]
