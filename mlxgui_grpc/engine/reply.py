"""Splits a chat reply, as it is decoded, into reasoning, visible text and tool calls."""

import json
from typing import Any, Literal

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.detokenizer import StopMatcher, overlap
from mlxgui_grpc.engine.harmony import HarmonyReader
from mlxgui_grpc.engine.reading import Reader, Reading, quoted
from mlxgui_grpc.engine.reply_format import Opening, ReplyFormat
from mlxgui_grpc.engine.tool_calls import CallReader, call_reader


def make_reader(
    reply_format: ReplyFormat,
    opening: Opening,
    prompt: frames.Prompt,
    sampling: frames.Sampling,
    tool_use: frames.ToolUse | None,
) -> Reader | None:
    """The reader for one row; None for a completion, which is text as it comes."""
    if not prompt.messages:
        return None
    tools = json.loads(prompt.tools) if prompt.tools and tool_use is not None else None
    if reply_format.is_harmony:
        return HarmonyReader(
            reply_format,
            opening,
            tools=tools,
            is_parallel=tool_use is None or tool_use.is_parallel,
            is_constrained=sampling.constraint is not None,
            stop=sampling.stop,
        )
    return ReplyReader(
        reply_format,
        starts_in_thinking=opening.starts_in_thinking,
        tools=tools,
        is_parallel=tool_use is None or tool_use.is_parallel,
        is_constrained=sampling.constraint is not None,
        stop=sampling.stop,
    )


