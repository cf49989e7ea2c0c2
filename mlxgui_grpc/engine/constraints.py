"""Compiles what a reply must be into matchers of llguidance, within bounds that any text respects.

Compilation takes from a millisecond to two seconds and cannot be interrupted, so it runs off the MLX thread. It ends
by the size of the text, llguidance's own limits, and a rehearsal: a grammar whose first steps are slow is refused,
for each step of it would hold up the whole batch.
"""

import json
import threading
import time
from collections import OrderedDict
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from mlxgui_grpc.engine.frames import Constraint
from mlxgui_grpc.errors import InvalidRequestError

MAX_TEXT_BYTES = 128 * 1024
"""Of a schema, expression or grammar. Compilation of a flat schema grows with the square: 4,000 properties of this
size take two seconds."""
MAX_TOOLS_BYTES = 1024 * 1024
"""Of all tools of a request, where replies are held to their schemas."""
MAX_CACHED = 32
MAX_QUOTED = 300
"""Characters of a message of llguidance's, which may quote the whole text."""
REHEARSED_TOKENS = 16
MAX_STEP_SECONDS = 0.25
"""A grammar with a slower step in its rehearsal is refused; usual ones take 0.1 ms."""

LIMITS: dict[str, Any] = {"max_lexer_states": 30_000, "verbose_errors": False}
"""Beside llguidance's defaults: 30,000 states take 60 MB at most."""

JSON_OPTIONS: dict[str, Any] = {
    # One space, or a line break with its indentation: a model cannot fill a reply with whitespace.
    "whitespace_pattern": r"[ ]|\n[ \t]{0,40}",
    "whitespace_flexible": True,
    "lenient": False,
    "coerce_one_of": False,
}
"""Override what a schema says in `x-guidance`."""

ANY_OBJECT = '{"type":"object"}'


class Grammars:
    """The compiled grammars of one model, the last used ones kept. Safe to use from several threads."""

    def __init__(self, tokenizer: Any, vocabulary_size: int, end_tokens: frozenset[int]) -> None:
        """`tokenizer` is a `tokenizers.Tokenizer`; nothing is made of it before the first grammar."""
        self._tokenizer = tokenizer
        known = tokenizer.get_vocab_size(with_added_tokens=True)
        self.width: int = max(vocabulary_size, known)
        """The tokens that a mask has bits for."""
        self._end_tokens = end_tokens
        self._ll_tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, constraint: Constraint) -> LLMatcher:
        """A new matcher for one row; raises InvalidRequestError naming the field."""
        field = f"sampling.{constraint.kind}"
        refuse_long(constraint.text.encode("utf-8", "replace"), field)
        return self.matcher_of(grammar_of(constraint, field), field)

    def check_schema(self, schema: dict[str, Any], field: str, *, is_strict: bool) -> None:
        """Raise InvalidRequestError naming `field` when the schema cannot be compiled; a keyword that is not known is
        an error where it `is_strict`."""
        options = JSON_OPTIONS | {"lenient": not is_strict, "coerce_one_of": not is_strict}
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=options)  # type: ignore[arg-type]
        self.matcher_of(grammar, field)

    def matcher_of(self, grammar: str, field: str) -> LLMatcher:
        """A new matcher for a grammar of llguidance's; raises InvalidRequestError naming `field`."""
        with self._lock:
            if matcher := self._compiled.get(grammar):
                self._compiled.move_to_end(grammar)
                return matcher.deep_copy()
        tokenizer = self.tokenizer(field)
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
        _raise_if_failed(matcher, field)
        cold = matcher.deep_copy()
        _rehearse(matcher, tokenizer, field)
        if not matcher.reset():  # Lark grammars with max_tokens or stop cannot go back.
            matcher = cold
        with self._lock:
            self._compiled[grammar] = matcher
            while len(self._compiled) > MAX_CACHED:
                self._compiled.popitem(last=False)
            return matcher.deep_copy()

    def tokenizer(self, field: str) -> LLTokenizer:
        """llguidance's view of the tokenizer; raises InvalidRequestError naming `field` where it has none."""
        with self._lock:
            if self._ll_tokenizer is None:
                self._ll_tokenizer = self._make_tokenizer(field)
            return self._ll_tokenizer

    def _make_tokenizer(self, field: str) -> LLTokenizer:
        if not self._end_tokens:
            raise InvalidRequestError(
                f"{field}: this model has no end token, so that a reply of a given form could never end",
                field=field,
            )
        copy = type(self._tokenizer).from_str(self._tokenizer.to_str())
        copy.no_padding()
        copy.no_truncation()
        try:
            return LLTokenizer(copy.to_str(), n_vocab=self.width, eos_token=sorted(self._end_tokens))
        except ValueError as error:
            raise InvalidRequestError(
                f"{field}: replies of this model cannot be constrained, for llguidance does not know its kind of "
                f"tokenizer: {error}",
                field=field,
            ) from error


