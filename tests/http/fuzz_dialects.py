"""Bodies of the Responses and the Messages API, right by and large."""

from collections.abc import Callable
from typing import Any

from tests.http.fuzz_values import NUMBERS, SAMPLING, TEXTS, Choose, some


def response_body(choose: Choose) -> dict[str, Any]:
    """A body of /v1/responses."""
    items = [_item(choose) for _ in range(choose.choice([1, 1, 2, 3]))]
    return {
        "model": choose.choice(["demo"] * 9 + ["none"]),
        "input": choose.choice([choose.choice(TEXTS), items, items, items]),
        "max_output_tokens": choose.choice([1, 2, 3]),
        **some(choose, _RESPONSES),
    }


def message_body(choose: Choose) -> dict[str, Any]:
    """A body of /v1/messages."""
    turns = [_turn(choose) for _ in range(choose.choice([0, 1, 2]))]
    return {
        "model": choose.choice(["demo"] * 9 + ["none"]),
        "messages": [*turns, {"role": "user", "content": choose.choice(["x", [_block(choose, "user")]])}],
        "max_tokens": choose.choice([1, 2, 3]),
        **some(choose, _MESSAGES),
    }


_RESPONSES: dict[str, Callable[[Choose], Any]] = {
    **SAMPLING,
    "stream": lambda choose: choose.choice([True, False, None]),
    "stream_options": lambda choose: choose.choice([None, {}]),
    "instructions": lambda choose: choose.choice(TEXTS),
    "include": lambda choose: [choose.choice(["message.output_text.logprobs", "x"])],
    "text": lambda choose: {
        "format": choose.choice([{"type": "text"}, {"type": "json_object"}, {"type": "x"}])
    },
    "reasoning": lambda choose: {"effort": choose.choice(["none", "low", "x"]), "summary": "auto"},
    "tools": lambda choose: [{"type": choose.choice(["function", "x"]), "name": "f", "parameters": {}}],
    "tool_choice": lambda choose: choose.choice(["auto", "none", {"type": "function", "name": "f"}]),
    "metadata": lambda choose: {"a": choose.choice(NUMBERS)},
    "store": lambda choose: True,
    "previous_response_id": lambda choose: "resp_x",
}
_MESSAGES: dict[str, Callable[[Choose], Any]] = {
    **SAMPLING,
    "stream": lambda choose: choose.choice([True, False, None]),
    "system": lambda choose: choose.choice([choose.choice(TEXTS), [{"type": "text", "text": "x"}]]),
    "stop_sequences": lambda choose: choose.choice([["a"], [""], []]),
    "thinking": lambda choose: choose.choice([{"type": "disabled"}, {"type": "enabled", "budget_tokens": 9}]),
    "tools": lambda choose: [{"name": choose.choice(["f", "a b"]), "input_schema": {}}],
    "tool_choice": lambda choose: choose.choice(
        [{"type": "auto"}, {"type": "none"}, {"type": "tool", "name": "f"}]
    ),
    "metadata": lambda choose: {"user_id": "x"},
}


def _item(choose: Choose) -> dict[str, Any]:
    text = choose.choice(TEXTS)
    part = {"type": choose.choice(["input_text", "output_text", "input_file"]), "text": text}
    return choose.choice(
        [
            {
                "role": choose.choice(["user", "assistant", "developer", "x"]),
                "content": choose.choice([text, [part]]),
            },
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": text},
            {"type": "function_call_output", "call_id": "c", "output": choose.choice([text, [part], []])},
            {"type": "item_reference", "id": "x"},
        ]
    )


def _turn(choose: Choose) -> dict[str, Any]:
    role = choose.choice(["user", "assistant", "system", "x"])
    return {"role": role, "content": choose.choice([choose.choice(TEXTS), [_block(choose, role)]])}


def _block(choose: Choose, role: str) -> dict[str, Any]:
    text = choose.choice(TEXTS)
    source = {
        "type": choose.choice(["base64", "x"]),
        "media_type": "image/png",
        "data": choose.choice(["AAAA", text]),
    }
    assistant: list[dict[str, Any]] = [
        {"type": "thinking", "thinking": text, "signature": ""},
        {"type": "tool_use", "id": "t", "name": "f", "input": {"a": choose.choice(NUMBERS)}},
    ]
    user: list[dict[str, Any]] = [
        {"type": "image", "source": source},
        {
            "type": "tool_result",
            "tool_use_id": "t",
            "content": choose.choice([text, None, []]),
            "is_error": True,
        },
    ]
    return choose.choice([{"type": "text", "text": text}, *(assistant if role == "assistant" else user)])
