"""Writes, for llguidance, the grammar of whole replies in gpt-oss's format, where no tag ends the thinking."""

from llguidance import LLTokenizer

from mlxgui_grpc.engine.frames import Constraint, ToolUse
from mlxgui_grpc.engine.reply_format import CHANNEL, CONSTRAIN, END, MESSAGE, START, ReplyFormat
from mlxgui_grpc.engine.tool_grammars import GrammarWriter, Tool, body_of, chosen, literal


def harmony_grammar(
    tools: list[Tool],
    use: ToolUse | None,
    reply_format: ReplyFormat,
    tokenizer: LLTokenizer,
    constraint: Constraint | None = None,
    max_thinking_tokens: int | None = None,
) -> str:
    """The grammar of a reply from its first header on, in llguidance's form.

    Thinking, in one message if it is limited; then a call, if there are `tools`, or the answer, which is what
    `constraint` says; a call only, where `use` requires one. Before them may stand messages to the user, unless the
    answer has a form. Raises InvalidRequestError.
    """
    writer = GrammarWriter(reply_format, tokenizer, is_parallel=False)
    tag, rule = writer.tag, writer.rule
    is_required = use is not None and (use.is_required or bool(use.function))
    rule("TEXT", "/(?s:.*)/")
    rule("next", f'{tag(END)} {tag(START)} "assistant"')
    thought = "TEXT"
    if max_thinking_tokens:
        # Not the attribute max_tokens, with which a matcher cannot go back.
        rule("token", f"<[^{','.join(map(str, sorted(reply_format.special_tokens)))}]>")
        thought = f"token{{0,{max_thinking_tokens}}}"
    rule("thinking", f'{tag(CHANNEL)} "analysis" {tag(MESSAGE)} {thought} next')
    rule("saying", f'{tag(CHANNEL)} "commentary" {tag(MESSAGE)} TEXT next')
    others = [] if constraint or is_required else ["saying"]
    if max_thinking_tokens is None:
        before = "(" + " | ".join(["thinking", *others]) + ")*"
    else:
        between = "saying* " if others else ""
        before = f"{between}thinking? {between}" if max_thinking_tokens else between
    ends = []
    if use is not None and tools:
        ends += [_call(writer, tool, number) for number, tool in enumerate(chosen(tools, use))]
    if not is_required:
        rule("type", f'" "? {tag(CONSTRAIN)} "json"')
        body = f"type? {tag(MESSAGE)} {writer.reference(body_of(constraint))}" if constraint else ""
        ends.append(f'{tag(CHANNEL)} "final" {body or tag(MESSAGE) + " TEXT"}')
    rule("start", f"{before} ({' | '.join(ends)})")
    return writer.grammar()


def _call(writer: GrammarWriter, tool: Tool, number: int) -> str:
    """A call: the models write its recipient after the role or after the channel."""
    to, tag = f" to=functions.{tool.name}", writer.tag
    type = f'(" json" | " "? {tag(CONSTRAIN)} "json")?'
    writer.rule(
        f"call_{number}",
        f'({literal(to)} {tag(CHANNEL)} "commentary" | {tag(CHANNEL)} {literal("commentary" + to)}) {type} '
        f"{tag(MESSAGE)} {writer.arguments(tool)}",
    )
    return f"call_{number}"
