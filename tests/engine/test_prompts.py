"""Messages and variables as the templates of several families take them."""

import json
from functools import partial
from typing import Any

import pytest
from mlx_lm.chat_templates import deepseek_v32

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.prompts import PromptTokenizer
from mlxgui_grpc.reply_facts import has_thinking, takes_tools, tool_format_of
from tests.engine.test_harmony import TEMPLATE, make_wrapper
from tests.engine.test_reply import WEATHER


def prompts_of(template: str, render: Any = None) -> PromptTokenizer:
    tokenizer = make_wrapper()._tokenizer
    tokenizer.chat_template = template
    render = render or partial(tokenizer.apply_chat_template, tokenize=False)
    return PromptTokenizer(tokenizer, render, len(tokenizer), 4096, lambda: None)


def call(id: str, city: str) -> dict[str, Any]:
    return {"type": "function", "id": id, "function": {"name": f"of_{city}", "arguments": {"city": city}}}


def test_messages_reach_the_template_as_it_wants_them() -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Two.",
         "tool_calls": [call("a", "x"), call("b", "y")]},
        {"role": "tool", "content": "rain", "tool_call_id": "b"},
        {"role": "tool", "content": "sun", "tool_call_id": "a"},
    ]  # fmt: skip
    text = prompts_of(TEMPLATE).render(
        frames.Prompt(
            messages=json.dumps(messages).encode(), template_arguments=b'{"reasoning_effort": "high"}'
        )
    )

    def step(city: str, weather: str) -> str:
        return (
            f"<|start|>assistant to=functions.of_{city}<|channel|>commentary json<|message|>"
            f'{{"city": "{city}"}}<|call|>'
            f'<|start|>functions.of_{city} to=assistant<|channel|>commentary<|message|>"{weather}"<|end|>'
        )

    assert text == (
        "<|start|>system<|message|>Reasoning: high<|end|><|start|>developer<|message|>Be brief.<|end|>"
        "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>analysis<|message|>Two.\n\nI look.<|end|>"
        + step("x", "sun")
        + step("y", "rain")
        + "<|start|>assistant"
    )


def test_a_template_that_is_a_module_gets_arguments_as_text_and_takes_tools() -> None:
    name = "deepseek_v32"
    assert (takes_tools(name), has_thinking(name), tool_format_of(name)) == (True, True, "")
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call("a", "x")]},
        {"role": "tool", "content": "rain", "tool_call_id": "a"},
    ]
    prompt = frames.Prompt(
        messages=json.dumps(messages).encode(),
        tools=json.dumps([WEATHER]).encode(),
        template_arguments=b'{"reasoning_effort": "none"}',
    )
    prompts = prompts_of("", deepseek_v32.apply_chat_template)
    text = prompts.render(prompt)
    assert 'name="city" string="true">x<' in text and "get_weather" in text and not prompts.warnings(prompt)
    assert text.endswith("</think>")


@pytest.mark.parametrize(
    ("template", "given", "without_effect"),
    [
        (TEMPLATE, {"reasoning_effort": "low"}, []),
        (TEMPLATE, {"enable_thinking": False}, ["enable_thinking"]),
        (TEMPLATE, {"reasoning_effort": "low", "enable_thinking": True}, ["enable_thinking"]),
        (
            "{% if enable_thinking %}{% generation %}x{% endgeneration %}{% endif %}",
            {"reasoning_effort": "none"},
            [],
        ),
        ("{% set thinking = thinking if thinking is defined else false %}", {"enable_thinking": True}, []),
        ("thinking {{ messages[0].thinking }}", {"reasoning_effort": "low", "x": 1}, ["reasoning_effort"]),
        ("{{ messages }}", {}, []),
    ],
)
def test_what_a_template_does_not_know_is_said(
    template: str, given: dict[str, Any], without_effect: list[str]
) -> None:
    prompt = frames.Prompt(messages=b"[]", template_arguments=json.dumps(given).encode())
    warnings = prompts_of(template).warnings(prompt)
    assert [warning.partition(" ")[0] for warning in warnings] == without_effect