def grammar_of(constraint: Constraint, field: str) -> str:
    """llguidance's form of a constraint; raises InvalidRequestError where it is none. Nothing is compiled."""
    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(constraint.text)
    if constraint.kind == "grammar":
        return LLMatcher.grammar_from_lark(constraint.text)
    text = ANY_OBJECT if constraint.kind == "json_object" else constraint.text
    try:
        return LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)  # type: ignore[arg-type]
    except ValueError as error:
        why = _explained(str(error))
        raise InvalidRequestError(f"{field} is not a JSON Schema: {why}", field=field) from error


def refuse_long(text: bytes, field: str, limit_bytes: int = MAX_TEXT_BYTES) -> None:
    """Raise InvalidRequestError for what would take too long to compile."""
    if len(text) > limit_bytes:
        raise InvalidRequestError(
            f"{field} has {len(text)} bytes; at most {limit_bytes} are compiled", field=field
        )


def _raise_if_failed(matcher: LLMatcher, field: str) -> None:
    if matcher.is_error():
        raise InvalidRequestError(f"{field}: {_explained(matcher.get_error())}", field=field)


def explained_failure(matcher: LLMatcher, field: str) -> str:
    """Why a row cannot go on, as a sentence for its caller."""
    return f"{field}: the reply could not be continued: {_explained(matcher.get_error())}"


def _explained(error: str) -> str:
    """llguidance's message in words of ours where it speaks of its own inside."""
    error = error.replace("<non-verbose/>", "").strip()
    if "\nerror: " in error:  # Of a regular expression, after a drawing of where.
        return "in a regular expression: " + error.rpartition("\nerror: ")[2].partition("\n")[0]
    error = error.partition("\n")[0][:MAX_QUOTED]
    if error.startswith("Unimplemented keys: "):
        keys = json.loads(error.removeprefix("Unimplemented keys: "))
        return f"the keyword {' and '.join(repr(key) for key in keys)} is not supported; leave it out"
    if error.startswith("oneOf constraints are not supported"):
        return "the keyword 'oneOf' is supported only where its cases exclude each other by type; use 'anyOf'"
    if error.startswith("recursion limit exceeded"):
        return "it is nested more than 127 levels deep"
    if error.startswith(("NoExtension", "Unsatisfiable schema")):
        return f"nothing can satisfy it ({error})"
    if "fuel exhausted" in error or "limit" in error or "too large" in error or "too big" in error:
        return f"it is too complex; simplify it ({error})"
    return error


def _rehearse(matcher: LLMatcher, tokenizer: LLTokenizer, field: str) -> None:
    """Take some steps along one path: the matcher's lexer is warm then, and no surprise is left for the first steps of
    a batch."""
    # A fixed sequence: the same text takes the same path each time.
    choice = np.random.default_rng(0)
    slowest = 0.0
    for _ in range(REHEARSED_TOKENS):
        started = time.thread_time()
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        _raise_if_failed(matcher, field)
        tokens = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        if not len(tokens):
            raise InvalidRequestError(f"{field}: nothing can satisfy it", field=field)
        token = int(choice.choice(tokens))
        if token in tokenizer.eos_tokens:
            break
        matcher.consume_token(token)
        slowest = max(slowest, time.thread_time() - started)
        _raise_if_failed(matcher, field)
    if slowest > MAX_STEP_SECONDS:
        raise InvalidRequestError(
            f"{field}: it is too complex; a single token takes {slowest:.1f} s to check; simplify it",
            field=field,
        )
