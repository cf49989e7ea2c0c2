"""What the next token of a row may be: the phases of a reply whose form is given, and the masks of a whole batch.

A reply thinks first, if the model does: no more tokens than allowed, then the end of the thinking is forced, token by
token. After that each token is one that a matcher of llguidance allows, until an end token. A guide sees every token
of its row once, in their order; a row keeps it when it leaves a batch and comes back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import numpy as np
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray

from mlxgui_grpc.engine.constraints import explained_failure

Bits = NDArray[np.int32]
"""A bit for each token of the vocabulary, the first in the lowest bit of the first word."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """How a row thinks: between which tokens, and how long."""

    start: tuple[int, ...]
    end: tuple[int, ...]
    is_open: bool  # the prompt ends inside the thinking
    max_tokens: int | None  # between `start` and `end`; None, no limit


class Guide:
    """The state of one row's reply."""

    def __init__(
        self,
        end_tokens: frozenset[int],
        *,
        matcher: LLMatcher | None = None,
        field: str = "",
        mask_width: int = 0,
        thinking: Thinking | None = None,
    ) -> None:
        """`field` is what an error of the matcher is reported under, `mask_width` the tokens that it knows."""
        self._end_tokens = end_tokens
        self._matcher = matcher
        self._thinking = thinking
        self._phase: Literal["before", "thinking", "closing", "body", "ended"] = "body"
        self._thought: list[int] = []
        """The tokens of the thinking, or those that may begin its start."""
        self._matched_count = 0
        """Of the latter, those that the matcher has taken too: all of them, or it has no part in the start."""
        self.field = field
        self.mask_width = mask_width
        self.failure = ""
        """Why the row cannot go on, as a sentence; empty: it can."""
        if thinking:
            self._phase = "thinking" if thinking.is_open else "before"
            self._end_thinking_in_time(thinking)

    @property
    def is_idle(self) -> bool:
        """It has nothing to say any more, whatever comes."""
        return bool(self.failure) or self._phase == "ended" or (self._phase == "body" and not self._matcher)

    @property
    def matcher(self) -> LLMatcher | None:
        """The matcher whose mask is (a part of) the next token's."""
        is_due = self._phase == "body" or (
            self._phase == "before" and self._matched_count == len(self._thought)
        )
        return self._matcher if is_due and not self.failure else None

    @property
    def is_masking(self) -> bool:
        """Not every token may come next."""
        if self.is_idle:
            return False
        if self._phase == "before" and not self._matcher:
            assert self._thinking is not None
            return self._thinking.max_tokens == 0 and len(self._thought) == len(self._thinking.start) - 1
        return self._phase != "thinking" or self._matcher is not None

    def consume(self, token: int) -> None:
        """Take note of the row's next token."""
        if self.is_idle:
            return
        thinking = self._thinking
        if token in self._end_tokens and self._phase != "body":
            self._phase = "ended"
        elif self._phase == "body":
            self._match(token)
        elif thinking is None:
            raise AssertionError("only a row that thinks has other phases")
        elif self._phase == "before":
            self._look_for_start(thinking, token)
        else:
            self._thought.append(token)
            if self._phase == "closing":
                if self._closing_at(thinking) == 0:
                    self._phase = "body"
            elif tuple(self._thought[-len(thinking.end) :]) == thinking.end:
                self._phase = "body"
            else:
                self._end_thinking_in_time(thinking)

    def _match(self, token: int) -> None:
        assert self._matcher is not None, "without one a body is idle"
        if not self._matcher.consume_token(token):
            self.failure = explained_failure(self._matcher, self.field)
        elif token in self._end_tokens:
            self._phase = "ended"

    def _look_for_start(self, thinking: Thinking, token: int) -> None:
        self._thought.append(token)
        if self._matcher:
            if tuple(self._thought) != thinking.start[: len(self._thought)]:
                self._thought.clear()  # The grammar let it pass: the reply begins without thinking.
                self._phase = "body"
                self._match(token)
                return
            self._match_start(self._matcher, token)
        else:
            begun = _begun(self._thought, thinking.start)
            del self._thought[: len(self._thought) - begun]
        if len(self._thought) == len(thinking.start):
            self._thought.clear()
            self._phase = "thinking"
            if self._matcher:
                self._withdraw(self._matcher)
            self._end_thinking_in_time(thinking)

    def _match_start(self, matcher: LLMatcher, token: int) -> None:
        """Take note of a token of the thinking's start, which the grammar may begin with as well."""
        if self._matched_count < len(self._thought) - 1:
            return
        if matcher.validate_tokens([token]) and matcher.consume_token(token):
            self._matched_count += 1
        else:
            self._withdraw(matcher)

    def _withdraw(self, matcher: LLMatcher) -> None:
        """It was the start of the thinking that the matcher took: the grammar begins after it."""
        if self._matched_count and not matcher.rollback(self._matched_count):
            self.failure = explained_failure(matcher, self.field)
        self._matched_count = 0

    def _end_thinking_in_time(self, thinking: Thinking) -> None:
        if (
            self._phase == "thinking"
            and thinking.max_tokens is not None
            and len(self._thought) >= thinking.max_tokens
        ):
            self._phase = "closing"

    def _closing_at(self, thinking: Thinking) -> int:
        """How much of the end of the thinking is there: 0 when all of it is."""
        return _begun(self._thought, thinking.end) % len(thinking.end)

    def complete(self, bits: Bits) -> None:
        """Finish the row's mask: the matcher's, if `matcher` is one, else all ones."""
        thinking = self._thinking
        if (matcher := self.matcher) is not None and (matcher.is_error() or not bits.any()):
            self.failure = explained_failure(matcher, self.field)
            bits[:] = -1
        elif thinking is None or self._phase == "body":
            pass
        elif self._phase == "closing":
            _allow_only(bits, thinking.end[self._closing_at(thinking)])
        elif self._phase == "thinking":
            for token in self._end_tokens:  # A reply of a given form does not end before it.
                _forbid(bits, token)
        elif matcher is None and self._matcher:
            _allow_only(bits, thinking.start[len(self._thought)])
        elif thinking.max_tokens != 0:
            _allow(bits, thinking.start[len(self._thought)])
        elif len(self._thought) == len(thinking.start) - 1:
            _forbid(bits, thinking.start[-1])
            if not bits.any():
                self.failure = (
                    f"{self.field}: the reply could not be continued: sampling.max_thinking_tokens 0 forbids "
                    "the one token that may come, the start of the thinking"
                )
                bits[:] = -1


