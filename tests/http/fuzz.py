"""Makes bodies that go wrong in every way: a grammar of the request fields, mutated by a seeded generator."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.http.fuzz_dialects import message_body, response_body
from tests.http.fuzz_values import KEYS, SAMPLING, TEXTS, Choose, any_value, some


def _part(choose: Choose) -> dict[str, Any]:
    url = choose.choice(["data:image/png;base64,AAAA", "https://x/y", "x"])
    return choose.choice(
        [
            {"type": "text", "text": choose.choice(TEXTS)},
            {"type": "image_url", "image_url": {"url": url}},
            {"type": choose.choice(["text", "image_url", "input_audio", "file"])},
        ]
    )


def _message(choose: Choose) -> dict[str, Any]:
    role = choose.choice(["system", "developer", "user", "assistant", "tool", "function", "wizard"])
    message: dict[str, Any] = {"role": role}
    message["content"] = choose.choice(
        [choose.choice(TEXTS), None, [_part(choose) for _ in range(choose.randrange(3))]]
    )
    if role == "tool" or choose.random() < 0.1:
        message["tool_call_id"] = choose.choice(["c", "", None])
    if role == "assistant" and choose.random() < 0.5:
        message["tool_calls"] = [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": choose.choice(TEXTS)}}
        ]
    return message


def _tool(choose: Choose) -> Any:
    schema = choose.choice(
        [None, {}, {"type": "object", "properties": {"a": {"type": "string"}}}, {"properties": 5}]
    )
    return {"type": "function", "function": {"name": choose.choice(["f", "", "a b"]), "parameters": schema}}


_OPENAI: dict[str, Callable[[Choose], Any]] = {
    **SAMPLING,
    "n": lambda choose: choose.choice([1, 2, 17]),
    "user": lambda choose: choose.choice(TEXTS),
    "stream": lambda choose: choose.choice([True, False, None]),
    "stream_options": lambda choose: choose.choice([None, {"include_usage": True}, {}]),
    "logprobs": lambda choose: choose.choice([None, True, False, 1]),
    "store": lambda choose: True,
    "metadata": lambda choose: {"a": "b"},
}
_CHAT: dict[str, Callable[[Choose], Any]] = {
    **_OPENAI,
    "tools": lambda choose: [_tool(choose) for _ in range(choose.randrange(3))],
    "tool_choice": lambda choose: choose.choice(
        ["auto", "none", "required", {"type": "function", "function": {"name": "f"}}]
    ),
    "response_format": lambda choose: choose.choice(
        [{"type": "text"}, {"type": "json_object"}, {"type": "x"}]
    ),
    "chat_template_kwargs": lambda choose: choose.choice(
        [{}, {"enable_thinking": True}, {"messages": 1}, {"a": "\ud800"}]
    ),
    "functions": lambda choose: [],
    "top_logprobs": lambda choose: 2,
}


@dataclass(frozen=True)
class Case:
    """One request: where it goes and the bytes of its body."""

    path: str
    body: bytes


def make_case(seed: int) -> Case:
    """The request of a seed, the same for ever."""
    choose = random.Random(seed)
    path = choose.choice(
        [
            *["/v1/chat/completions"] * 3,
            *["/v1/completions", "/v1/models/demo/generate", "/v1/models/install"],
            *["/v1/responses", "/v1/messages", "/v1/messages/count_tokens"],
        ]
    )
    body = _body(choose, path)
    for _ in range(choose.choice([0, 0, 0, 1, 1, 2])):
        body = _mutated(choose, body)
    raw = json.dumps(body, ensure_ascii=choose.random() < 0.8).encode("utf-8", "surrogatepass")
    if choose.random() < 0.15:
        raw = _broken(choose, raw)
    return Case(path, raw)


def _body(choose: Choose, path: str) -> dict[str, Any]:
    if path == "/v1/models/install":
        # No such repository exists, so that a body which is right by accident installs nothing.
        body = {
            "model_id": choose.choice(["fuzz/none", "none", "a/b/c", *TEXTS]),
            "name": choose.choice(TEXTS),
        }
        return {**body, "revision": choose.choice([None, "main", "../x"])} if choose.random() < 0.3 else body
    if path == "/v1/responses":
        return response_body(choose)
    if path.startswith("/v1/messages"):
        return message_body(choose)
    # Short, so that those that are right cost little.
    limit = {"max_tokens": choose.choice([1, 2, 3])}
    if path == "/v1/models/demo/generate":
        return {"prompt": choose.choice(TEXTS), **limit, **some(choose, SAMPLING)}
    if path == "/v1/completions":
        prompt = choose.choice([choose.choice(TEXTS), ["a", "b"], [5, 6], [[5], [6]], [1024], []])
        return {"model": "demo", "prompt": prompt, **limit, **some(choose, _OPENAI)}
    messages = [_message(choose) for _ in range(choose.choice([0, 1, 1, 1, 2, 3]))]
    return {
        "model": choose.choice(["demo"] * 9 + ["none"]),
        "messages": messages,
        **limit,
        **some(choose, _CHAT),
    }


def _mutated(choose: Choose, value: Any) -> Any:
    """Change one place somewhere inside."""
    if isinstance(value, dict) and value and choose.random() < 0.85:
        key = choose.choice(sorted(value))
        action = choose.randrange(6)
        rest = {name: item for name, item in value.items() if name != key}
        if action == 0:
            return rest
        if action == 1:
            return {**value, choose.choice(KEYS): any_value(choose)}
        if action == 2:
            return {**value, key: any_value(choose)}
        return {**value, key: _mutated(choose, value[key])}
    if isinstance(value, list) and value and choose.random() < 0.8:
        index = choose.randrange(len(value))
        if choose.random() < 0.2:
            return value * choose.choice([2, 50])
        return [*value[:index], _mutated(choose, value[index]), *value[index + 1 :]]
    return any_value(choose)


def _broken(choose: Choose, raw: bytes) -> bytes:
    """The bytes cut, flipped, doubled or mixed with others."""
    if not raw:
        return b"\xff"
    place = choose.randrange(len(raw))
    match choose.randrange(5):
        case 0:
            return raw[:place]
        case 1:
            return raw[:place] + bytes([raw[place] ^ (1 << choose.randrange(8))]) + raw[place + 1 :]
        case 2:
            return raw[:place] + raw
        case 3:
            return raw[:place] + choose.randbytes(8) + raw[place:]
    return raw[:place] + choose.choice([b"[" * 100, b'{"a":' * 100, b'"', b"\\u", b"1e"]) + raw[place:]
