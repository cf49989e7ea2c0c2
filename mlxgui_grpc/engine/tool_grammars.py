"""Writes, for llguidance, the grammar of replies that call tools in a model's own format.

A call names one of the request's tools and has the arguments of its schema: exactly where the tool is `strict`, as far
as its keywords are known where it is not.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from mlxgui_grpc.engine.constraints import JSON_OPTIONS
from mlxgui_grpc.engine.frames import Constraint, ToolUse
from mlxgui_grpc.engine.reply_format import ReplyFormat
from mlxgui_grpc.engine.tool_parameters import Parameters, ValueStyle, refuse
from mlxgui_grpc.errors import InvalidRequestError

MAX_CALLS = 32
"""In one reply whose form is given."""
_ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool of the request."""

    name: str
    schema: dict[str, Any]
    is_strict: bool
    field: str
    """Of its parameters in the request, for errors."""


def tools_of(prompt_tools: bytes) -> list[Tool]:
    """The tools of a prompt, which are in OpenAI's form."""
    tools = []
    for index, entry in enumerate(json.loads(prompt_tools) if prompt_tools else []):
        function = entry["function"]
        field = f"tools[{index}].parameters_schema"
        schema = function.get("parameters") or _NO_ARGUMENTS
        if not isinstance(schema, dict) or schema.get("type", "object") != "object":
            raise InvalidRequestError(f"{field}: the arguments of a tool are an object", field=field)
        is_strict = bool(function.get("strict") or entry.get("strict"))
        tools.append(Tool(function["name"], {**_ANY_ARGUMENTS, **schema}, is_strict, field))
    return tools


def needs_grammar(tools: list[Tool], use: ToolUse) -> bool:
    """Whether the calls are more than hoped for."""
    return use.is_required or bool(use.function) or any(tool.is_strict for tool in tools)


def tool_grammar(
    tools: list[Tool],
    use: ToolUse,
    reply_format: ReplyFormat,
    tokenizer: LLTokenizer,
    constraint: Constraint | None = None,
) -> str:
    """The grammar of a reply with calls, in llguidance's form.

    Calls and nothing else where they are required; else calls or what `constraint` says; else text with calls in it.
    Raises InvalidRequestError for a format that has no grammar here.
    """
    write = _FORMATS.get(reply_format.tool_format)
    if write is None or not reply_format.can_call:
        known = reply_format.tool_format or "of this model, which is not known,"
        raise InvalidRequestError(
            f"tool_choice: calls in the format {known} cannot be enforced; leave tool_choice at auto and "
            "tools without strict",
            field="tool_choice",
        )
    is_required = use.is_required or bool(use.function)
    tools = chosen(tools, use)
    writer = GrammarWriter(reply_format, tokenizer, is_parallel=use.is_parallel)
    separator = write(writer, tools)
    body = writer.reference(body_of(constraint)) if constraint and not is_required else ""
    writer.start_rule(separator, body=body, is_required=is_required)
    return writer.grammar()


def chosen(tools: list[Tool], use: ToolUse) -> list[Tool]:
    """The tools that may be called; raises InvalidRequestError where the one that has to be is none of them."""
    if not use.function:
        return tools
    named = [tool for tool in tools if tool.name == use.function]
    if not named:
        raise InvalidRequestError(
            f"tool_choice: no tool of the request is called '{use.function}'", field="tool_choice"
        )
    return named


def body_of(constraint: Constraint) -> dict[str, Any]:
    """A constraint as a grammar within a grammar."""
    if constraint.kind == "grammar":
        return {"lark_grammar": constraint.text}
    if constraint.kind == "regex":
        grammar = json.loads(LLMatcher.grammar_from_regex(constraint.text))
        body: dict[str, Any] = grammar["grammars"][0]
        return {key: value for key, value in body.items() if key != "name"}
    schema = json.loads(constraint.text) if constraint.kind == "json_schema" else _ANY_ARGUMENTS
    return {"json_schema": {**schema, "x-guidance": JSON_OPTIONS} if isinstance(schema, dict) else schema}


def literal(text: str) -> str:
    """A string of the grammar's; empty for none."""
    return json.dumps(text) if text else ""