class ReplyReader:
    """One row's reply. However it is cut into pieces, what was found joins to the same.

    Tags are never in what it returns: the end of a piece that may begin one is held back. Stop strings are looked for
    in the visible text and in the reasoning, in each on its own, not in the arguments of calls. White space next to
    a tag is layout and left out, but for what ends a text before a call.
    """

    def __init__(
        self,
        reply_format: ReplyFormat,
        *,
        starts_in_thinking: bool = False,
        tools: list[dict[str, Any]] | None = None,
        is_parallel: bool = True,
        is_constrained: bool = False,
        stop: tuple[str, ...] = (),
    ) -> None:
        """`tools` are the request's; None: what looks like a call is text. `is_constrained`: the visible text follows
        a grammar, and once it has begun what looks like markup in it is none."""
        self.stop_match = ""
        """The stop string that was found; nothing after it counts."""
        self.is_done = False
        """The reply ends here, though the model may not know."""
        self.call_count = 0
        self._format = reply_format
        self._tools = tools
        self._tool_names = frozenset(tool["function"]["name"] for tool in tools or ())
        self._can_call = tools is not None and reply_format.can_call
        self._is_parallel = is_parallel
        self._is_constrained = is_constrained
        self._state: Literal["text", "reasoning", "call"] = "reasoning" if starts_in_thinking else "text"
        self._held = ""  # May begin a tag.
        self._stops = {"text": StopMatcher(stop), "reasoning": StopMatcher(stop)}
        self._is_after_tag = starts_in_thinking
        self._layout = ""  # White space that the visible text begins with, or that may end the reasoning.
        self._has_begun = False  # The visible text, though all of it may be held back still.
        self._has_text = False  # Some of it is passed on.
        self._call: CallReader | None = None
        self._call_origin: Literal["text", "reasoning"] = "text"
        self._warned_names: set[str] = set()
        self._new = Reading()
        if tools is not None and not reply_format.can_call:
            self._warn(
                "how this model calls tools is not known: calls stay in the text, as the model writes them"
            )

    @property
    def is_in_reasoning(self) -> bool:
        """The model is thinking."""
        return self._state == "reasoning"

    def hides(self, token: int) -> bool:
        """Whether it is a special token that is no part of the text: inside a call they may be its markup."""
        return (
            self._state != "call"
            and token in self._format.special_tokens
            and token not in self._format.markup_tokens
        )

    def take(self) -> Reading:
        """What is new."""
        new, self._new = self._new, Reading()
        return new

    def feed(self, text: str) -> None:
        """Take the next text of the reply."""
        self._held += text
        while not self.stop_match and not self.is_done:
            if self._call is not None:
                if not self._feed_call(self._call):
                    return
                continue
            tags = self._tags()
            at, negative_length = min(
                ((at, -len(tag)) for tag in tags if (at := self._held.find(tag)) >= 0), default=(-1, 0)
            )
            if at < 0:
                keep = max((overlap(self._held, tag) for tag in tags), default=0)
                visible, self._held = (
                    self._held[: len(self._held) - keep],
                    self._held[len(self._held) - keep :],
                )
                self._pass_on(visible)
                return
            tag = self._held[at : at - negative_length]
            visible, rest = self._held[:at], self._held[at + len(tag) :]
            self._held = ""
            self._pass_on(visible)
            if self._is_constrained and self._has_begun:  # It began just before the tag, which so is none.
                self._pass_on(tag + rest)
                return
            if not self.stop_match:
                self._held = rest
                self._enter(tag)

    def finish(self, *, is_cut: bool) -> None:
        """The reply is over; `is_cut`: it reached its limit of tokens."""
        if self.stop_match or self.is_done:
            return
        if self._call is not None:
            call, self._call = self._call, None
            call.feed(self._held)
            call.finish(is_cut=is_cut)
            self._take_parts(call)
            self._end_call(call, is_over=True, is_cut=is_cut)
        else:
            held, self._held = self._held, ""
            self._pass_on(held)
        if not self.stop_match:
            self._end_stretch()
            if self._state == "text" and not self._is_after_tag and not self._has_text:
                self._new.text += self._layout

    def _tags(self) -> list[str]:
        """What to look for where the reply is now."""
        if self._is_constrained and self._has_begun and self._state == "text":
            return []
        reply_format = self._format
        tags = [reply_format.think_end] if reply_format.can_think else []
        if self._can_call:
            tags.append(reply_format.tool_call_start)
        if self._state == "text":
            if reply_format.can_think:
                tags.append(reply_format.think_start)
            tags += reply_format.frame_tags
        return tags

    def _enter(self, tag: str) -> None:
        state = self._state
        self._end_stretch()
        self._is_after_tag = True
        if tag != self._format.tool_call_start or state == "text":
            self._layout = ""  # The thinking may go on after a call.
        if tag == self._format.think_start:
            self._state = "reasoning"
        elif tag == self._format.think_end:
            if state == "text":
                self._warn(f"a {tag} that closed no thinking was left out of the text")
            self._state = "text"
        elif tag == self._format.tool_call_start:
            self._call_origin = "reasoning" if state == "reasoning" else "text"
            self._state = "call"
            self._call = call_reader(self._format, self._tools or [])

    # Text and reasoning.

    def _pass_on(self, text: str) -> None:
        """Text of the stretch at hand that holds no tag."""
        if self._is_after_tag:
            text = text.lstrip()
        if not text:
            return
        self._is_after_tag = False
        if self._state == "text" and not text.isspace():
            self._has_begun = True
        text, self.stop_match = self._stops[self._state].add(text)
        self._show(text)

    def _show(self, text: str) -> None:
        """Text that no stop string begins in."""
        text = self._layout + text
        if self._state == "reasoning":
            shown = text.rstrip()
            self._layout = text[len(shown) :]
            self._new.reasoning += shown
        elif self._has_text or not text.isspace():
            self._layout = ""
            self._has_text = self._has_text or bool(text)
            self._new.text += text
        else:
            self._layout = text

    def _end_stretch(self) -> None:
        """What was held back for a stop string is none."""
        if self._state != "call":
            self._show(self._stops[self._state].flush())

    # Calls.

    def _feed_call(self, call: CallReader) -> bool:
        """Whether the call has ended."""
        text, self._held = self._held, ""
        after = ""
        if self._call_origin == "reasoning" and not call.names:
            # Until it has a name it may be a thought about tools, which the end of the thinking ends.
            text, after, self._held = self._cut_at_think_end(call.text, text)
        rest = call.feed(text)
        self._take_parts(call)
        if rest is not None:
            self._call = None
            self._held = rest + after + self._held
            self._end_call(call, is_over=False, is_cut=False)
            return True
        if after and not call.names:
            self._call = None
            self._state, self._is_after_tag, self._layout = "reasoning", False, ""
            self._held = call.text + after
            self._warn_unread(call.text)
            return True
        if after:
            self._held = after
            return self._feed_call(call)
        return False

    def _cut_at_think_end(self, before: str, text: str) -> tuple[str, str, str]:
        """(what comes before the tag, the tag and what follows it, what may begin the tag) of `text`."""
        tag = self._format.think_end
        at = (before + text).find(tag)
        if at >= 0:
            at = max(0, at - len(before))
            return text[:at], text[at:], ""
        keep = min(overlap(text, tag), len(text))
        return text[: len(text) - keep], "", text[len(text) - keep :]

    def _take_parts(self, call: CallReader) -> None:
        for part in call.parts:
            if not self._is_parallel and self.call_count + part.index > 0:
                continue
            self._new.calls.append(
                frames.ToolCallPart(self.call_count + part.index, part.id, part.name, part.arguments)
            )
        call.parts.clear()
        for name in call.names:
            if name not in self._tool_names and name not in self._warned_names:
                self._warned_names.add(name)
                self._warn(f"the model calls '{quoted(name)}', which is none of the request's tools")

    def _end_call(self, call: CallReader, *, is_over: bool, is_cut: bool) -> None:
        self._state, self._is_after_tag = self._call_origin, True
        count = len(call.names)
        if not self._is_parallel and self.call_count + count > 1:
            self._warn(
                "the model wrote several calls at once: parallel_tool_calls lets only the first through"
            )
            count = 1 - self.call_count
        self.call_count += count
        if call.names and call.complete_count < len(call.names) and not is_cut:
            self._warn(f"the arguments of the call of '{quoted(call.names[-1])}' are not complete")
        for name in call.odd_names:
            self._warn(f"the arguments of the call of '{quoted(name)}' are not JSON")
        if (unread := call.unread) and is_cut and not call.names and self._call_origin == "text":
            self._warn(
                f"a tool call that the limit of tokens cut was left out, {len(unread)} characters of it: "
                + quoted(unread.strip())
            )
        elif unread:
            self._warn_unread(unread)
            if self._call_origin == "reasoning" and not call.names:
                self._is_after_tag, self._layout = False, ""
            self._pass_on(unread)
        if not self._is_parallel and call.complete_count and not is_over:
            self.is_done = True

    def _warn_unread(self, text: str) -> None:
        self._warn(f"a tool call could not be read and is part of the text: {quoted(text.strip())}")

    def _warn(self, warning: str) -> None:
        self._new.warnings.append(warning)
