"""Texts and pairs of texts as token ids, for embedding models and cross-encoders."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.backends.text import Tokens
from mlxgui_grpc.errors import ContextLengthExceededError, InvalidRequestError

TEXTS_AT_ONCE = 64
"""Tokenized together: what the tokenizer tells of a text takes many times its bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """One row of a batch."""

    ids: NDArray[Any]
    segments: NDArray[np.int32] | None = None
    """0 for the first text and 1 for the second, in models that tell them apart; None: all 0."""

    @property
    def nbytes(self) -> int:
        """Bytes held, about."""
        own = 250  # Of the objects.
        return own + self.ids.nbytes + (self.segments.nbytes if self.segments is not None else 0)


class EncoderTokenizer:
    """The tokenizer of one model. Not thread-safe: one helper thread of the worker uses it."""

    def __init__(self, tokens: Tokens, context_length: int, end_token: int | None) -> None:
        """`end_token` is added to texts that the tokenizer does not end with it; None: nothing is."""
        longest_bytes = max((len(token.encode()) for token in tokens.tokenizer.get_vocab()), default=1)
        self._backend: Any = tokens.backend
        self._vocabulary_size = tokens.vocabulary_size
        self._context_length = context_length
        # What is longer would take seconds to tokenize only to be refused; normalizers may leave much out.
        self._max_text_bytes = 2 * context_length * longest_bytes + (1 << 20)
        self._end_token = end_token

    def tokenize(self, prompt: frames.Prompt) -> list[int]:
        """A prompt as the model would see it, however long; raises ContextLengthExceededError for megabytes of text."""
        if prompt.text is None:
            return list(prompt.token_ids)
        self._refuse_huge(prompt.text, "prompt")
        ids: list[int] = self._ended(self._backend.encode(prompt.text)).ids.tolist()
        return ids

    def prompts(self, prompts: tuple[frames.Prompt, ...]) -> list[Sequence]:
        """What is embedded; token ids are taken as they are. Raises InvalidRequestError naming `inputs[i]`."""
        for index, prompt in enumerate(prompts):
            if prompt.text is not None:
                self._refuse_huge(prompt.text, f"inputs[{index}]")
        encoded = self._encode([prompt.text for prompt in prompts if prompt.text is not None])
        return [
            self._checked(
                next(encoded) if prompt.text is not None else Sequence(np.array(prompt.token_ids, np.int64)),
                f"inputs[{index}]",
            )
            for index, prompt in enumerate(prompts)
        ]

    def pairs(self, query: str, documents: tuple[str, ...]) -> list[Sequence]:
        """A query beside each document. Raises ContextLengthExceededError naming `documents[i]`."""
        self._refuse_huge(query, "query")
        for index, document in enumerate(documents):
            self._refuse_huge(document, f"documents[{index}]")
        pairs = [(query, document) for document in documents]
        return [
            self._checked(sequence, f"documents[{index}]", " with the query")
            for index, sequence in enumerate(self._encode(pairs, is_pair=True))
        ]

    def _encode(self, texts: Any, *, is_pair: bool = False) -> Iterator[Sequence]:
        remaining = iter(texts)
        while some := list(islice(remaining, TEXTS_AT_ONCE)):
            for encoding in self._backend.encode_batch(some):
                yield _sequence(encoding.ids, encoding.type_ids) if is_pair else self._ended(encoding)

    def _ended(self, encoding: Any) -> Sequence:
        ids, segments = encoding.ids, encoding.type_ids
        if self._end_token is not None and (not ids or ids[-1] != self._end_token):
            return _sequence([*ids, self._end_token], [*segments, 0])
        return _sequence(ids, segments)

    def _refuse_huge(self, text: str, field: str) -> None:
        size_bytes = len(text.encode())
        if size_bytes > self._max_text_bytes:
            raise ContextLengthExceededError(
                f"{field} has {size_bytes} bytes, far more than the {self._context_length} tokens that the model "
                "takes; split it",
                field=field,
            )

    def _checked(self, sequence: Sequence, field: str, company: str = "") -> Sequence:
        ids = sequence.ids
        if not len(ids):
            raise InvalidRequestError(f"{field} has no tokens", field=field)
        if len(ids) > self._context_length:
            raise ContextLengthExceededError(
                f"{field} has {len(ids)} tokens{company} and the model takes {self._context_length}; split it",
                field=field,
            )
        bad = ids[(ids < 0) | (ids >= self._vocabulary_size)]
        if len(bad):
            raise InvalidRequestError(
                f"{field}: token id {bad[0]} is outside the vocabulary of {self._vocabulary_size} tokens",
                field=field,
            )
        return Sequence(ids.astype(np.int32, copy=False), sequence.segments)


def _sequence(ids: list[int], segments: list[int]) -> Sequence:
    return Sequence(np.array(ids, np.int32), np.array(segments, np.int32) if any(segments) else None)
