"""Bad tools and schemas: a 400 that names the field and the limit (413 for bytes), and the rest goes on.

Images that cannot be looked at are in test_images.py.
"""

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.conftest import RestSession
from tests.support_http import PARIS, chat_body, openai_error


@pytest.fixture(scope="module", autouse=True)
def demo_answers_after_it(http: RestSession) -> Iterator[None]:
    """The worker lives on: the demo model is where it was."""
    assert http.post("/v1/models/demo/load").status_code == 200
    yield
    answer = http.post("/v1/chat/completions", json=chat_body()).json()
    assert answer["choices"][0]["message"]["content"] == PARIS


def refused(http: RestSession, status: int = 400, **fields: Any) -> tuple[str, str]:
    """The field at fault and the sentence."""
    error = openai_error(http.post("/v1/chat/completions", json=chat_body(**fields)), status)
    return error["param"] or "", error["message"]


def tool(parameters: Any, name: str = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def schema(wanted: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": wanted}}


CYCLE = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}


@pytest.mark.parametrize("parameters", ["{", "object", 5, [], [{}], True], ids=repr)
def test_a_tool_s_schema_that_is_no_object(http: RestSession, parameters: Any) -> None:
    param, message = refused(http, tools=[tool({}), tool(parameters, "g")])
    assert param == "tools[1].function.parameters" and "object" in message


def test_a_choice_of_an_unknown_tool(http: RestSession) -> None:
    choice = {"type": "function", "function": {"name": "g"}}
    param, message = refused(http, tools=[tool({})], tool_choice=choice)
    assert param == "tool_choice.function.name" and "'g'" in message
    assert refused(http, tool_choice=choice)[0].startswith("tool_choice")


def test_too_many_tools(http: RestSession) -> None:
    param, message = refused(http, tools=[tool({}, f"f{index}") for index in range(129)])
    assert param.startswith("tools") and "128" in message


def test_a_schema_that_refers_to_itself_for_ever(http: RestSession) -> None:
    """As the format of an answer and as a tool that has to be called."""
    assert refused(http, response_format=schema(CYCLE))[0] == "response_format"
    param, _ = refused(http, tools=[tool(CYCLE, strict=True)], tool_choice="required")
    assert param.startswith("tools[0].function")


def test_a_schema_that_is_nested_too_deep(http: RestSession) -> None:
    """1,000 levels are more than a body may have; the sentence says how many it may."""
    deep = '{"type":"object","properties":{"a":' * 1000 + "{}" + "}}" * 1000
    for fields in ({"response_format": schema("DEEP")}, {"tools": [tool("DEEP")]}):
        body = json.dumps(chat_body(**fields)).replace('"DEEP"', deep)
        error = openai_error(http.post("/v1/chat/completions", data=body), 400)
        assert "64 levels" in error["message"]


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "object", "properties": {"a": {"type": "strin"}}},
        {"type": "string", "pattern": "("},
        {"$ref": "#/$defs/missing"},
        {"$ref": "https://example.com/schema.json"},
        {"not": {"type": "string"}},
        {"type": "object", "unevaluatedProperties": False},
    ],
    ids=str,
)
def test_a_schema_that_cannot_be_enforced_is_refused(http: RestSession, wanted: Any) -> None:
    """With a sentence that says what in it: it is never followed in part."""
    param, message = refused(http, response_format=schema(wanted))
    assert param == "response_format" and len(message) > 20


def test_an_expression_that_explodes_is_bounded(http: RestSession) -> None:
    """It is refused, or it is followed: either way others have their answers meanwhile."""
    explosions = [
        "(a|aa)+" * 12 + "b",
        "(" * 40 + "a" + "{9}" * 9 + ")" * 40,
        "(x{1000}){1000}",
        "[a-z]{1,5000}" * 9,
    ]
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(http_post, http.base_url, chat_body(guided_regex=regex, max_tokens=4))
            for regex in explosions
        ]
        others = [http.post("/v1/chat/completions", json=chat_body()).json() for _ in range(3)]
        statuses = [done.result() for done in asked]
    assert set(statuses) <= {200, 400}
    assert [answer["choices"][0]["message"]["content"] for answer in others] == [PARIS] * 3


def http_post(base_url: str, body: dict[str, Any]) -> int:
    with RestSession(base_url) as http:
        return http.post("/v1/chat/completions", json=body).status_code


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"user": "u" * 257}, "user"),
        ({"stop": ["a", "x" * 1025]}, "stop"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "http://a.example/" + "x" * 8192}}
                        ],
                    }
                ]
            },
            "messages[0].content[0].image_url.url",
        ),
    ],
    ids=["user", "stop", "url"],
)
def test_too_many_bytes_of_a_text(http: RestSession, fields: dict[str, Any], param: str) -> None:
    named, message = refused(http, 413, **fields)
    assert named == param and "longer than" in message and param in message


def test_too_many_bytes_of_images(http: RestSession) -> None:
    """Of one image; of all together the body is too large before they are."""

    def seen(*sizes: int) -> list[dict[str, Any]]:
        urls = [f"data:image/png;base64,{base64.b64encode(bytes(size)).decode()}" for size in sizes]
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        return [{"role": "user", "content": parts}]

    param, message = refused(http, 413, messages=seen(20 * 1024**2 + 1))
    assert param.startswith("messages[0].content[0]") and str(20 * 1024**2) in message
    assert refused(http, 413, messages=seen(*[17 * 1024**2] * 3))
