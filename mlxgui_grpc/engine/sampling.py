"""Picks the next token of every row of a batch in a few array operations, whatever mix of samplers the rows have.

Runs on the MLX thread. The filters and their order are those of mlx-lm's `sample_utils`: top-p, min-p and top-k
on the untempered distribution, then the temperature. Noise is Gumbel noise from a counter-based key per row,
(seed, position), so that a row draws the same noise whatever else is in the batch, also after a pause.
"""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx

from mlxgui_grpc.engine.frames import Sampling
from mlxgui_grpc.engine.guide import Guide

Value = TypeVar("Value", int, float)

_NEGATIVE_INFINITY = -float("inf")


def key_word(seed: int | None, index: int) -> int:
    """32 bits that stand for a seed; `index` tells apart the choices of one request. No seed: random bits."""
    if seed is None:
        return secrets.randbits(32)
    digest = hashlib.blake2s(f"{seed}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a checkpoint recommends; neutral where it is silent."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class LogitsShaper:
    """Penalties and bias of one row. `shape` is called once per step with the token that the step consumes."""

    def __init__(
        self,
        sampling: Sampling,
        repetition_penalty: float,
        prompt_tail: Sequence[int],
        vocabulary_size: int,
    ) -> None:
        self._window = sampling.repetition_context_size
        self._repetition = repetition_penalty if self._window else 1.0  # [-0:] would be everything
        tail = list(prompt_tail)[-self._window :] if self._window else []
        # A picture's token may have no logit: MLX checks no index, and would write beyond the array.
        self._recent = mx.array([token for token in tail if token < vocabulary_size], dtype=mx.int32)
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        self._counts = mx.zeros((vocabulary_size,)) if self._presence or self._frequency else None
        bias = sampling.logit_bias
        self._bias = (mx.array(list(bias)), mx.array(list(bias.values()))) if bias else None
        self._is_first = True

    def shape(self, token: mx.array, logits: mx.array) -> mx.array:
        """Reshape the (1, vocabulary) `logits` that follow `token`, a (1,) array: lazily, without reading it.

        The first token is the last one of the prompt: known to the repetition window already, and not counted
        by the presence and frequency penalties, which OpenAI defines over the text generated so far:
        logit - count * frequency - (count > 0) * presence.
        """
        if not self._is_first:
            if self._repetition != 1.0:
                self._recent = mx.concatenate([self._recent, token.astype(mx.int32)])[-self._window :]
            if self._counts is not None:
                self._counts = self._counts.at[token].add(1.0)
        self._is_first = False
        if self._repetition != 1.0 and self._recent.size:
            # Keskar et al. 2019 (CTRL): divide positive logits, multiply negative ones.
            seen = logits[:, self._recent]
            logits = mx.put_along_axis(
                logits,
                self._recent[None],
                mx.where(seen < 0, seen * self._repetition, seen / self._repetition),
                axis=-1,
            )
        if self._counts is not None:
            logits = logits - self._counts * self._frequency - (self._counts > 0) * self._presence
        if self._bias is not None:
            tokens, values = self._bias
            logits = logits.at[:, tokens].add(values)
        return logits


class RowSampling:
    """One row's sampler: resolved parameters and the two words of its random key."""

    __slots__ = (
        "guide",
        "key_word",
        "min_p",
        "position",
        "shaper",
        "temperature",
        "top_k",
        "top_logprobs",
        "top_p",
    )

    def __init__(
        self,
        sampling: Sampling,
        defaults: SamplingDefaults,
        word: int,
        prompt: Sequence[int],
        vocabulary_size: int,
        guide: Guide | None = None,
    ) -> None:
        self.guide = guide
        self.top_logprobs = sampling.top_logprobs
        self.temperature = _first(sampling.temperature, defaults.temperature)
        self.top_p = _first(sampling.top_p, defaults.top_p)
        top_k = _first(sampling.top_k, defaults.top_k)
        self.top_k = top_k if top_k < vocabulary_size else 0
        self.min_p = _first(sampling.min_p, defaults.min_p)
        self.key_word = word
        self.position = 0
        repetition = _first(sampling.repetition_penalty, defaults.repetition_penalty)
        is_shaped = (
            repetition != 1.0
            or sampling.presence_penalty
            or sampling.frequency_penalty
            or sampling.logit_bias
        )
        self.shaper = LogitsShaper(sampling, repetition, prompt, vocabulary_size) if is_shaped else None


def _first(value: Value | None, default: Value) -> Value:
    return default if value is None else value


class BatchSampler:
    """The samplers of a batch as columns; made anew when a row joins or leaves, not per step."""

    def __init__(self, rows: Sequence[RowSampling]) -> None:
        self._rows = rows
        self._is_greedy = all(row.temperature == 0 for row in rows)
        self._has_shapers = any(row.shaper is not None for row in rows)
        self.wants_scores = any(row.top_logprobs is not None for row in rows)
        """A row wants to know the log-probabilities."""
        if self._is_greedy:
            return

        def column(values: list[float]) -> mx.array:
            return mx.array(values)[:, None]

        self._greedy = mx.array([row.temperature == 0 for row in rows])
        self._inverse_temperature = column([1 / row.temperature if row.temperature else 1.0 for row in rows])
        sampled = [row for row in rows if row.temperature]
        self._top_p = column([row.top_p for row in rows]) if any(row.top_p < 1 for row in sampled) else None
        self._min_p = column([row.min_p for row in rows]) if any(row.min_p > 0 for row in sampled) else None
        self._top_k = (
            mx.array([row.top_k for row in rows], dtype=mx.int32)[:, None]
            if any(row.top_k > 0 for row in sampled)
            else None
        )

    def sample(self, inputs: mx.array, logits: mx.array, allowed: mx.array | None = None) -> mx.array:
        """The next token of each row, (rows,), from `logits` (rows, vocabulary) after `inputs` (rows,); lazy.

        `allowed` (rows, vocabulary) is false for tokens that may not be drawn: whatever penalties and bias say.
        """
        if self._has_shapers:
            logits = mx.concatenate(
                [
                    row.shaper.shape(inputs[i : i + 1], logits[i : i + 1])
                    if row.shaper
                    else logits[i : i + 1]
                    for i, row in enumerate(self._rows)
                ]
            )
        if allowed is not None:
            logits = mx.where(allowed, logits, _NEGATIVE_INFINITY)
        greedy = mx.argmax(logits, axis=-1)
        if self._is_greedy:
            return greedy
        logits = self._filter(logits.astype(mx.float32))
        keys = mx.array([[row.key_word, row.position] for row in self._rows], dtype=mx.uint32)
        for row in self._rows:
            row.position += 1
        vocabulary_size = logits.shape[-1]
        noise = mx.vmap(lambda key: mx.random.gumbel((vocabulary_size,), key=key))(keys)
        sampled = mx.argmax(logits * self._inverse_temperature + noise, axis=-1)
        return mx.where(self._greedy, greedy, sampled)

    def _filter(self, logits: mx.array) -> mx.array:
        if self._top_p is None and self._top_k is None and self._min_p is None:
            return logits
        keep_from = mx.full((logits.shape[0], 1), _NEGATIVE_INFINITY)
        if self._top_p is not None or self._top_k is not None:
            ascending = mx.sort(logits, axis=-1)
            if self._top_p is not None:
                # Keep the smallest set whose mass reaches top_p: drop a token when the mass above it does already.
                mass = mx.softmax(ascending, axis=-1)
                above = mx.cumsum(mass, axis=-1, reverse=True, inclusive=False)
                dropped = (above >= self._top_p).sum(axis=-1, keepdims=True)
                dropped = mx.where(self._top_p < 1, mx.minimum(dropped, logits.shape[-1] - 1), 0)
                keep_from = mx.maximum(keep_from, mx.take_along_axis(ascending, dropped, axis=-1))
            if self._top_k is not None:
                dropped = mx.where(self._top_k > 0, logits.shape[-1] - self._top_k, 0)
                keep_from = mx.maximum(keep_from, mx.take_along_axis(ascending, dropped, axis=-1))
        if self._min_p is not None:
            # p(token) >= min_p * p(best token), in log space; log(0) = -inf keeps every token.
            keep_from = mx.maximum(keep_from, mx.max(logits, axis=-1, keepdims=True) + mx.log(self._min_p))
        return mx.where(logits < keep_from, _NEGATIVE_INFINITY, logits)
