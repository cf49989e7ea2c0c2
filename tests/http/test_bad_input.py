"""Malformed and hostile bodies: a 400 that names the field, 413 for size, never a 5xx, and the server goes on."""

import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

from tests.conftest import RestSession
from tests.support_http import CAPITAL, PARIS, JsonObject, chat_body, native_error, openai_error, raw_request

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/v1/models/demo/generate"
INSTALL = "/v1/models/install"
MIB = 1024 * 1024

USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module", autouse=True)
def server_goes_on(http: RestSession) -> Iterator[None]:
    """After all of it the demo model answers as before, from the process that answered before."""
    assert http.post("/v1/models/demo/load").status_code == 200
    yield
    answer = http.post(CHAT, json=chat_body()).json()
    assert answer["choices"][0]["message"]["content"] == PARIS
    assert "Traceback" not in http.get("/metrics").text


def refused(response: requests.Response, path: str, field: str | None, status: int = 400) -> str:
    """Check status and shape, and that the field is named: by `param`, or in the documented form by the sentence."""
    if path in (GENERATE, INSTALL):
        sentence = native_error(response, status)
        assert field is None or field.partition("[")[0] in sentence, sentence
    else:
        error = openai_error(response, status)
        sentence = str(error["message"])
        assert error["type"] == "invalid_request_error"
        assert error["param"] == field, error
    assert "Traceback" not in response.text and len(response.content) < 4096
    return sentence


# Sampling fields, which the three generating routes share, with values that they cannot have. `param` is the name.
BAD_VALUES: dict[str, list[Any]] = {
    **{
        name: ["hot", [1], {}, True, 1e39, -1e39, -2.01, 10**400]
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        )
    },
    **{
        name: ["5", [5], {}, False, 1.5, 2**31, -(2**31) - 1, 10**400, -1]
        for name in ("max_tokens", "top_k", "repetition_context_size")
    },
    "seed": ["7", 1.5, [7], {}, True, 2**63, -(2**63) - 1, 10**400],
    "stop": [5, {}, True, [""], "", ["x"] * 17, "\ud800"],
    "logit_bias": [
        *(5, [], "x", {"a": 1}, {"-1": 1}, {"1.5": 1}, {"٣": 1}, {"99999999999": 1}, {"1": 101}, {"1": -101}),
        {str(i): 1 for i in range(1025)},
    ],
    "priority": ["high", 101],
    "keep_alive": ["soon", "5 years", [], True, 1e300],
}
OUT_OF_RANGE: list[tuple[str, Any, str]] = [
    ("temperature", -0.1, "temperature"),
    ("temperature", 2.1, "temperature"),
    ("top_p", 1.5, "top_p"),
    ("min_p", -0.5, "min_p"),
    ("repetition_penalty", 0, "repetition_penalty"),
    ("presence_penalty", 2.5, "presence_penalty"),
    ("max_tokens", 0, "max_tokens"),
    ("max_tokens", 16385, "max_tokens"),
    ("repetition_context_size", 16385, "repetition_context_size"),
    ("stop", [5], "stop[0]"),
    ("stop", ["a", None], "stop[1]"),
    ("logit_bias", {"1": "x"}, "logit_bias.1"),
    ("logit_bias", {"1": None}, "logit_bias.1"),
]
SHARED = [*((name, value, name) for name, values in BAD_VALUES.items() for value in values), *OUT_OF_RANGE]


def image(**url: str) -> JsonObject:
    return {"type": "image_url", "image_url": url}


def base(path: str) -> JsonObject:
    if path == CHAT:
        return {"model": "demo", "messages": [USER]}
    return {"model": "demo", "prompt": "x"} if path == COMPLETIONS else {"prompt": "x"}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, GENERATE])
def test_wrong_values_of_sampling_fields_are_refused_by_name(http: RestSession, path: str) -> None:
    """Wrong types, out of range and not finite, streaming or not; `null` is the same as absent."""
    for name, value, field in SHARED:
        response = http.post(path, data=json.dumps({**base(path), name: value}))
        refused(response, path, field)
        if path != GENERATE:
            response = http.post(path, data=json.dumps({**base(path), name: value, "stream": True}))
            refused(response, path, field)
    for name in {name for name, _, _ in SHARED}:
        response = http.post(path, json={**base(path), "max_tokens": 1, name: None})
        assert response.status_code == 200, (name, response.text)


