"""Makes bodies that go wrong in every way: a grammar of the request fields, mutated by a seeded generator."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Choose = random.Random

_TEXTS = [
    "",
    " ",
    "hi",
    "The capital of France is",
    "\x00",
    "\ud800",
    "\udfff\ud800",
    "é",
    "👨\u200d👩\u200d👧",
    "\u202e\u2028\ufeff",
    "{{ 7*7 }}{% raw %}",
    "<|im_end|>\n<|im_start|>system",
    "<think>",
    '<tool_call>\n{"name": ',
    "data: [DONE]\n\n",
    "../../etc/passwd",
    "a/b",
    "true",
    "5",
    "5m",
    "x" * 300,
    "x" * 5000,
    "Infinity",
]
_NUMBERS: list[Any] = [
    0,
    1,
    -1,
    2,
    0.5,
    -0.0,
    1e-320,
    5.0,
    16384,
    16385,
    2**31 - 1,
    2**31,
    -(2**31),
    2**53 + 1,
    2**63 - 1,
    2**63,
    -(2**63) - 1,
    10**30,
    10**400,
    1e38,
    1e39,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
]
_KEYS = [
    "",
    "a",
    "type",
    "text",
    "content",
    "role",
    "model",
    "__class__",
    "\ud800",
    "x" * 200,
    "5",
    "-1",
    "function",
]


def any_value(choose: Choose, depth: int = 0) -> Any:
    """Any JSON value, and some that JSON does not have."""
    kind = choose.randrange(9 if depth < 4 else 6)
    if kind in (0, 1):
        return choose.choice(_TEXTS)
    if kind in (2, 3):
        return choose.choice(_NUMBERS)
    if kind == 4:
        return choose.choice([True, False])
    if kind == 5:
        return None
    if kind == 6:
        return [any_value(choose, depth + 1) for _ in range(choose.randrange(4))]
    if kind == 7:
        return {choose.choice(_KEYS): any_value(choose, depth + 1) for _ in range(choose.randrange(4))}
    nested: Any = choose.choice(_TEXTS)
    for _ in range(choose.choice([3, 63, 64, 65, 200])):
        nested = [nested] if choose.random() < 0.5 else {"a": nested}
    return nested


def _part(choose: Choose) -> dict[str, Any]:
    url = choose.choice(["data:image/png;base64,AAAA", "https://x/y", "x"])
    return choose.choice(
        [
            {"type": "text", "text": choose.choice(_TEXTS)},
            {"type": "image_url", "image_url": {"url": url}},
            {"type": choose.choice(["text", "image_url", "input_audio", "file"])},
        ]
    )


def _message(choose: Choose) -> dict[str, Any]:
    role = choose.choice(["system", "developer", "user", "assistant", "tool", "function", "wizard"])
    message: dict[str, Any] = {"role": role}
    message["content"] = choose.choice(
        [choose.choice(_TEXTS), None, [_part(choose) for _ in range(choose.randrange(3))]]
    )
    if role == "tool" or choose.random() < 0.1:
        message["tool_call_id"] = choose.choice(["c", "", None])
    if role == "assistant" and choose.random() < 0.5:
        message["tool_calls"] = [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": choose.choice(_TEXTS)}}
        ]
    return message


def _tool(choose: Choose) -> Any:
    schema = choose.choice(
        [None, {}, {"type": "object", "properties": {"a": {"type": "string"}}}, {"properties": 5}]
    )
    return {"type": "function", "function": {"name": choose.choice(["f", "", "a b"]), "parameters": schema}}


_SAMPLING: dict[str, Callable[[Choose], Any]] = {
    "temperature": lambda choose: choose.choice([0, 0.7, 1, 2]),
    "top_p": lambda choose: choose.choice([0, 0.5, 1, 1.01]),
    "min_p": lambda choose: choose.choice([0, 0.1, 1]),
    "top_k": lambda choose: choose.choice([0, 1, 40, -1]),
    "repetition_penalty": lambda choose: choose.choice([1.0, 1.2, 0, 10]),
    "repetition_context_size": lambda choose: choose.choice([0, 20, 16384]),
    "presence_penalty": lambda choose: choose.choice([-2, 0, 2]),
    "frequency_penalty": lambda choose: choose.choice([-2, 0, 2]),
    "seed": lambda choose: choose.choice([None, 0, 7, -1, 2**63 - 1]),
    "stop": lambda choose: choose.choice(["a", ["a", "b"], [], [""], ["x"] * 17]),
    "logit_bias": lambda choose: choose.choice(
        [{}, {"5": 1}, {"5": -100}, {"1023": 100}, {"1024": 1}, {"x": 1}]
    ),
    "priority": lambda choose: choose.choice([0, 100, -101]),
    "keep_alive": lambda choose: choose.choice(["5m", 0, -1, "x"]),
}
_OPENAI: dict[str, Callable[[Choose], Any]] = {
    **_SAMPLING,
    "n": lambda choose: choose.choice([1, 2, 17]),
    "user": lambda choose: choose.choice(_TEXTS),
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
        ["/v1/chat/completions"] * 3 + ["/v1/completions", "/v1/models/demo/generate", "/v1/models/install"]
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
            "model_id": choose.choice(["fuzz/none", "none", "a/b/c", *_TEXTS]),
            "name": choose.choice(_TEXTS),
        }
        return {**body, "revision": choose.choice([None, "main", "../x"])} if choose.random() < 0.3 else body
    # Short, so that those that are right cost little.
    limit = {"max_tokens": choose.choice([1, 2, 3])}
    if path == "/v1/models/demo/generate":
        return {"prompt": choose.choice(_TEXTS), **limit, **_some(choose, _SAMPLING)}
    if path == "/v1/completions":
        prompt = choose.choice([choose.choice(_TEXTS), ["a", "b"], [5, 6], [[5], [6]], [1024], []])
        return {"model": "demo", "prompt": prompt, **limit, **_some(choose, _OPENAI)}
    messages = [_message(choose) for _ in range(choose.choice([0, 1, 1, 1, 2, 3]))]
    return {
        "model": choose.choice(["demo"] * 9 + ["none"]),
        "messages": messages,
        **limit,
        **_some(choose, _CHAT),
    }


def _some(choose: Choose, fields: dict[str, Callable[[Choose], Any]]) -> dict[str, Any]:
    return {name: fields[name](choose) for name in choose.sample(sorted(fields), choose.randrange(4))}


def _mutated(choose: Choose, value: Any) -> Any:
    """Change one place somewhere inside."""
    if isinstance(value, dict) and value and choose.random() < 0.85:
        key = choose.choice(sorted(value))
        action = choose.randrange(6)
        rest = {name: item for name, item in value.items() if name != key}
        if action == 0:
            return rest
        if action == 1:
            return {**value, choose.choice(_KEYS): any_value(choose)}
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
