"""Guides of rows whose thinking has tags of several tokens: what may come next, token by token."""

from typing import Any

import numpy as np
import pytest

from mlxgui_grpc.engine.backends.text import Tokens, load_tokens
from mlxgui_grpc.engine.constraints import Grammars
from mlxgui_grpc.engine.frames import Constraint, Prompt, Sampling, Submit
from mlxgui_grpc.engine.guide import BatchGuide, Guide, Thinking
from mlxgui_grpc.engine.reply_format import ReplyFormat
from mlxgui_grpc.engine.row_guides import GuideMaker
from tests.support_models import DEMO

START, END = "[THINK]", "[/THINK]"


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return load_tokens(DEMO)


@pytest.fixture(scope="module")
def grammars(tokens: Tokens) -> Grammars:
    return Grammars(tokens.backend, tokens.vocabulary_size, tokens.end_tokens)


class Walk:
    """One guide, and the tokens given to it."""

    def __init__(self, tokens: Tokens, grammars: Grammars, pattern: str, budget: int | None) -> None:
        self._tokens = tokens
        self._width = grammars.width
        self.start, self.end = self.ids(START), self.ids(END)
        assert len(self.start) > 2
        self.guide = Guide(
            tokens.end_tokens,
            matcher=grammars.matcher(Constraint("regex", pattern)) if pattern else None,
            field="sampling.regex",
            mask_width=grammars.width,
            thinking=Thinking(self.start, self.end, False, budget),
        )
        self._batch = BatchGuide([self.guide])

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokens.backend.encode(text, add_special_tokens=False).ids)

    @property
    def allowed(self) -> set[int]:
        """What may come next."""
        mask: Any = self._batch.mask(self._width)
        return (
            set(range(self._width)) if mask is None else {int(i) for i in np.flatnonzero(np.array(mask)[0])}
        )

    @property
    def texts(self) -> set[str]:
        return {self._tokens.backend.decode([token], skip_special_tokens=False) for token in self.allowed}

    def take(self, *given: int) -> None:
        for token in given:
            assert token in self.allowed, (token, self.texts)
            self._batch.consume([token])


def test_no_thinking_forbids_the_tag_and_not_what_begins_like_it(tokens: Tokens, grammars: Grammars) -> None:
    walk = Walk(tokens, grammars, "", 0)
    everything = walk.allowed
    assert set(walk.start) <= everything
    for _ in range(2):  # Anywhere in the reply.
        walk.take(*walk.ids("Hello "), *walk.start[:-1])
        assert everything - walk.allowed == {walk.start[-1]}
        walk.take(walk.start[0])
        walk.take(*walk.start[1:-1])
        assert walk.start[-1] not in walk.allowed
        walk.take(*walk.ids(" and on"))
        assert walk.allowed == everything


def test_no_thinking_leaves_a_form_that_begins_like_it(tokens: Tokens, grammars: Grammars) -> None:
    walk = Walk(tokens, grammars, r"\[[0-9]\]", 0)
    assert walk.texts == {"["}
    walk.take(walk.start[0])
    assert walk.texts == set("0123456789")
    walk.take(*walk.ids("7]"))
    assert walk.allowed <= tokens.end_tokens and not walk.guide.failure


def test_no_thinking_ends_a_row_whose_form_is_the_tag(tokens: Tokens, grammars: Grammars) -> None:
    walk = Walk(tokens, grammars, r"\[THINK\]x", 0)
    while not walk.guide.failure and len(walk.allowed) < grammars.width:
        walk.take(next(token for token in walk.start if token in walk.allowed))
    assert "max_thinking_tokens" in walk.guide.failure


@pytest.mark.parametrize("budget", [None, 2])
def test_a_form_and_a_tag_that_begin_alike(tokens: Tokens, grammars: Grammars, budget: int | None) -> None:
    """The first token may be either's; what follows decides, and the form begins anew after the thinking."""
    form = Walk(tokens, grammars, r"\[[0-9]\]", budget)
    form.take(form.start[0])
    assert form.allowed == {form.start[1], *(form.ids(digit)[0] for digit in "0123456789")}
    form.take(*form.ids("7]"))
    assert form.allowed <= tokens.end_tokens
    thought = Walk(tokens, grammars, r"\[[0-9]\]", budget)
    thought.take(*thought.start[:2])
    assert thought.allowed == {thought.start[2]}
    thought.take(*thought.start[2:], *thought.ids("hm")[:1], *thought.ids("hm")[:1])
    thought.take(*thought.end)
    assert thought.texts == {"["}
    thought.take(*thought.ids("[7]"))
    assert thought.allowed <= tokens.end_tokens and not thought.guide.failure


def test_a_tag_that_no_form_begins_like_is_written_to_its_end(tokens: Tokens, grammars: Grammars) -> None:
    walk = Walk(tokens, grammars, "[0-9]{3}", None)
    assert walk.start[0] in walk.allowed
    for token in walk.start:
        walk.take(token)
        if token != walk.start[-1]:
            assert len(walk.allowed) == 1
    walk.take(*walk.ids("so it is"), *walk.end, *walk.ids("123"))
    assert walk.allowed <= tokens.end_tokens


@pytest.mark.parametrize(
    ("thinks", "prompt", "budget", "says"),
    [
        (True, Prompt(messages=b"[]"), 0, ""),
        (True, Prompt(messages=b"[]"), None, ""),
        (False, Prompt(messages=b"[]"), 5, "does not mark its thinking"),
        (True, Prompt(text="raw"), 5, "raw text"),
        (False, Prompt(token_ids=(5,)), None, ""),
    ],
)
def test_a_budget_of_thinking_that_guides_nothing_is_said_to(
    tokens: Tokens, grammars: Grammars, thinks: bool, prompt: Prompt, budget: int | None, says: str
) -> None:
    maker = GuideMaker(grammars, tokens.reply_format if thinks else ReplyFormat(), tokens.end_tokens)
    warnings = maker.warnings(Submit((1,), prompt, Sampling(max_thinking_tokens=budget)))
    assert [says in warning for warning in warnings] == ([True] if says else [])
