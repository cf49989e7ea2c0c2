"""What a chat template tells of the markup of a model's replies, without loading anything.

The signs are those by which mlx-lm 0.32 chooses its parsers (`tokenizer_utils._infer_tool_parser`, `_infer_thinking`),
in its order; where it asks the vocabulary instead, only a loaded model can tell. Harmony, gpt-oss's format, has no
parser there: it is read here.
"""

HARMONY = "harmony"
_TOOL_FORMATS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("gemma4", ("<|tool_call>", "<tool_call|>")),
    ("function_gemma", ("<start_function_call>",)),
    ("longcat", ("<longcat_tool_call>",)),
    ("glm47", ("<arg_key>",)),
    ("pythonic", ("<|tool_list_start|>",)),
    ("pythonic", ("<|tool_call_start|>",)),
    ("qwen3_coder", ("<tool_call>\\n<function=",)),
    ("qwen3_coder", ("<tool_call>\n<function=",)),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("minicpm5", ('<function name="', '<param name="')),
    ("mistral", ("[TOOL_CALLS]",)),
    ("muse_spark", ("<atem:function_calls>",)),
    ("json_tools", ("<tool_call>", "tool_call.name")),
    (HARMONY, ("<|channel|>", "<|message|>", "<|call|>")),
)
"""A parser's name, and what a template must have in it."""
_THINKING_SIGNS = ("<think>", "</think>", "<longcat_think>", "<|think:start|>", "<|channel>thought")
_MODULES = frozenset({"deepseek_v32"})
"""Templates that are modules of mlx-lm, named in place of a text: they take tools, and mark thinking. How their models
write calls, mlx-lm does not read."""


def tool_format_of(template: str) -> str:
    """The name of mlx-lm's parser for the calls that a template shows; empty where it shows none that is known."""
    return next((name for name, signs in _TOOL_FORMATS if all(sign in template for sign in signs)), "")


def is_harmony_template(template: str) -> bool:
    """Whether a template writes its messages as gpt-oss's does."""
    return tool_format_of(template) == HARMONY


def has_thinking(template: str) -> bool:
    """Whether a template knows replies that begin with marked thinking."""
    return (
        template in _MODULES
        or any(sign in template for sign in _THINKING_SIGNS)
        or is_harmony_template(template)
    )


def takes_tools(template: str) -> bool:
    """Whether a template has a place for tools."""
    return "tool" in template or template in _MODULES
