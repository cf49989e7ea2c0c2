"""Splits, as it is decoded, a reply in gpt-oss's format: messages, each with a header that says what it is.

    <|start|>assistant to=functions.NAME<|channel|>commentary <|constrain|>json<|message|>{…}<|call|>

The channel is analysis (thinking), commentary (calls, which have a recipient, and what is said before them) or final
(the answer). The prompt ends after the role of the first message. The models do leave out or repeat parts of headers:
what has no place in one is text, or is said to have been left out.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from mlxgui_grpc.engine.detokenizer import StopMatcher, overlap
from mlxgui_grpc.engine.frames import ToolCallPart
from mlxgui_grpc.engine.reading import Reading, is_json, quoted
from mlxgui_grpc.engine.reply_format import (
    CHANNEL,
    CONSTRAIN,
    HARMONY_TAGS,
    MESSAGE,
    START,
    Opening,
    ReplyFormat,
)
from mlxgui_grpc.engine.tool_calls import new_call_id

_LONGEST_TAG = max(map(len, HARMONY_TAGS))
_MAX_HEADER = 512
"""Characters; more of them are no header, but a message that lacks the tag before it."""
_CHANNELS = ("analysis", "commentary", "final")
_NO_TOOLS = ("assistant", "user", "all")
"""Recipients that are no tools."""
_RECIPIENT = re.compile(r"\bto=([^\s<]*)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(analysis|commentary|final)\b")
_ROLE = re.compile(r"<\|start\|>\s*(assistant|(?!assistant)[\w.-]*)")
_SAID = re.compile(
    rf"{_ROLE.pattern}|{_CHANNEL.pattern}|<\|channel\|>|<\|constrain\|>\s*\w*|{_RECIPIENT.pattern}"
    r"|\b(json|code)\s*$"
)
"""What says something in a header; the type of the content stands there with or without its tag."""
_BEGUN = re.compile(r"\s*(t|to|to=\S*\s*)?")
_BEGUN_WITH_ROLE = re.compile(_ROLE.pattern + r"(\s+(t|to|to=\S*\s*)?)?")
"""What may stand, complete or not, before the channel; else it is text of a message without a header."""


@dataclass(frozen=True, slots=True)
class _Header:
    """What a header says."""

    role: str
    channel: str
    recipient: str
    rest: str
    """What says nothing."""

    @property
    def is_by_assistant(self) -> bool:
        return self.role in ("", "assistant")

    @property
    def is_call(self) -> bool:
        return self.is_by_assistant and self.recipient not in ("", *_NO_TOOLS)


def _parsed(header: str) -> _Header:
    role, channel, recipient = _ROLE.match(header), _CHANNEL.search(header), _RECIPIENT.search(header)
    name = channel[1] if channel else ""
    rest = _SAID.sub("", header).lstrip()
    if not name and CHANNEL in header and len(rest.split()) == 1:
        name, rest = rest.strip(), ""
    return _Header(role[1] if role else "", name, recipient[1] if recipient else "", rest)


class HarmonyReader:
    """One row's reply. However it is cut into pieces, what was found joins to the same.

    Tags and headers are never in what it returns. Messages of one kind have an empty line between them. Stop strings
    are looked for in the visible text and in the reasoning, in each on its own, not in the arguments of calls.
    """

    def __init__(
        self,
        reply_format: ReplyFormat,
        opening: Opening,
        *,
        tools: list[dict[str, Any]] | None = None,
        is_parallel: bool = True,
        is_constrained: bool = False,
        stop: tuple[str, ...] = (),
    ) -> None:
        """`tools` are the request's; None: a call is text. `is_constrained`: the final message follows a grammar, and
        alone is visible."""
        self.stop_match = ""
        self.is_done = False
        self.call_count = 0
        self._format = reply_format
        self._tools = tools
        self._tool_names = frozenset(tool["function"]["name"] for tool in tools or ())
        self._is_parallel = is_parallel
        self._is_constrained = is_constrained
        self._stops = {"text": StopMatcher(stop), "reasoning": StopMatcher(stop)}
        self._state: Literal["header", "text", "reasoning", "call"] = "header"
        self._held = ""  # May begin a tag.
        self._header = ""  # With its tags.
        self._is_verbatim = False  # What looks like a tag is none.
        self._shown: set[str] = set()  # Kinds of which something was passed on.
        self._has_gap = (
            False  # The message at hand follows another of its kind, and nothing of it is passed on.
        )
        self._name = ""  # Of the call at hand.
        self._arguments = ""
        self._warned_names: set[str] = set()
        self._new = Reading()
        if opening.markup != START + "assistant":  # As it is unless a template is odd.
            self.feed(opening.markup)
            self._new = Reading()

    @property
    def is_in_reasoning(self) -> bool:
        """The model is thinking."""
        return self._state == "reasoning"

    def hides(self, token: int) -> bool:
        """Whether it is a special token that says nothing in this format."""
        return token in self._format.special_tokens and token not in self._format.markup_tokens

    def take(self) -> Reading:
        """What is new."""
        new, self._new = self._new, Reading()
        return new

    def feed(self, text: str) -> None:
        """Take the next text of the reply."""
        self._held += text
        while not self.stop_match and not self.is_done:
            if self._is_verbatim:
                text, self._held = self._held, ""
                self._pass_on(text)
                return
            at, tag = min(
                ((at, tag) for tag in HARMONY_TAGS if (at := self._held.find(tag)) >= 0), default=(-1, "")
            )
            if at < 0:
                may_begin = "<" in self._held[-_LONGEST_TAG:]
                keep = max(overlap(self._held, tag) for tag in HARMONY_TAGS) if may_begin else 0
                at = len(self._held) - keep
            text, self._held = self._held[:at], self._held[at + len(tag) :]
            self._pass_on(text)
            if not tag:
                return
            if not self.stop_match:
                self._read_tag(tag)

    def finish(self, *, is_cut: bool) -> None:
        """The reply is over; `is_cut`: it reached its limit of tokens."""
        if self.stop_match or self.is_done:
            return
        held, self._held = self._held, ""
        self._pass_on(held)
        if self._state == "header":
            self._release_stray()
        if self._state == "header":
            self._drop_header(is_cut=is_cut)
        self._end_message(is_over=True, is_cut=is_cut)

    def _pass_on(self, text: str) -> None:
        """Text without a tag."""
        at = 0
        while at < len(text) and self._state == "header":
            self._header += text[at]
            at += 1
            if not self._is_header_so_far():
                self._release()
        text = text[at:]
        if not text:
            return
        if self._state == "call":
            self._add_arguments(text)
        elif self._state != "header":
            text, self.stop_match = self._stops[self._state].add(text)
            self._show(text)

    def _show(self, text: str) -> None:
        """Text that no stop string begins in."""
        if not text:
            return
        gap = "\n\n" if self._has_gap else ""
        self._has_gap = False
        self._shown.add(self._state)
        if self._state == "reasoning":
            self._new.reasoning += gap + text
        else:
            self._new.text += gap + text

    # Headers.

    def _read_tag(self, tag: str) -> None:
        if self._state == "header":
            self._release_stray()
        if self._state != "header":
            if tag in (MESSAGE, CONSTRAIN):  # Where no header is they say nothing.
                return
            self._end_message(is_over=False, is_cut=False)
            self._header = tag if tag in (START, CHANNEL) else ""
        elif tag == MESSAGE:
            header, self._header = _parsed(self._header), ""
            if rest := header.rest.strip():
                self._warn(f"part of a message's header was left out: {quoted(rest)}")
            self._open(header)
        elif tag in (CHANNEL, CONSTRAIN):
            self._header += tag
        else:
            self._drop_header(is_cut=tag == START)
            self._end_message(is_over=False, is_cut=False)
            self._header = tag if tag == START else ""

    def _is_header_so_far(self) -> bool:
        header = self._header
        if len(header) > _MAX_HEADER:
            return False
        begun = _BEGUN_WITH_ROLE if header.startswith(START) else _BEGUN
        return CHANNEL in header or CONSTRAIN in header or bool(begun.fullmatch(header))

    def _release_stray(self) -> None:
        """Text alone, though it began like a header, is none."""
        header = self._header
        if header.strip() and not header.startswith((START, CHANNEL)) and not _RECIPIENT.search(header):
            self._release()

    def _release(self) -> None:
        """What looked like a header is a message that has none, or lacks the tag between them."""
        header, self._header = self._header, ""
        parsed = _parsed(header)
        self._open(parsed)
        self._pass_on(parsed.rest if START in header or CHANNEL in header else header)

    def _drop_header(self, *, is_cut: bool) -> None:
        """No message follows."""
        header, self._header = _parsed(self._header), ""
        rest = header.rest.strip()
        if header.is_call and not is_cut:
            self._open(header)  # A call without arguments.
        elif is_cut and any(word.startswith(rest or header.channel) for word in (*_CHANNELS, "json", "to=")):
            pass  # Of which there was to be more.
        elif rest:
            self._warn(f"a message without a header is part of the text: {quoted(rest)}")
            self._open(_parsed(""))
            self._pass_on(header.rest)
        elif header.channel not in ("", *_CHANNELS):
            self._warn(f"a header without a message was left out: {quoted(header.channel)}")

    def _open(self, header: _Header) -> None:
        """Begin the message of this header."""
        self._state = "text"
        if header.is_call:
            name = header.recipient.removeprefix("functions.")
            if self._tools is not None:
                self._begin_call(name)
                return
            self._warn(
                f"the model calls '{quoted(name)}' and may call no tools: the call is part of the text"
            )
        elif not header.is_by_assistant:
            self._warn(f"a message of '{quoted(header.role)}', by the model, is part of the text")
        elif header.channel == "analysis" or (header.channel == "commentary" and self._is_constrained):
            self._state = "reasoning"
        elif header.channel not in ("", *_CHANNELS):
            self._warn(
                f"a message of the channel '{quoted(header.channel)}', which is not known, is part of the text"
            )
        self._has_gap = self._state in self._shown
        self._is_verbatim = self._is_constrained and header.channel == "final"

    def _end_message(self, *, is_over: bool, is_cut: bool) -> None:
        state, arguments = self._state, self._arguments.strip()
        if state in ("text", "reasoning"):
            self._show(self._stops[state].flush())
        if state == "call":
            self.call_count += 1
            if not arguments:
                if not is_cut:
                    self._new.calls.append(ToolCallPart(self.call_count - 1, arguments="{}"))
            elif not is_cut and not is_json(arguments):
                self._warn(f"the arguments of the call of '{quoted(self._name)}' are not JSON")
            self._arguments = ""
            if not self._is_parallel and not is_over:
                self.is_done = True
        self._state = "header"
        self._has_gap = False

    # Calls.

    def _begin_call(self, name: str) -> None:
        self._state, self._name, self._arguments = "call", name, ""
        if name not in self._tool_names and name not in self._warned_names:
            self._warned_names.add(name)
            self._warn(f"the model calls '{quoted(name)}', which is none of the request's tools")
        self._new.calls.append(ToolCallPart(self.call_count, new_call_id(), name))

    def _add_arguments(self, text: str) -> None:
        """Pass on what is new of them, short of white space that may be after them."""
        before = len(self._arguments.rstrip())
        self._arguments = (self._arguments + text).lstrip()
        new = self._arguments[before:].rstrip()
        if new:
            self._new.calls.append(ToolCallPart(self.call_count, arguments=new))

    def _warn(self, warning: str) -> None:
        self._new.warnings.append(warning)
