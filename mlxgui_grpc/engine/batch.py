"""Prefill and decoding of many rows at once, over mlx-lm's models and batch caches.

Runs on the MLX thread. mlx-lm's own `BatchGenerator` does the same with three calls from insertion to the first
token, a sampler call per row and a log-probability array per row; the two classes here join in one call and
sample all rows together. Of mlx-lm they use `make_prompt_cache` and the methods that its cache classes share
(`merge`, `extend`, `filter`, `extract`, `prepare`, `finalize`): the only place that does, tested on each upgrade.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, cast

import mlx.core as mx
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlxgui_grpc.engine.sampling import BatchSampler, RowSampling

Model = Any
"""A model of mlx-lm: called with tokens (rows, length) and caches, it returns logits (rows, length, vocabulary)."""
Row = TypeVar("Row")


def is_batchable(model: Model) -> bool:
    """True when every layer has a plain KV cache: windowed and recurrent caches are served one row at a time."""
    return all(type(cache) is KVCache for cache in make_prompt_cache(model))


def kv_bytes_per_token(model: Model) -> int:
    """What one more token of a row takes in all caches together, taken from the caches themselves; 0: unknown.

    Right for shared heads and compressed (latent) caches. A layer counts whose window, if it has one, is longer than
    512 tokens; what a recurrent layer holds does not grow and does not count.
    """
    try:
        return max(0, _cache_bytes(model, 512) - _cache_bytes(model, 256)) // 256
    except Exception:  # A model may do with its caches as it likes; not to know is allowed.
        return 0


def _cache_bytes(model: Model, token_count: int) -> int:
    """Bytes of a row's caches at so many tokens. Lazy: shapes and types are known without computing anything."""
    cache = make_prompt_cache(model)
    model(mx.zeros((1, token_count - 1), dtype=mx.int32), cache=cache)
    model(mx.zeros((1, 1), dtype=mx.int32), cache=cache)  # windows are cut to size by single tokens
    return sum(int(layer.nbytes) for layer in cache)


def _merged(caches: list[list[Any]]) -> list[Any]:
    """One batch cache per layer from the rows' own caches (rows x layers)."""
    layers = list(zip(*caches, strict=True))
    if all(hasattr(layer[0], "merge") for layer in layers):
        return [layer[0].merge(list(layer)) for layer in layers]
    assert len(caches) == 1, "a model whose caches cannot be merged is served one row at a time"
    return caches[0]


class Prefill(Generic[Row]):
    """Some rows on their way into the batch: their prompts run through the model up to the last token."""

    def __init__(self, model: Model, rows: list[Row], prompts: list[Sequence[int]]) -> None:
        self.rows = rows
        self.cache = _merged([make_prompt_cache(model) for _ in rows])
        self.last_tokens = [prompt[-1] for prompt in prompts]
        self.done_token_count = 0
        self._model = model
        self._rest = [list(prompt[:-1]) for prompt in prompts]

    @property
    def is_done(self) -> bool:
        """Nothing is left but the last token of each prompt, which the batch consumes as its first step."""
        return not any(self._rest)

    def advance(self, chunk_token_count: int) -> None:
        """Prefill up to so many tokens of each prompt."""
        chunk = [rest[:chunk_token_count] for rest in self._rest]
        self._rest = [rest[chunk_token_count:] for rest in self._rest]
        lengths = [len(tokens) for tokens in chunk]
        longest = max(lengths)
        padding = [longest - length for length in lengths]
        tokens = mx.array([tokens + [0] * pad for tokens, pad in zip(chunk, padding, strict=True)])
        if any(padding):
            for cache in self.cache:
                cache.prepare(lengths=lengths, right_padding=padding)
        # The logits are never evaluated: only the caches are, so the output layer costs nothing here.
        self._model(tokens, cache=self.cache)
        if any(padding):
            for cache in self.cache:
                cache.finalize()
        self.done_token_count += longest
        if not self.is_done:
            mx.eval([cache.state for cache in self.cache])
            mx.clear_cache()


class DecodeBatch(Generic[Row]):
    """The rows that decode: each `step` consumes the token drawn before and draws the next one, one step ahead.

    A token is returned one step after it was drawn, so that the caller's work on it overlaps the computation.
    """

    def __init__(self, model: Model, sampling_of: Callable[[Row], RowSampling]) -> None:
        self.rows: list[Row] = []
        self._model = model
        self._sampling_of = sampling_of
        self._sampler = BatchSampler([])
        self._cache: list[Any] = []
        self._drawn: mx.array | None = None  # (rows,), drawn and not yet returned
        self._step_count = 0

    def join(self, rows: list[Row], last_tokens: list[int], cache: list[Any]) -> None:
        """Let rows in that are prefilled up to `last_tokens`; `cache` becomes the batch's."""
        sampler = BatchSampler([self._sampling_of(row) for row in rows])
        inputs = mx.array(last_tokens)
        drawn = sampler.sample(inputs, self._forward(inputs, cache))
        mx.async_eval(drawn)
        if self._drawn is None:
            self._cache, self._drawn = cache, drawn
        else:
            for ours, theirs in zip(self._cache, cache, strict=True):
                ours.extend(theirs)
            self._drawn = mx.concatenate([self._drawn, drawn])
        self.rows = self.rows + rows
        self._resample()

    def step(self) -> list[int]:
        """The next token of each row, in the order of `rows`."""
        inputs = self._drawn
        assert inputs is not None, "step on an empty batch"
        self._drawn = self._sampler.sample(inputs, self._forward(inputs, self._cache))
        mx.async_eval(self._drawn)
        self._step_count += 1
        if self._step_count % 512 == 0:
            mx.clear_cache()
        return cast(list[int], inputs.tolist())

    def remove(self, indices: set[int]) -> None:
        """Drop rows; their memory goes with the next step."""
        keep = [i for i in range(len(self.rows)) if i not in indices]
        self.rows = [self.rows[i] for i in keep]
        if keep:
            for cache in self._cache:
                cache.filter(keep)
            assert self._drawn is not None
            self._drawn = self._drawn[mx.array(keep)]
        else:
            self._cache, self._drawn = [], None
        self._resample()

    def take(self, index: int) -> tuple[int, list[Any]]:
        """Take a row out that will come back through `rejoin`: its drawn token and its cache, layer by layer."""
        token = self.drawn_token(index)
        cache = [layer.extract(index) if hasattr(layer, "extract") else layer for layer in self._cache]
        mx.eval([layer.state for layer in cache])
        self.remove({index})
        return token, cache

    def drawn_token(self, index: int) -> int:
        """The next token of one row, which is about to leave: `step` would return it after another step."""
        assert self._drawn is not None
        return cast(int, self._drawn[index].item())

    def release(self) -> None:
        """Give the memory of rows that were removed back to the system now."""
        mx.eval([layer.state for layer in self._cache])
        mx.clear_cache()

    def rejoin(self, row: Row, token: int, cache: list[Any]) -> None:
        """Let a row back in that `take` gave, its token returned to the caller by then."""
        self.join([row], [token], _merged([cache]))

    @property
    def kv_bytes(self) -> int:
        """Bytes held by the caches of the batch."""
        return sum(int(cache.nbytes) for cache in self._cache)

    def _forward(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        return cast(mx.array, self._model(inputs[:, None], cache=cache)[:, -1, :])

    def _resample(self) -> None:
        self._sampler = BatchSampler([self._sampling_of(row) for row in self.rows])
