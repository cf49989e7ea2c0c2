"""Log-probabilities of tokens: of the model's own distribution, whatever a row's sampler makes of it.

Natural logarithms at temperature 1, before penalties, bias and constraint.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import mlx.core as mx

from mlxgui_grpc.engine.frames import Logprob, Piece, PieceExtra

Row = TypeVar("Row", bound=Hashable)

PROMPT_LOGITS = 1 << 24
"""Most logits held at once for the log-probabilities of a prompt: 64 MiB of them."""


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token's log-probability, and the likeliest tokens at its place with theirs, likeliest first."""

    token: int
    logprob: float | None  # None for the first token of a prompt
    top: tuple[tuple[int, float], ...] = ()


class Scores(Generic[Row]):
    """The scores of the tokens drawn in one step, for the rows that want them; lazy until they are read."""

    def __init__(
        self,
        rows: Sequence[Row],
        counts_of: Callable[[Row], int | None],
        logits: mx.array,
        tokens: mx.array,
    ) -> None:
        """`logits` (rows, vocabulary), `tokens` (rows,); `counts_of` a row: how many of the likeliest it wants."""
        wanted = [
            (index, row, count) for index, row in enumerate(rows) if (count := counts_of(row)) is not None
        ]
        self._rows = [(row, count) for _, row, count in wanted]
        indices = mx.array([index for index, _, _ in wanted])
        self._tokens = tokens[indices]
        self._arrays = _scored(logits[indices], self._tokens, max(count for _, _, count in wanted))

    def evaluate(self) -> None:
        """Start the computation."""
        mx.async_eval(*self._arrays)

    def read(self) -> dict[Row, TokenScore]:
        """The scores of each row that wants them; waits for the computation."""
        tokens = cast(list[int], self._tokens.tolist())
        scores = _as_scores(tokens, self._arrays, [count for _, count in self._rows])
        return {row: score for (row, _), score in zip(self._rows, scores, strict=True)}


def prompt_scores(logits: mx.array, tokens: Sequence[int], count: int) -> list[TokenScore]:
    """The scores of `tokens`, each predicted by the line of `logits` (tokens, vocabulary) at its place."""
    return _as_scores(tokens, _scored(logits, mx.array(list(tokens)), count), [count] * len(tokens))


def _scored(logits: mx.array, tokens: mx.array, count: int) -> tuple[mx.array, mx.array, mx.array]:
    """The log-probabilities of `tokens` (n,), and the `count` likeliest (n, count) with theirs."""
    logits = logits.astype(mx.float32)
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logits, tokens[:, None], axis=-1) - total
    if not count:
        nothing = mx.zeros((len(tokens), 0))
        return chosen[:, 0], nothing.astype(mx.int32), nothing
    count = min(count, logits.shape[-1])
    likeliest = mx.argpartition(-logits, kth=count - 1, axis=-1)[:, :count]
    values = mx.take_along_axis(logits, likeliest, axis=-1)
    order = mx.argsort(-values, axis=-1)
    return (
        chosen[:, 0],
        mx.take_along_axis(likeliest, order, axis=-1),
        mx.take_along_axis(values, order, axis=-1) - total,
    )


def _as_scores(
    tokens: Sequence[int], arrays: tuple[mx.array, mx.array, mx.array], counts: Sequence[int]
) -> list[TokenScore]:
    chosen, top, values = (cast(list[Any], array.tolist()) for array in arrays)
    return [
        TokenScore(token, value, tuple(zip(ids[:count], likely[:count], strict=True)))
        for token, value, ids, likely, count in zip(tokens, chosen, top, values, counts, strict=True)
    ]


def logprob_bytes(piece: Piece) -> int:
    """About what the log-probabilities of a piece take in a frame."""
    extra = piece.extra
    return sum(map(_frame_bytes, (*extra.prompt_logprobs, *extra.logprobs))) if extra is not None else 0


def _frame_bytes(entry: Logprob) -> int:
    # The token as text (three bytes for one that is none) and as bytes; numbers and lengths take 26 at most.
    return 32 + 4 * len(entry.bytes) + sum(32 + 4 * len(other.bytes) for other in entry.top)


def split_piece(piece: Piece, limit_bytes: int) -> Iterator[Piece]:
    """The piece, and before it pieces with the log-probabilities of the prompt as far as they are more than that."""
    extra = piece.extra
    if extra is not None and extra.prompt_logprobs:
        logprobs, size, start = extra.prompt_logprobs, 0, 0
        for at, entry in enumerate(logprobs):
            size += _frame_bytes(entry)
            if size > limit_bytes and at > start:
                yield Piece(piece.key, 0, "", extra=PieceExtra(prompt_logprobs=logprobs[start:at]))
                size, start = _frame_bytes(entry), at
        extra.prompt_logprobs = logprobs[start:]
    yield piece


class TokenTexts:
    """What the tokens of a vocabulary stand for: exactly, as bytes, and as text."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a `tokenizers.Tokenizer`."""
        self._tokenizer = tokenizer
        self._added = {token: str(added) for token, added in _added_tokens(tokenizer).items()}
        decoder = tokenizer.decoder
        state = decoder.__getstate__() if decoder is not None else b""
        self._is_byte_level = b"ByteLevel" in (state if isinstance(state, bytes) else state.encode())
        self._bytes: dict[int, bytes] = {}

    def logprob(self, score: TokenScore) -> Logprob:
        """A score as it is reported."""
        top = tuple(self._entry(token, value, ()) for token, value in score.top)
        return self._entry(score.token, score.logprob, top)

    def _entry(self, token: int, value: float | None, top: tuple[Logprob, ...]) -> Logprob:
        exact = self.bytes_of(token)
        # A token that cannot come has -inf, which JSON does not know.
        finite = value if value is None or math.isfinite(value) else -9999.0
        return Logprob(token, exact.decode("utf-8", "replace"), exact, finite, top)

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token adds to a text; none for a number that the tokenizer has no token for."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._look_up(token)
        return known

    def _look_up(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        text: str | None = self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if self._is_byte_level:
            return bytes(_BYTE_OF[char] for char in text if char in _BYTE_OF)
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes([int(text[3:5], 16)])
        return text.replace("▁", " ").encode()


def _added_tokens(tokenizer: Any) -> dict[int, str]:
    return {token: added.content for token, added in tokenizer.get_added_tokens_decoder().items()}


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level tokenizers write for each byte (GPT-2): printable Latin-1 for itself, the others
    in order from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