@pytest.mark.parametrize(("field", "value"), [("stop", ["x" * 1025]), ("user", "u" * 257)])
def test_texts_over_their_size_are_too_large(http: RestSession, field: str, value: Any) -> None:
    refused(http.post(CHAT, json={**base(CHAT), field: value}), CHAT, field, 413)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, GENERATE])
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_that_are_none_are_refused_by_name(http: RestSession, path: str, number: str) -> None:
    for name in ("temperature", "top_p", "max_tokens", "seed", "presence_penalty"):
        text = json.dumps({**base(path), name: "@"}).replace('"@"', number)
        refused(http.post(path, data=text), path, name)


def messages(*bad: Any) -> JsonObject:
    return {"model": "demo", "messages": list(bad)}


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD_CHATS: list[tuple[str | None, JsonObject]] = [
    ("model", {"messages": [USER]}),
    ("model", {"model": None, "messages": [USER]}),
    ("model", {"model": "", "messages": [USER]}),
    ("model", {"model": 5, "messages": [USER]}),
    ("model", {"model": ["demo"], "messages": [USER]}),
    ("model", {"model": "m" * 513, "messages": [USER]}),
    ("model", {"model": "\udc00", "messages": [USER]}),
    ("messages", {"model": "demo"}),
    ("messages", {"model": "demo", "messages": None}),
    ("messages", {"model": "demo", "messages": []}),
    ("messages", {"model": "demo", "messages": "hi"}),
    ("messages", {"model": "demo", "messages": {"role": "user"}}),
    ("messages", messages(*[USER] * 2049)),
    ("messages[0]", messages("hi")),
    ("messages[0]", messages(None)),
    ("messages[1]", messages(USER, 5)),
    ("messages[1]", messages(USER, [USER])),
    ("messages[0].role", messages({"content": "hi"})),
    ("messages[0].role", messages({"role": None, "content": "hi"})),
    ("messages[0].role", messages({"role": "", "content": "hi"})),
    ("messages[0].role", messages({"role": "wizard", "content": "hi"})),
    ("messages[0].role", messages({"role": "User", "content": "hi"})),
    ("messages[0].role", messages({"role": "function", "content": "hi", "name": "f"})),
    ("messages[0].role", messages({"role": 5, "content": "hi"})),
    ("messages[1].content", messages(USER, {"role": "user"})),
    ("messages[0].content", messages({"role": "user", "content": None})),
    ("messages[0].content", messages({"role": "user", "content": 5})),
    ("messages[0].content", messages({"role": "user", "content": {"text": "hi"}})),
    ("messages[0].content", messages({"role": "user", "content": []})),
    ("messages[0].content", messages({"role": "user", "content": "\ud83d"})),
    ("messages[0].content", messages({"role": "user", "content": [{"type": "text", "text": "x"}] * 257})),
    ("messages[0].content[0]", messages({"role": "user", "content": ["hi"]})),
    ("messages[0].content[0].type", messages({"role": "user", "content": [{"text": "hi"}]})),
    ("messages[0].content[0].type", messages({"role": "user", "content": [{"type": "video"}]})),
    (
        "messages[0].content[0].type",
        messages({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}),
    ),
    ("messages[0].content[0].text", messages({"role": "user", "content": [{"type": "text"}]})),
    ("messages[0].content[0].text", messages({"role": "user", "content": [{"type": "text", "text": 5}]})),
    ("messages[0].content[0].image_url", messages({"role": "user", "content": [{"type": "image_url"}]})),
    (
        "messages[0].content[0].image_url",
        messages({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}),
    ),
    *[
        ("messages[0].content[0].image_url.url", messages({"role": "user", "content": [image(url=url)]}))
        for url in (
            "file:///etc/passwd",
            "data:image/png,abc",
            "data:image/png;base64,@@@@",
            "ftp://x/y",
            "javascript:1",
        )
    ],
    (
        "messages[0].content[0].image_url.detail",
        messages({"role": "user", "content": [image(url="https://x/y", detail="max")]}),
    ),
    ("messages[0].name", messages({**USER, "name": 5})),
    ("messages[1].tool_call_id", messages(USER, {"role": "tool", "content": "x"})),
    ("messages[1].tool_call_id", messages(USER, {"role": "tool", "content": "x", "tool_call_id": 5})),
    ("messages[0].tool_calls", messages({"role": "assistant", "tool_calls": {}})),
    ("messages[0].tool_calls[0]", messages({"role": "assistant", "tool_calls": ["f"]})),
    ("messages[0].tool_calls[0].function", messages({"role": "assistant", "tool_calls": [{"id": "c"}]})),
    (
        "messages[0].tool_calls[0].function.name",
        messages({"role": "assistant", "tool_calls": [{**CALL, "function": {"arguments": "{}"}}]}),
    ),
    (
        "messages[0].tool_calls[0].function.arguments",
        messages({"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]}),
    ),
    ("n", chat_body(n=0)),
    ("n", chat_body(n=17)),
    ("n", chat_body(n="2")),
    ("n", chat_body(n=-1)),
    ("stream", chat_body(stream="yes")),
    ("stream", chat_body(stream=1)),
    ("stream_options", chat_body(stream_options={"include_usage": True})),
    ("stream_options", chat_body(stream=True, stream_options=True)),
    ("stream_options.include_usage", chat_body(stream=True, stream_options={"include_usage": "x"})),
    ("max_tokens", chat_body(max_tokens=5, max_completion_tokens=6)),
    ("max_completion_tokens", chat_body(max_completion_tokens="5")),
    ("max_completion_tokens", chat_body(max_completion_tokens=0)),
    ("user", chat_body(user=5)),
    ("logprobs", chat_body(logprobs="yes")),
    ("top_logprobs", chat_body(top_logprobs=3)),
    ("top_logprobs", chat_body(logprobs=True, top_logprobs=21)),
    ("response_format", chat_body(response_format="json")),
    ("response_format.type", chat_body(response_format={})),
    ("response_format.type", chat_body(response_format={"type": "xml"})),
    ("response_format.json_schema", chat_body(response_format={"type": "json_schema"})),
    (
        "response_format.json_schema.schema",
        chat_body(response_format={"type": "json_schema", "json_schema": {}}),
    ),
    ("tools", chat_body(tools={})),
    ("tools[0]", chat_body(tools=["f"])),
    ("tools[0].type", chat_body(tools=[{"type": "retrieval"}])),
    ("tools[0].function", chat_body(tools=[{"type": "function"}])),
    ("tools[0].function.name", chat_body(tools=[{"type": "function", "function": {}}])),
    ("tools[0].function.name", chat_body(tools=[{"type": "function", "function": {"name": ""}}])),
    (
        "tools[0].function.parameters",
        chat_body(tools=[{"type": "function", "function": {"name": "f", "parameters": []}}]),
    ),
    (
        "tools[0].function.strict",
        chat_body(tools=[{"type": "function", "function": {"name": "f", "strict": 1}}]),
    ),
    ("tools", chat_body(tools=[{"type": "function", "function": {"name": "f"}}] * 129)),
    ("tool_choice", chat_body(tool_choice="sometimes")),
    ("tool_choice", chat_body(tool_choice=5)),
    ("tool_choice.function", chat_body(tool_choice={"type": "function"})),
    ("tool_choice.function.name", chat_body(tool_choice={"type": "function", "function": {}})),
    ("parallel_tool_calls", chat_body(parallel_tool_calls="no")),
    ("chat_template_kwargs", chat_body(chat_template_kwargs="x")),
    ("chat_template_kwargs", chat_body(chat_template_kwargs={"messages": []})),
    ("modalities", chat_body(modalities=["audio"])),
    ("modalities", chat_body(modalities="text")),
]


@pytest.mark.parametrize(
    ("field", "body"), BAD_CHATS, ids=[f"{i} {field}" for i, (field, _) in enumerate(BAD_CHATS)]
)
def test_a_bad_chat_is_refused_by_field(http: RestSession, field: str, body: JsonObject) -> None:
    refused(http.post(CHAT, data=json.dumps(body)), CHAT, field)


@pytest.mark.parametrize(
    ("field", "value", "status"),
    [
        ("max_completion_tokens", 0, 400),
        ("chat_template_kwargs", {"messages": []}, 400),
        ("draft_model", "other", 501),
    ],
)
def test_a_sentence_speaks_of_the_caller_s_fields(
    http: RestSession, field: str, value: Any, status: int
) -> None:
    """Not of what they are called in the contract behind."""
    error = openai_error(http.post(CHAT, json=chat_body(**{field: value})), status)
    assert error["param"] == field
    assert field in error["message"]


BAD_COMPLETIONS: list[tuple[str, JsonObject]] = [
    ("model", {"prompt": "x"}),
    ("model", {"model": {}, "prompt": "x"}),
    ("prompt", {"model": "demo"}),
    ("prompt", {"model": "demo", "prompt": None}),
    ("prompt", {"model": "demo", "prompt": ""}),
    ("prompt", {"model": "demo", "prompt": []}),
    ("prompt", {"model": "demo", "prompt": 5}),
    ("prompt", {"model": "demo", "prompt": {}}),
    ("prompt", {"model": "demo", "prompt": True}),
    ("prompt", {"model": "demo", "prompt": "\udfff"}),
    ("prompt[1]", {"model": "demo", "prompt": ["x", 5]}),
    ("prompt[1]", {"model": "demo", "prompt": ["x", ""]}),
    ("prompt[0]", {"model": "demo", "prompt": [True]}),
    ("prompt[0]", {"model": "demo", "prompt": [None]}),
    ("prompt[1]", {"model": "demo", "prompt": [5, "x"]}),
    ("prompt[0]", {"model": "demo", "prompt": [[]]}),
    ("prompt[1]", {"model": "demo", "prompt": [[5], 6]}),
    ("prompt[0][1]", {"model": "demo", "prompt": [[5, "x"]]}),
    ("prompt[0]", {"model": "demo", "prompt": [1.5]}),
    ("prompt[0]", {"model": "demo", "prompt": [2**40]}),
    ("prompt", {"model": "demo", "prompt": [-1]}),
    ("prompt", {"model": "demo", "prompt": [1_000_000]}),
    ("prompt", {"model": "demo", "prompt": ["x"] * 129}),
    ("n", {"model": "demo", "prompt": ["x"] * 100, "n": 2}),
    ("echo", {"model": "demo", "prompt": "x", "echo": "yes"}),
    ("logprobs", {"model": "demo", "prompt": "x", "logprobs": True}),
    ("logprobs", {"model": "demo", "prompt": "x", "logprobs": 21}),
    ("best_of", {"model": "demo", "prompt": "x", "best_of": 3}),
    ("suffix", {"model": "demo", "prompt": "x", "suffix": "y"}),
]


@pytest.mark.parametrize(
    ("field", "body"), BAD_COMPLETIONS, ids=[f"{i} {field}" for i, (field, _) in enumerate(BAD_COMPLETIONS)]
)
def test_a_bad_completion_is_refused_by_field(http: RestSession, field: str, body: JsonObject) -> None:
    refused(http.post(COMPLETIONS, data=json.dumps(body)), COMPLETIONS, field)


BAD_NATIVE: list[tuple[str, str, JsonObject]] = [
    (GENERATE, "prompt", {}),
    (GENERATE, "prompt", {"prompt": None}),
    (GENERATE, "prompt", {"prompt": ""}),
    (GENERATE, "prompt", {"prompt": ["x"]}),
    (GENERATE, "prompt", {"prompt": 5}),
    (GENERATE, "prompt", {"prompt": "\ud800x"}),
    (GENERATE, "stream", {"prompt": "x", "stream": True}),
    (GENERATE, "maxtokens", {"prompt": "x", "maxtokens": 5}),
    (GENERATE, "Temperature", {"prompt": "x", "Temperature": 1}),
    (INSTALL, "model_id", {}),
    (INSTALL, "model_id", {"model_id": ""}),
    (INSTALL, "model_id", {"model_id": 5}),
    (INSTALL, "model_id", {"model_id": None, "name": "x"}),
    (INSTALL, "model_id", {"model_id": "no-owner"}),
    (INSTALL, "model_id", {"model_id": "a/b/c"}),
    (INSTALL, "model_id", {"model_id": "../../etc"}),
    (INSTALL, "model_id", {"model_id": "a/.."}),
    (INSTALL, "model_id", {"model_id": "a/b\n"}),
    (INSTALL, "model_id", {"model_id": "a b/c"}),
    (INSTALL, "model_id", {"model_id": "\ud800/x"}),
    (INSTALL, "model_id", {"model_id": "x" * 500 + "/y"}),
    (INSTALL, "name", {"model_id": "a/b", "name": "../x"}),
    (INSTALL, "name", {"model_id": "a/b", "name": "a/b"}),
    (INSTALL, "name", {"model_id": "a/b", "name": ".hidden"}),
    (INSTALL, "name", {"model_id": "a/b", "name": "con"}),
    (INSTALL, "name", {"model_id": "a/b", "name": "x" * 97}),
    (INSTALL, "name", {"model_id": "a/b", "name": "a\u202eb"}),
    (INSTALL, "name", {"model_id": "a/b", "name": 5}),
    (INSTALL, "revision", {"model_id": "a/b", "revision": "../../x"}),
    (INSTALL, "revision", {"model_id": "a/b", "revision": 5}),
    (INSTALL, "force", {"model_id": "a/b", "force": "yes"}),
    (INSTALL, "path", {"model_id": "a/b", "path": "/x"}),
    (INSTALL, "path", {"path": 5}),
    (INSTALL, "trust_remote_code", {"model_id": "a/b", "trust_remote_code": True}),
]


@pytest.mark.parametrize(
    ("path", "field", "body"), BAD_NATIVE, ids=[f"{i} {field}" for i, (_, field, _) in enumerate(BAD_NATIVE)]
)
def test_a_bad_native_body_is_refused_by_field(
    http: RestSession, path: str, field: str, body: JsonObject
) -> None:
    """Keys that are not known too: a misspelt one would be lost silently."""
    refused(http.post(path, data=json.dumps(body)), path, field)


def nested(depth: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    return opening * depth + b"1" + closing * depth


NOT_JSON: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("white space", b" \n\t "),
    ("a word", b"hello"),
    ("a form", b"model=demo&prompt=x"),
    ("an array", b"[]"),
    ("a string", b'"x"'),
    ("a number", b"5"),
    ("null", b"null"),
    ("true", b"true"),
    ("cut off", b'{"model": "demo", "prompt'),
    ("two objects", b"{}{}"),
    ("a trailing comma", b'{"prompt": "x",}'),
    ("a comment", b'{"prompt": "x"} // note'),
    ("single quotes", b"{'prompt': 'x'}"),
    ("a control character", b'{"prompt": "a\nb"}'),
    ("a bad escape", b'{"prompt": "\\x41"}'),
    ("latin-1", '{"prompt": "é"}'.encode("latin-1")),
    ("UTF-16", '{"prompt": "x"}'.encode("utf-16")),
    ("overlong UTF-8", b'{"prompt": "\xc0\xaf"}'),
    ("cut UTF-8", b'{"prompt": "\xe2\x82"}'),
    ("an encoded surrogate", b'{"prompt": "\xed\xa0\x80"}'),
    ("NUL bytes", b"\x00" * 64),
    ("random bytes", bytes(range(256))),
    ("gzip", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03"),
    ("a huge integer", b'{"seed": ' + b"9" * 100_000 + b"}"),
    ("a huge exponent", b'{"seed": 1e' + b"9" * 1000 + b', "x": }'),
    ("65 levels", b'{"a": ' + nested(65) + b"}"),
    ("100,000 levels of arrays", b'{"a": ' + nested(100_000) + b"}"),
    ("100,000 levels of objects", b'{"a": ' + nested(100_000, b'{"a":', b"}") + b"}"),
    ("half-open levels", b"[" * 50_000),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, GENERATE, INSTALL])
@pytest.mark.parametrize("raw", [raw for _, raw in NOT_JSON], ids=[name for name, _ in NOT_JSON])
def test_what_is_no_json_object_is_refused(http: RestSession, path: str, raw: bytes) -> None:
    """Whatever the content type says it is."""
    for kind in ("application/json", "text/plain", "application/octet-stream"):
        response = http.post(path, data=raw, headers={"Content-Type": kind})
        assert response.status_code == 400
        if path in (GENERATE, INSTALL):
            native_error(response, 400)
        else:
            assert openai_error(response, 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_ten_megabytes_of_nesting_are_refused(http: RestSession, path: str) -> None:
    """Deep, and wide enough to fill the memory with containers."""
    for raw in (
        b'{"a": ' + nested(5 * MIB) + b"}",
        b'{"a": [' + b"[]," * (10 * MIB // 3) + b"1]}",
        b'{"a": ' + b'{"a":' * (2 * MIB) + b"1" + b"}" * (2 * MIB) + b"}",
    ):
        response = http.post(path, data=raw)
        assert openai_error(response, 400)["type"] == "invalid_request_error"
    assert http.get("/health").json() == {"status": "healthy"}


def test_the_content_type_is_no_wall(http: RestSession) -> None:
    """Curl's default says form; a JSON body under any name is read."""
    raw = json.dumps(chat_body())
    for kind in (
        "application/x-www-form-urlencoded",
        "text/plain",
        "application/json; charset=utf-8",
        "x/y; =;",
    ):
        response = http.post(CHAT, data=raw, headers={"Content-Type": kind})
        assert response.json()["choices"][0]["message"]["content"] == PARIS
    bare = requests.Request("POST", http.base_url + CHAT, data=raw).prepare()
    bare.headers.pop("Content-Type", None)
    assert http.send(bare, timeout=60).status_code == 200


def test_a_byte_order_mark_and_duplicate_keys(http: RestSession) -> None:
    """Of two values for one key none is guessed."""
    raw = b"\xef\xbb\xbf" + json.dumps(chat_body()).encode()
    assert http.post(CHAT, data=raw).status_code == 200
    doubled = b'{"model": "nowhere", "model": "demo", "messages": [{"role": "user", "content": "hi"}]}'
    refused(http.post(CHAT, data=doubled), CHAT, "model")
    refused(http.post(GENERATE, data=b'{"prompt": "a", "prompt": "b"}'), GENERATE, "prompt")
    refused(
        http.post(INSTALL, data=b'{"model_id": "a/b", "name": "x", "model_id": "c/d"}'), INSTALL, "model_id"
    )


def test_a_prompt_over_the_context_is_refused_with_its_length(http: RestSession, demo_tokenizer: Any) -> None:
    text = "word " * 9000
    for path, body in (
        (CHAT, chat_body(text)),
        (COMPLETIONS, {"model": "demo", "prompt": text}),
        (COMPLETIONS, {"model": "demo", "prompt": [7] * 5000}),
    ):
        error = openai_error(http.post(path, json=body), 400)
        assert error["code"] == "context_length_exceeded"
        assert error["param"] in ("messages", "prompt")
    detail = native_error(http.post(GENERATE, json={"prompt": text}), 400)
    assert str(len(demo_tokenizer.encode(text).ids)) in detail


def test_a_body_over_the_limit_is_413_on_every_route(http: RestSession) -> None:
    """Announced: refused by its length. In chunks: refused once it is counted. 64 MiB for inference, 1 for others."""
    large = b" " * (64 * MIB + 1)
    small = b" " * (MIB + 1)

    def in_chunks(raw: bytes) -> Iterator[bytes]:
        for start in range(0, len(raw), MIB):
            yield raw[start : start + MIB]

    for path, raw in ((CHAT, large), (INSTALL, small), ("/v1/models/demo/load", small)):
        for data in (raw, in_chunks(raw)):
            response = http.post(path, data=data)
            if path == CHAT:
                error = openai_error(response, 413)
                assert error["code"] == "payload_too_large" and str(64 * MIB) in error["message"]
            else:
                assert str(MIB) in native_error(response, 413)
    # Nearly as much is read: its fault is another.
    openai_error(http.post(CHAT, data=b" " * (64 * MIB)), 400)


def test_images_over_their_limit_are_413(http: RestSession) -> None:
    part = image(url="data:image/png;base64," + "A" * (28 * MIB))
    response = http.post(CHAT, json=messages({"role": "user", "content": [part]}))
    error = openai_error(response, 413)
    assert error["param"] == "messages[0].content[0].image_url.url"


def test_an_encoded_body_is_refused_unread(http: RestSession) -> None:
    """A small one may unfold to gigabytes."""
    for encoding in ("gzip", "deflate", "br", "zstd", "x" * 500):
        response = http.post(CHAT, data=b"\x1f\x8b", headers={"Content-Encoding": encoding})
        assert openai_error(response, 415)["code"] == "unsupported_media_type"


@pytest.mark.parametrize(
    "raw",
    [
        b"GARBAGE\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
        b"Content-Length: 6\r\n\r\nhello!",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: rot13\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * (64 * 1024 + 1) + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n"
        + b"".join(b"X-%d: y\r\n" % i for i in range(10_000))
        + b"\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n folded: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=lambda raw: raw[:48].decode("latin-1").replace("\r\n", " "),
)
def test_what_is_no_http_request_gets_a_client_error_in_json(http: RestSession, raw: bytes) -> None:
    status, headers, body = raw_request(http.base_url, raw)
    assert 400 <= status < 500 or status == 501, body
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["detail"]


def test_two_framings_of_one_body_are_one_request(http: RestSession) -> None:
    """Content-Length beside Transfer-Encoding, the classic of smuggling: never a second request out of one."""
    smuggled = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    raw = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n"
        b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\n" % (5 + len(smuggled))
    ) + smuggled
    status, _, body = raw_request(http.base_url, raw)
    assert status == 400
    assert b'"object":"list"' not in body


def test_bodies_that_never_come_hold_nobody_up(http: RestSession) -> None:
    """Clients that stop in the middle of their head or body take no thread: others are answered meanwhile."""
    address = urlsplit(http.base_url)
    slow = [socket.create_connection((str(address.hostname), address.port or 80)) for _ in range(100)]
    try:
        for index, connection in enumerate(slow):
            if index % 2:
                connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
            else:
                head = (
                    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
                )
                connection.sendall(head)
        assert http.get("/health").json() == {"status": "healthy"}
        answer = http.post(CHAT, json=chat_body()).json()
        assert answer["choices"][0]["message"]["content"] == PARIS
    finally:
        for connection in slow:
            connection.close()


def test_a_key_that_is_no_text_is_answered_all_the_same(http: RestSession) -> None:
    """Where it is named in a warning, and where it is refused by name."""
    answer = http.post(CHAT, data=json.dumps({**chat_body(), "\ud800": 1}))
    assert answer.json()["choices"][0]["message"]["content"] == PARIS
    assert answer.json()["warnings"]
    assert "Unknown field" in native_error(http.post(GENERATE, data='{"prompt": "x", "\\ud800": 1}'), 400)
    native_error(http.post(GENERATE, data='{"prompt": "x", "\\ud800": 1, "\\ud800": 2}'), 400)


def test_images_for_a_text_model_are_ignored_with_a_warning(http: RestSession) -> None:
    """As documented."""
    url = "data:image/png;base64,iVBORw0KGgo="
    parts = [
        {"type": "text", "text": CAPITAL},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    response = http.post(CHAT, json=messages({"role": "user", "content": parts}))
    answer = response.json()
    assert answer["choices"][0]["message"]["content"] == PARIS
    assert answer["warnings"] == ["images were left out: 'demo' is a text model"]
    assert "images were left out" in response.headers["X-MLXGUI-Warnings"]
