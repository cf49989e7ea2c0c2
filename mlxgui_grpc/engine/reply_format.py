"""How one model marks thinking and tool calls in its replies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlxgui_grpc.reply_facts import HARMONY, is_harmony_template

ParseCalls = Callable[[str, list[dict[str, Any]]], Any]
"""mlx-lm's parser of one format: the text between the tags and the tools of the request, to one call or several."""


_OPENING_TOKENS = 64
"""Of the end of a prompt: more than any tag with the white space round it."""

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
HARMONY_TAGS = (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN)
"""The special tokens of gpt-oss's format, where a reply is several messages, each with a header."""


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    """The markup of a model's replies; what a model does not have is empty."""

    think_start: str = ""
    think_end: str = ""
    think_start_tokens: tuple[int, ...] = ()
    think_end_tokens: tuple[int, ...] = ()
    tool_format: str = ""
    """Name of mlx-lm's parser of tool calls; "harmony", which has none."""
    tool_call_start: str = ""
    tool_call_end: str = ""
    """Empty in a format whose calls last to the end of the reply."""
    parse_calls: ParseCalls | None = None
    frame_tags: tuple[str, ...] = ()
    """Tags round the visible text that say nothing else, and are left out."""
    special_tokens: frozenset[int] = frozenset()
    """Tokens that text leaves out."""
    markup_tokens: frozenset[int] = frozenset()
    """Special ones that are parts of the tags above."""
    end_tokens: frozenset[int] = frozenset()
    """That end a reply by what they mean, whether or not the checkpoint lists them."""

    @property
    def is_harmony(self) -> bool:
        """A reply is several messages, each with a header: there are no tags round thinking and calls."""
        return self.tool_format == HARMONY

    @property
    def can_think(self) -> bool:
        """It marks its thinking."""
        return self.is_harmony or bool(self.think_start)

    @property
    def can_call(self) -> bool:
        """Its way to call tools is known."""
        return self.is_harmony or bool(self.tool_call_start)

    def opening(self, tokenizer: Any, prompt: Sequence[int]) -> "Opening":
        """Where the reply to a prompt begins; `tokenizer` is a `tokenizers.Tokenizer`."""
        end = tokenizer.decode(prompt[-_OPENING_TOKENS:], skip_special_tokens=False).rstrip()
        if self.is_harmony:
            markup = START + end.rpartition(START)[2] if START in end else ""
            return Opening(may_think=MESSAGE not in markup, markup=markup)
        return Opening(
            starts_in_thinking=self.can_think and end.endswith(self.think_start),
            may_think=self.can_think and not end.endswith(self.think_end),
        )


@dataclass(frozen=True, slots=True)
class Opening:
    """Where the reply to one prompt begins."""

    starts_in_thinking: bool = False
    """The prompt ends inside the thinking, which it opened."""
    may_think: bool = False
    """The prompt did not close the thinking already."""
    markup: str = ""
    """What the prompt has of a first message in the harmony format."""


def reply_format_of(wrapper: Any) -> ReplyFormat:
    """What mlx-lm infers of a tokenizer, given its wrapper of it."""
    backend = wrapper._tokenizer.backend_tokenizer
    special = frozenset(token for token, added in backend.get_added_tokens_decoder().items() if added.special)
    template = wrapper._tokenizer.chat_template
    if not wrapper.tool_parser and isinstance(template, str) and is_harmony_template(template):
        ids_of = {tag: backend.token_to_id(tag) for tag in HARMONY_TAGS}
        if None not in ids_of.values():
            return ReplyFormat(
                tool_format=HARMONY,
                special_tokens=special,
                markup_tokens=frozenset(ids_of.values()),
                end_tokens=frozenset({ids_of[CALL], ids_of[RETURN]}),
            )

    def ids(text: str) -> Sequence[int]:
        found: Sequence[int] = wrapper._tokenizer.encode(text, add_special_tokens=False)
        return found

    think_start, think_end = wrapper.think_start or "", wrapper.think_end or ""
    tool_start, tool_end = wrapper.tool_call_start or "", wrapper.tool_call_end or ""
    frame_tags = tuple(wrapper.structural_markers)
    tags = [tag for tag in (think_start, think_end, tool_start, tool_end, *frame_tags) if tag]
    return ReplyFormat(
        think_start=think_start,
        think_end=think_end,
        think_start_tokens=tuple(wrapper.think_start_tokens or ()),
        think_end_tokens=tuple(wrapper.think_end_tokens or ()),
        tool_format=wrapper._tokenizer.init_kwargs.get("tool_parser_type") or "" if tool_start else "",
        tool_call_start=tool_start,
        tool_call_end=tool_end,
        parse_calls=wrapper.tool_parser,
        frame_tags=frame_tags,
        special_tokens=special,
        markup_tokens=special & {token for tag in tags for token in ids(tag)},
    )
