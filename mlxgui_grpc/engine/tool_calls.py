"""Reads one stretch of tool-call markup as it is written: the calls in it, or the text if there are none."""

import json
import secrets
from typing import Any, Literal, Protocol

from mlxgui_grpc.engine.detokenizer import overlap
from mlxgui_grpc.engine.frames import ToolCallPart
from mlxgui_grpc.engine.reading import is_json
from mlxgui_grpc.engine.reply_format import ParseCalls, ReplyFormat
from mlxgui_grpc.engine.tool_parsers import bounded_parser

_SPACE = " \t\n\r"
_NOT_ARGUMENTS = {"name", "id", "type"}
"""Keys of a call that has no arguments."""


class CallReader(Protocol):
    """The text between a start and an end tag. What it found so far is in its fields."""

    parts: list[ToolCallPart]
    """What is new; whoever takes them empties the list. Indices count from 0."""
    names: list[str]
    """Of the calls begun."""
    complete_count: int
    """Calls that nothing more will be added to."""
    unread: str
    """At the end: text that is part of no call."""
    odd_names: list[str]
    """At the end: of the complete calls whose arguments are not JSON."""

    @property
    def text(self) -> str:
        """All of it so far."""

    def feed(self, text: str) -> str | None:
        """Take the next text. None, while the end tag has not come; else what followed it."""

    def finish(self, *, is_cut: bool) -> None:
        """No more will come; `is_cut`, for the limit of tokens and not because the model was done."""


def call_reader(reply_format: ReplyFormat, tools: list[dict[str, Any]]) -> CallReader:
    """The reader for a model's format."""
    reader = JsonCall if reply_format.tool_format == "json_tools" else WholeCalls
    return reader(reply_format.tool_call_end, bounded_parser(reply_format), tools)


def new_call_id() -> str:
    """As OpenAI's: unguessable, and so the same in no two replies."""
    return f"call_{secrets.token_hex(12)}"


class WholeCalls:
    """Calls that mlx-lm's parser of the format reads when they are complete."""

    def __init__(self, end_tag: str, parse: ParseCalls, tools: list[dict[str, Any]]) -> None:
        self.parts: list[ToolCallPart] = []
        self.names: list[str] = []
        self.complete_count = 0
        self.unread = ""
        self.odd_names: list[str] = []
        self._end_tag = end_tag
        self._parse = parse
        self._tools = tools
        self._text = ""

    @property
    def text(self) -> str:
        return self._text

    def feed(self, text: str) -> str | None:
        start = max(0, len(self._text) - len(self._end_tag))
        self._text += text
        if not self._end_tag or (at := self._text.find(self._end_tag, start)) < 0:
            return None
        rest = self._text[at + len(self._end_tag) :]
        self._text = self._text[:at]
        self._read()
        return rest

    def finish(self, *, is_cut: bool) -> None:
        # A tolerant parser would make a call of half of one; without an end tag, it has to be a strict one.
        if is_cut and self._end_tag:
            self.unread = self._text
        else:
            if self._end_tag:
                self._text = self._text[: len(self._text) - overlap(self._text, self._end_tag)]
            self._read()

    def _read(self) -> None:
        try:
            parsed = self._parse(self._text, self._tools)
            calls = [
                (_name(call), _arguments(call)) for call in (parsed if isinstance(parsed, list) else [parsed])
            ]
        except Exception:  # The parsers raise whatever the text makes them raise.
            calls = []
        if not calls:
            self.unread = self._text
        for index, (name, arguments) in enumerate(calls):
            self.parts.append(ToolCallPart(index, new_call_id(), name))
            self.parts.append(ToolCallPart(index, arguments=arguments))
            self.names.append(name)
            if not is_json(arguments):
                self.odd_names.append(name)
        self.complete_count = len(calls)


def _name(call: Any) -> str:
    name = call["name"]
    if not isinstance(name, str) or not name:
        raise ValueError("a call without a name")
    return name


def _arguments(call: Any) -> str:
    arguments = call.get("arguments", call.get("parameters"))
    if arguments is None:
        if not call.keys() <= _NOT_ARGUMENTS:
            raise ValueError("a call whose arguments are not known by their name")
        arguments = {}
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    text.encode()  # Half of a surrogate pair is no text.
    return text


