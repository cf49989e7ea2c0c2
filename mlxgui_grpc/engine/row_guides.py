"""Decides what guides the rows of a request: its constraint, its tools, its budget of thinking."""

from dataclasses import dataclass

from llguidance import LLMatcher

from mlxgui_grpc.engine.constraints import MAX_TOOLS_BYTES, Grammars, refuse_long
from mlxgui_grpc.engine.frames import Submit
from mlxgui_grpc.engine.guide import Guide, Thinking
from mlxgui_grpc.engine.harmony_grammar import harmony_grammar
from mlxgui_grpc.engine.reply_format import Opening, ReplyFormat
from mlxgui_grpc.engine.tool_grammars import needs_grammar, tool_grammar, tools_of
from mlxgui_grpc.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class GuideMaker:
    """What the guides of one model need. Its calls are safe from several threads."""

    grammars: Grammars
    reply_format: ReplyFormat
    end_tokens: frozenset[int]

    def is_slow(self, submit: Submit) -> bool:
        """Whether `make` may have to compile a grammar for it."""
        use, sampling = submit.tool_use, submit.sampling
        if self.reply_format.is_harmony and sampling.max_thinking_tokens is not None:
            return True
        return sampling.constraint is not None or (
            use is not None and (use.is_required or bool(use.function) or b'"strict"' in submit.prompt.tools)
        )

    def make(self, submit: Submit, opening: Opening) -> list[Guide | None]:
        """A guide for each row, None where every token may come; raises InvalidRequestError naming the field."""
        thinking = self._thinking(submit, opening)
        matchers, field = self._matchers(submit, opening)
        if not matchers and (thinking is None or thinking.max_tokens is None):
            return [None] * len(submit.keys)
        return [
            Guide(
                self.end_tokens,
                matcher=matchers[index] if matchers else None,
                field=field,
                mask_width=self.grammars.width,
                thinking=thinking,
            )
            for index in range(len(submit.keys))
        ]

    def warnings(self, submit: Submit) -> list[str]:
        """What of the request guides nothing, as sentences."""
        if submit.sampling.max_thinking_tokens is None:
            return []
        if not submit.prompt.messages:
            return [
                "max_thinking_tokens has no effect: a completion is raw text, thinking included; use a chat"
            ]
        if not self.reply_format.can_think:
            return ["max_thinking_tokens has no effect: this model does not mark its thinking"]
        return []

    def _thinking(self, submit: Submit, opening: Opening) -> Thinking | None:
        shape = self.reply_format
        # Raw text is continued as it is; so is a template that has closed the thinking.
        if not submit.prompt.messages or not shape.think_start or not opening.may_think:
            return None
        budget = submit.sampling.max_thinking_tokens
        return Thinking(shape.think_start_tokens, shape.think_end_tokens, opening.starts_in_thinking, budget)

    def _matchers(self, submit: Submit, opening: Opening) -> tuple[list[LLMatcher], str]:
        """One for each row, or none at all; and the field that asks for them."""
        constraint, use = submit.sampling.constraint, submit.tool_use
        tools = tools_of(submit.prompt.tools) if use is not None else []
        is_enforced = use is not None and bool(tools) and needs_grammar(tools, use)
        shape, budget = self.reply_format, submit.sampling.max_thinking_tokens
        # Raw text is continued as it is; so is a message that a template has begun.
        is_whole = shape.is_harmony and opening.may_think and bool(submit.prompt.messages)
        if is_whole and (constraint or is_enforced or budget is not None):
            field = "sampling.max_thinking_tokens"
        elif use is not None and (is_enforced or (constraint and tools and shape.can_call)):
            field = "tools"
        elif constraint is not None:
            return [self.grammars.matcher(constraint) for _ in submit.keys], f"sampling.{constraint.kind}"
        else:
            return [], ""
        if tools:
            refuse_long(submit.prompt.tools, "tools", MAX_TOOLS_BYTES)
        if is_enforced:
            field = "tool_choice" if use and (use.is_required or use.function) else "tools"
        elif constraint:
            field = "tools" if tools else f"sampling.{constraint.kind}"
        tokenizer = self.grammars.tokenizer(field)
        if constraint:  # By itself, so that its errors bear its name.
            self.grammars.matcher(constraint)
        if is_whole or use is None:
            grammar = harmony_grammar(tools, use, shape, tokenizer, constraint, budget)
        else:
            grammar = tool_grammar(tools, use, shape, tokenizer, constraint)
        try:
            return [self.grammars.matcher_of(grammar, field) for _ in submit.keys], field
        except InvalidRequestError:
            for tool in tools:  # Whose schema is it?
                self.grammars.check_schema(tool.schema, tool.field, is_strict=tool.is_strict)
            raise