def _begun(tokens: list[int], tag: tuple[int, ...]) -> int:
    """The length of the longest end of `tokens` that begins `tag`, or is all of it."""
    sizes = range(min(len(tag), len(tokens)), 0, -1)
    return next((size for size in sizes if tuple(tokens[-size:]) == tag[:size]), 0)


def _allow(bits: Bits, token: int) -> None:
    bits.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)


def _forbid(bits: Bits, token: int) -> None:
    bits.view(np.uint32)[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)


def _allow_only(bits: Bits, token: int) -> None:
    bits[:] = 0
    _allow(bits, token)


class BatchGuide:
    """The guides of a batch's rows; made anew when a row joins or leaves. For the MLX thread."""

    _executor: LLExecutor | None = None

    def __init__(self, guides: Sequence[Guide | None]) -> None:
        self._row_count = len(guides)
        self._guides = [
            (index, guide) for index, guide in enumerate(guides) if guide is not None and not guide.is_idle
        ]

    def __bool__(self) -> bool:
        """False when there is nothing to do in this batch."""
        return bool(self._guides)

    def consume(self, tokens: Sequence[int]) -> None:
        """Take note of the next token of each row of the batch."""
        for index, guide in self._guides:
            guide.consume(tokens[index])
        self._guides = [(index, guide) for index, guide in self._guides if not guide.is_idle]

    def mask(self, width: int) -> mx.array | None:
        """Which of `width` tokens each row may draw next, (rows, width); None: any row any token."""
        masking = [(index, guide) for index, guide in self._guides if guide.is_masking]
        if not masking:
            return None
        # A tokenizer may have more tokens than the model draws from.
        words = -(-max(width, *(guide.mask_width for _, guide in masking)) // 32)
        bits: Bits = np.full((self._row_count, words), -1, dtype=np.int32)
        matchers = [(guide.matcher, index) for index, guide in masking if guide.matcher is not None]
        self._fill(matchers, bits)
        for index, guide in masking:
            guide.complete(bits[index])
        allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little", count=width)
        return mx.array(allowed.view(np.bool_))

    def _fill(self, matchers: list[tuple[LLMatcher, int]], bits: Bits) -> None:
        if len(matchers) == 1:
            fill_next_token_bitmask(matchers[0][0], bits, matchers[0][1])
        elif matchers:
            if BatchGuide._executor is None:
                BatchGuide._executor = LLExecutor()
            fill_next_token_bitmask_par(BatchGuide._executor, matchers, bits)