class JsonCall:
    """One call as a JSON object with `name` and `arguments`, whose arguments are passed on as they are written.

    `parameters`, as Llama 3 calls them, are the arguments when no others came. What is no such object is read to its
    end and left to mlx-lm's parser, as a list of calls is.
    """

    def __init__(self, end_tag: str, parse: ParseCalls, tools: list[dict[str, Any]]) -> None:
        self.parts: list[ToolCallPart] = []
        self.names: list[str] = []
        self.complete_count = 0
        self.unread = ""
        self.odd_names: list[str] = []
        self._end_tag = end_tag
        self._whole = WholeCalls(end_tag, parse, tools)
        self._text = ""
        self._at = 0  # Up to here `_text` is read.
        self._state: Literal["open", "key", "colon", "value", "comma", "closed", "strange"] = "open"
        self._key = ""
        self._keys: set[str] = set()
        self._parameters: str | None = None
        self._start = -1  # Of the key or the value at hand; -1, before its first character.
        self._depth = 0  # Inside the value at hand.
        self._is_in_string = False
        self._is_escaped = False
        self._name = ""
        self._arguments: str | None = (
            None  # Known but not sent, for want of a name or because they are in quotes.
        )
        self._sent_to = -1  # Up to here the arguments are sent.

    @property
    def text(self) -> str:
        return self._text

    def feed(self, text: str) -> str | None:
        if self._state == "strange" and not self.names:
            return self._read_whole(text)
        self._text += text
        while self._at < len(self._text):
            character = self._text[self._at]
            if not self._is_in_string and self._end_tag.startswith(character):
                if self._text.startswith(self._end_tag, self._at):
                    rest = self._text[self._at + len(self._end_tag) :]
                    self._text = self._text[: self._at]
                    self._close()
                    return rest
                if self._end_tag.startswith(self._text[self._at :]):
                    break
            self._step(character)
            if self._state == "strange" and not self.names:
                text, self._text = self._text, ""
                return self._read_whole(text)
            self._at += 1
        self._send()
        return None

    def finish(self, *, is_cut: bool) -> None:
        if self._state == "strange" and not self.names:
            self._whole.finish(is_cut=is_cut)
            self._take_whole()
            return
        if not self._is_in_string:
            self._text = self._text[: len(self._text) - overlap(self._text, self._end_tag)]
        self._close()

    def _step(self, character: str) -> None:
        """Read the character at `_at`."""
        if self._is_in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._is_in_string = False
                if self._state == "key":
                    self._end_key()
            return
        if character in _SPACE or self._state in ("closed", "strange"):
            return
        state = self._state
        if state == "open" and character == "{":
            self._state, self._start = "key", -1
        elif state == "key" and character == '"':
            self._start, self._is_in_string = self._at, True
        elif state == "colon" and character == ":":
            self._state, self._start = "value", -1
        elif state == "value" and self._depth == 0 and self._start >= 0 and character in ",}":
            self._end_value()
            self._state, self._start = ("key", -1) if character == "," else ("closed", self._at + 1)
        elif state == "value" and not (self._start < 0 and character in ",}]:"):
            if self._start < 0:
                self._start = self._at
                if self._key == "arguments" and self._name and self._arguments is None and character != '"':
                    self._begin()
            if character == '"':
                self._is_in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
        elif state == "key" and character == "}" and self._start < 0:
            self._state, self._start = "closed", self._at + 1
        else:
            self._state, self._start = "strange", self._at

    def _end_key(self) -> None:
        key = _string(self._text[self._start : self._at + 1])
        if key is None:
            self._state, self._start = "strange", self._start
        else:
            self._key, self._state = key, "colon"
            self._keys.add(key)

    def _end_value(self) -> None:
        raw = self._text[self._start : self._at].rstrip(_SPACE)
        if self._key == "name" and not self._name:
            self._name = _string(raw) or ""
        elif self._key == "parameters":
            self._parameters = _string(raw) if raw.startswith('"') else raw
        elif self._key == "arguments" and self._arguments is None:
            self._send()
            self._arguments = _string(raw) if raw.startswith('"') else raw
            if self._sent_to >= 0:
                self._sent_to = -2  # All of them are.
        if self._name and self._arguments is not None and not self.names:
            self._begin()
            self.parts.append(ToolCallPart(0, arguments=self._arguments))

    def _begin(self) -> None:
        self.names.append(self._name)
        self.parts.append(ToolCallPart(0, new_call_id(), self._name))
        if self._state == "value" and self._arguments is None:
            self._sent_to = self._start

    def _send(self) -> None:
        """Pass on what is new of the arguments, short of white space that may be after them."""
        if self._sent_to < 0 or self._state != "value" or self._key != "arguments":
            return
        new = self._text[self._sent_to : self._at]
        if not self._is_in_string:
            new = new.rstrip(_SPACE)
        if new:
            self.parts.append(ToolCallPart(0, arguments=new))
            self._sent_to += len(new)

    def _close(self) -> None:
        """The end tag came, or the end of the reply."""
        if self._state == "closed" and not self.names and self._name:
            if self._keys <= _NOT_ARGUMENTS:
                self._parameters = "{}"
            if self._parameters is not None and "arguments" not in self._keys:
                self._arguments = self._parameters
                self._begin()
                self.parts.append(ToolCallPart(0, arguments=self._arguments))
        if not self.names:
            self.unread = self._text
            return
        self._at = len(self._text)
        self._send()
        if self._state in ("closed", "strange"):
            self.complete_count = 1
            self.unread = self._text[self._start :].strip()
        elif not self._is_in_string and self._depth == 0:
            self.complete_count = 1  # Only the brace round it all is missing.
        raw = self._arguments if self._arguments is not None else self._text[self._start :]
        if self.complete_count and not is_json(raw):
            self.odd_names = self.names

    def _read_whole(self, text: str) -> str | None:
        rest = self._whole.feed(text)
        self._text = self._whole.text
        if rest is not None:
            self._take_whole()
        return rest

    def _take_whole(self) -> None:
        self.parts, self.names = self._whole.parts, self._whole.names
        self.complete_count, self.unread = self._whole.complete_count, self._whole.unread
        self.odd_names = self._whole.odd_names


def _string(raw: str) -> str | None:
    """What a JSON string says; None for what is none."""
    try:
        value = json.loads(raw)
        if isinstance(value, str):
            value.encode()
            return value
    except ValueError:
        pass
    return None
