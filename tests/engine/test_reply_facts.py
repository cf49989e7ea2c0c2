"""What a template tells of a model's markup, against mlx-lm's own choice."""

import json
from pathlib import Path
from types import SimpleNamespace

import mlx_lm.tokenizer_utils
import pytest

from mlxgui_grpc.reply_facts import has_thinking, tool_format_of

DEMO = Path(__file__).parents[2] / "mlxgui_grpc" / "demo" / "chat_template.jinja"
SIGNS = (
    "<minimax:tool_call>", "<|tool_call>x<tool_call|>", "<|tool_call>", "<start_function_call>",
    "<longcat_tool_call>", "<arg_key>", "<|tool_list_start|>", "<|tool_call_start|>",
    "<tool_call>\n<function=", "<tool_call>\\n<function=", "<|tool_calls_section_begin|>",
    '<function name="a"><param name="b">', '<function name="a">', "[TOOL_CALLS]", "<atem:function_calls>",
    "<tool_call>{{ tool_call.name }}", "<tool_call>", "tools", "",
)  # fmt: skip


@pytest.mark.parametrize("first", SIGNS)
def test_the_format_is_the_one_that_mlx_lm_chooses(first: str) -> None:
    for second in SIGNS:
        template = f"{first} {second}"
        tokenizer = SimpleNamespace(chat_template=template, get_vocab=dict)
        assert tool_format_of(template) == (mlx_lm.tokenizer_utils._infer_tool_parser(tokenizer) or ""), (
            template
        )


def test_the_demo_model_thinks_and_calls() -> None:
    template = DEMO.read_text(encoding="utf-8")
    assert (tool_format_of(template), has_thinking(template)) == ("json_tools", True)
    assert not has_thinking(json.dumps("{{ messages }}"))