class GrammarWriter:
    """Collects the rules of one grammar."""

    def __init__(self, reply_format: ReplyFormat, tokenizer: LLTokenizer, *, is_parallel: bool) -> None:
        self.start_tag = reply_format.tool_call_start
        self.end_tag = reply_format.tool_call_end
        self.is_parallel = is_parallel
        self._tokenizer = tokenizer
        self._rules: list[str] = []
        self._parts: list[dict[str, Any]] = []

    def rule(self, name: str, body: str) -> None:
        """Define a rule (lower case) or a terminal (upper case)."""
        self._rules.append(f"{name}: {body}")

    def reference(self, part: dict[str, Any]) -> str:
        """A grammar within the grammar."""
        name = f"part_{len(self._parts)}"
        self._parts.append({"name": name, **part})
        return f"@{name}"

    def arguments(self, tool: Tool, **options: Any) -> str:
        """The arguments of a tool as a JSON object."""
        return self.json(tool.schema, is_strict=tool.is_strict, **options)

    def json(self, schema: dict[str, Any], *, is_strict: bool, **options: Any) -> str:
        """An instance of a schema."""
        known = JSON_OPTIONS | {"lenient": not is_strict, "coerce_one_of": not is_strict} | options
        return self.reference({"json_schema": {**schema, "x-guidance": known}})

    def tag(self, text: str) -> str:
        """Markup: the special token of this name where there is one, else as text."""
        if token := self._special(text):
            return f"<[{token}]>"
        return literal(text)

    def _special(self, text: str) -> int | None:
        tokens = self._tokenizer.tokenize_str(text, parse_special=True) if text else []
        return tokens[0] if len(tokens) == 1 and self._tokenizer.is_special_token(tokens[0]) else None

    def start_rule(self, separator: str | None, *, body: str = "", is_required: bool) -> None:
        """Define where the grammar begins, from the rule `rest`: a call, or joint calls, after their start tag.

        Several follow one another with `separator` between them; None: only ever one `rest` in a reply. Not required
        calls stand in free text, unless the reply may be `body` instead.
        """
        is_repeated = self.is_parallel and separator is not None
        self.rule("opening", self.tag(self.start_tag))
        more = f" ({separator} opening rest){{0,{MAX_CALLS - 1}}}" if is_repeated else ""
        if is_required or body:
            self.rule("start", f"opening rest{more}" + (f" | {body}" if body and not is_required else ""))
            return
        again = "*" if is_repeated else "?"
        self.rule("TEXT", f"/(?s:.*)/ & {without(self.start_tag)}")
        if self._special(self.start_tag) is not None:
            self.rule("start", f"(TEXT opening rest{more}){again} TEXT")
        else:
            # The tag is spelled in tokens of text: the text before it ends as soon as it is there.
            self.rule("till_call[lazy]", f"/(?s:.*)/ {literal(self.start_tag)}")
            self.rule("start", f"(till_call rest{more}){again} TEXT")

    def grammar(self) -> str:
        """All of it."""
        main = {"name": "reply", "lark_grammar": "\n".join(self._rules)}
        return json.dumps({"grammars": [main, *self._parts]})


def without(*texts: str) -> str:
    """A terminal's part: no string that holds one of these."""
    return " & ".join(f"~/(?s:.*){_escaped(text)}(?s:.*)/" for text in texts if text)


def _escaped(text: str) -> str:
    return "".join(
        char if char.isalnum() or char in "_<>=: \"'" else f"\\x{{{ord(char):X}}}" for char in text
    )


# The rule `rest` of each format: mlx-lm's parser of that name reads it. Each returns what stands between two calls.


def _json_objects(writer: GrammarWriter, tools: list[Tool]) -> str | None:
    """An object with name and arguments between the tags (Hermes, Qwen, LongCat)."""
    writer.rule("BREAK", r"/\n?/")
    writer.rule("rest", f"BREAK {_objects(writer, tools)} BREAK {writer.tag(writer.end_tag)}")
    return "BREAK"


def _objects(writer: GrammarWriter, tools: list[Tool]) -> str:
    """An object with `name` and `arguments`."""
    heads = [literal('{"name": ' + json.dumps(tool.name) + ', "arguments": ') for tool in tools]
    pairs = zip(heads, tools, strict=True)
    return _one_of(f'{head} {writer.arguments(tool)} "}}"' for head, tool in pairs)


def _one_of(bodies: Iterable[str]) -> str:
    return "(" + " | ".join(bodies) + ")"


def _more(writer: GrammarWriter, call: str) -> str:
    """What may follow the first call between the same tags."""
    return f" ({call}){{0,{MAX_CALLS - 1}}}" if writer.is_parallel else ""


def _mistral(writer: GrammarWriter, tools: list[Tool]) -> str | None:
    """`[TOOL_CALLS]name[ARGS]{…}`; before there was `[ARGS]`, `[TOOL_CALLS][{…}, …]`."""
    middle = writer.tag("[ARGS]")
    if middle.startswith("<["):
        calls = _one_of(f"{literal(tool.name)} {middle} {writer.arguments(tool)}" for tool in tools)
        writer.rule("rest", calls)
        return ""
    writer.rule("object", _objects(writer, tools))
    separator = literal(", ")
    writer.rule("rest", f'/ ?/ "[" object{_more(writer, f"{separator} object")} "]"')
    return None


