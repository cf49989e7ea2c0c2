"""What malformed bodies are made of."""

import random
from collections.abc import Callable
from typing import Any

Choose = random.Random

TEXTS = [
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
NUMBERS: list[Any] = [
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
KEYS = [
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
        return choose.choice(TEXTS)
    if kind in (2, 3):
        return choose.choice(NUMBERS)
    if kind == 4:
        return choose.choice([True, False])
    if kind == 5:
        return None
    if kind == 6:
        return [any_value(choose, depth + 1) for _ in range(choose.randrange(4))]
    if kind == 7:
        return {choose.choice(KEYS): any_value(choose, depth + 1) for _ in range(choose.randrange(4))}
    nested: Any = choose.choice(TEXTS)
    for _ in range(choose.choice([3, 63, 64, 65, 200])):
        nested = [nested] if choose.random() < 0.5 else {"a": nested}
    return nested


SAMPLING: dict[str, Callable[[Choose], Any]] = {
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


def some(choose: Choose, fields: dict[str, Callable[[Choose], Any]]) -> dict[str, Any]:
    """A few of the fields."""
    return {name: fields[name](choose) for name in choose.sample(sorted(fields), choose.randrange(4))}