def _kimi(writer: GrammarWriter, tools: list[Tool]) -> str | None:
    """`functions.name:0`, a tag and the arguments, between tags of their own."""
    begin, end = writer.tag("<|tool_call_begin|>"), writer.tag("<|tool_call_end|>")
    middle = writer.tag("<|tool_call_argument_begin|>")
    writer.rule("INDEX", "/[0-9]{1,3}/")
    heads = [literal(f"functions.{tool.name}:") for tool in tools]
    pairs = zip(heads, tools, strict=True)
    calls = _one_of(f"{head} INDEX {middle} {writer.arguments(tool)}" for head, tool in pairs)
    writer.rule("one", f"{begin} {calls} {end}")
    writer.rule("rest", f"one{_more(writer, 'one')} {writer.tag(writer.end_tag)}")
    return None


def _pythonic(writer: GrammarWriter, tools: list[Tool]) -> str | None:
    """`[name(key=value, …), …]`: values are JSON, with the escapes that Python reads alike."""
    bodies = []
    for number, tool in enumerate(tools):
        if not tool.name.replace(".", "_").isidentifier():
            refuse(tool.field, f"the name '{tool.name}' is none in this model's tool format, pythonic")
        parameters = Parameters(tool.schema, tool.field, is_strict=tool.is_strict)

        def write(name: str, schema: dict[str, Any], tool: Tool = tool) -> str:
            value = writer.json(schema, is_strict=tool.is_strict, json_allowed_escapes='nrtbf\\"')
            return f"{literal(name + '=')} {value}"

        first = parameters.listed(f"p{number}", writer.rule, write)
        bodies.append(f'{literal(tool.name + "(")} {first} ")"')
    writer.rule("one", _one_of(bodies))
    separator = literal(", ")
    writer.rule("rest", f'"[" one{_more(writer, f"{separator} one")} "]" {writer.tag(writer.end_tag)}')
    return None


@dataclass(frozen=True, slots=True)
class _Markup:
    """A format with an element for each argument; `{}` is a name."""

    open_call: str
    open_value: str
    close_value: str
    close_call: str
    style: ValueStyle

    def __call__(self, writer: GrammarWriter, tools: list[Tool]) -> str | None:
        calls = _one_of(self._call(writer, tool, number) for number, tool in enumerate(tools))
        end = writer.tag(writer.end_tag)
        if self.style.is_joint:
            writer.rule("one", calls)
            writer.rule("rest", f'"\\n" one{_more(writer, "one")} {end}')
            return None
        writer.rule("BREAK", r"/\n?/")
        writer.rule("rest", f"{calls} {end}")
        return "BREAK"

    def _call(self, writer: GrammarWriter, tool: Tool, number: int) -> str:
        text = f"/(?s:.*)/ & {without(self.close_value.strip(), writer.end_tag)}"
        parameters = Parameters(tool.schema, tool.field, is_strict=tool.is_strict)
        elements: list[str] = []
        for name, schema, is_required in parameters:
            value = parameters.value(
                name, schema, self.style, text, lambda schema: writer.json(schema, is_strict=tool.is_strict)
            )
            if value.startswith("/"):
                terminal = f"VALUE_{number}_{len(elements)}"
                writer.rule(terminal, value)
                value = terminal
            element = f"{literal(self.open_value.format(name))} {value} {literal(self.close_value)}"
            elements.append(f"({element})" if is_required else f"({element})?")
        head = literal(self.open_call.format(tool.name))
        return " ".join(filter(None, [head, *elements, literal(self.close_call)]))


_FORMATS: dict[str, Callable[[GrammarWriter, list[Tool]], str | None]] = {
    "json_tools": _json_objects,
    "longcat": _json_objects,
    "mistral": _mistral,
    "kimi_k2": _kimi,
    "pythonic": _pythonic,
    "qwen3_coder": _Markup(
        "\n<function={}>\n",
        "<parameter={}>\n",
        "\n</parameter>\n",
        "</function>\n",
        ValueStyle("qwen3_coder", reads_null=True, reads_types=True),
    ),
    "glm47": _Markup(
        "{}\n",
        "<arg_key>{}</arg_key>\n<arg_value>",
        "</arg_value>\n",
        "",
        ValueStyle("glm47", strips=True),
    ),
    "minimax_m2": _Markup(
        '<invoke name="{}">\n',
        '<parameter name="{}">',
        "</parameter>\n",
        "</invoke>\n",
        ValueStyle("minimax_m2", strips=True, reads_null=True, reads_types=True, is_joint=True),
    ),
}
