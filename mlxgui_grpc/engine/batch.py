"""Prefill and decoding of many rows at once, over mlx-lm's models and batch caches.

Runs on the MLX thread. mlx-lm's own `BatchGenerator` does the same with three calls from insertion to the first
token, a sampler call per row and a log-probability array per row; the two classes here join in one call and
sample all rows together. Of mlx-lm they use `make_prompt_cache` and the methods that its cache classes share
(`merge`, `extend`, `filter`, `extract`, `prepare`, `finalize`): the only place that does, tested on each upgrade.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar, cast

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlxgui_grpc.engine import architectures
from mlxgui_grpc.engine.frames import Logprob
from mlxgui_grpc.engine.grouped_cache import GroupedCache
from mlxgui_grpc.engine.guide import BatchGuide
from mlxgui_grpc.engine.kv_budget import KvCost
from mlxgui_grpc.engine.logprobs import PROMPT_LOGITS, Scores, TokenScore, prompt_scores
from mlxgui_grpc.engine.sampling import BatchSampler, RowSampling

Model = Any
"""A model of mlx-lm: called with tokens (rows, length) and caches, it returns logits (rows, length, vocabulary)."""
Row = TypeVar("Row", bound=Hashable)
BATCHED_CACHES = frozenset({"KVCache", "RotatingKVCache", "ArraysCache"})
"""Those of mlx-lm's that can be merged, alone or several in one `CacheList`."""


def why_serial(model: Model) -> str:
    """Why the rows of this model of mlx-lm cannot share a batch, as a sentence; empty: they can."""
    module = _module(model)
    if note := architectures.serial_note(module):
        return note
    if any(type(part).__name__ == "DynamicNTKScalingRoPE" for part in model.modules()):
        return architectures.SCALED_BY_LENGTH
    unknown = {type(layer).__name__ for layer in _leaves(make_prompt_cache(model))} - BATCHED_CACHES
    return architectures.unknown_cache(unknown) if unknown else ""


def takes_padding(model: Model) -> bool:
    """Whether prompts of several lengths can be run together."""
    return _module(model) not in architectures.PREFILLED_ALONE


def _module(model: Model) -> str:
    return type(model).__module__.rpartition(".")[2]


def _leaves(layers: Sequence[Any]) -> list[Any]:
    return [leaf for layer in layers for leaf in getattr(layer, "caches", (layer,))]


def kv_cost(model: Model) -> KvCost:
    """What the caches of a row take, taken from the caches themselves: right for shared heads and for compressed
    (latent), windowed and recurrent ones. Lazy: shapes and types are known without computing anything."""
    cache = make_prompt_cache(model)
    rates: Counter[int] = Counter()
    fixed_bytes = 0
    try:
        for length in (2, 1):
            model(mx.zeros((1, length), dtype=mx.int32), cache=cache)
        for layer in _leaves(cache):
            if getattr(layer, "keys", None) is None:
                fixed_bytes += layer.nbytes
                continue
            window = getattr(layer, "max_size", None) or getattr(layer, "chunk_size", None) or 0
            rates[window] += sum(array.nbytes // array.shape[2] for array in (layer.keys, layer.values))
    except Exception:  # A model may do with its caches as it likes; not to know is allowed.
        return KvCost()
    return KvCost(tuple((rate, window) for window, rate in rates.items()), fixed_bytes)


def _row_cache(model: Model) -> list[Any]:
    """Empty caches of one row."""
    cache = make_prompt_cache(model)
    if _module(model) == "gemma2" and model.layers[0].self_attn.repeats > 1:
        return [GroupedCache.of(layer) for layer in cache]
    return cache


def _merged(caches: list[list[Any]]) -> list[Any]:
    """One batch cache per layer from the rows' own caches (rows x layers)."""
    layers = list(zip(*caches, strict=True))
    if all(hasattr(layer[0], "merge") for layer in layers):
        return [layer[0].merge(list(layer)) for layer in layers]
    assert len(caches) == 1, "a model whose caches cannot be merged is served one row at a time"
    return caches[0]


class Prefill(Generic[Row]):
    """Some rows on their way into the batch: their prompts run through the model up to the last token.

    Rows whose prompt is the same list are computed once; their caches are copies of that one's.
    """

    def __init__(
        self,
        model: Model,
        rows: list[Row],
        prompts: list[Sequence[int]],
        *,
        top_logprobs: int | None = None,
        look: Callable[[], int] = lambda: 0,
    ) -> None:
        """With `top_logprobs`, which only rows of one prompt can have, its tokens are scored."""
        self.rows = rows
        self.look = look
        """To be called between steps until it gives 0, before the first `advance`: the model looks at one more picture
        of the prompt, and says how many tokens that were."""
        unique = {id(prompt): prompt for prompt in prompts}
        at = {key: index for index, key in enumerate(unique)}
        self._source = [at[id(prompt)] for prompt in prompts]
        """Of each row, the place of its prompt in the cache."""
        caches = [_row_cache(model) for _ in unique]
        self._own = caches if len(caches) > 1 and not takes_padding(model) else []
        """Of each prompt, where they cannot be run together; merged in the end."""
        self.cache = [layer for own in caches for layer in own] if self._own else _merged(caches)
        self.last_tokens = [prompt[-1] for prompt in prompts]
        self.done_token_count = 0
        self.token_count = sum(len(prompt) for prompt in unique.values())
        """Of all prompts, the same ones counted once."""
        self._scores: list[TokenScore] = []
        self.prompt_logprobs: list[Logprob] = []
        """Of the prompt as far as it is computed; kept here by the caller, who reads them from `take_scores`."""
        self._model = model
        self._rest = [list(prompt[:-1]) for prompt in unique.values()]
        self._top_logprobs = top_logprobs
        self._width = 0
        """Logits of a token; 0 before the first."""
        if top_logprobs is not None:
            assert len(unique) == 1, "prompts are scored one at a time"
            self._scores = [TokenScore(prompts[0][0], None)]
            self._targets = list(prompts[0][1:])

    def take_scores(self) -> list[TokenScore]:
        """The scores of the prompt's next tokens, as far as they are computed."""
        scores, self._scores = self._scores, []
        return scores

    @property
    def is_scored(self) -> bool:
        """The prompt's log-probabilities are wanted."""
        return self._top_logprobs is not None

    @property
    def is_done(self) -> bool:
        """Nothing is left but the last token of each prompt, which the batch consumes as its first step."""
        return not any(self._rest)

    def discard(self, rows: set[Row]) -> None:
        """Forget some rows; the others may share what is computed."""
        keep = [index for index, row in enumerate(self.rows) if row not in rows]
        self.rows = [self.rows[index] for index in keep]
        self.last_tokens = [self.last_tokens[index] for index in keep]
        self._source = [self._source[index] for index in keep]

    def row_caches(self) -> list[Any]:
        """The cache with a row for each of `rows`, when the prefill is done; it becomes the caller's."""
        if self._own:
            self.cache, self._own = _merged(self._own), []
        if self._source != list(range(len(self._rest))):
            for layer in self.cache:
                layer.filter(self._source)
        return self.cache

    def advance(self, chunk_token_count: int) -> None:
        """Prefill up to so many tokens of each prompt; of one whose log-probabilities are wanted no more than whose
        logits fit, and the first one alone."""
        if self._top_logprobs is not None:
            self._advance_scored(chunk_token_count, self._top_logprobs)
            return
        chunk = [rest[:chunk_token_count] for rest in self._rest]
        self._rest = [rest[chunk_token_count:] for rest in self._rest]
        lengths = [len(tokens) for tokens in chunk]
        if self._own:
            self._advance_alone(chunk)
            self.done_token_count += max(lengths)
            return
        longest = max(lengths)
        if longest == 1 > min(lengths):
            longest = 2  # A windowed cache takes a single column for a decoding step, which knows no padding.
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
        self.done_token_count += max(lengths)
        if not self.is_done:
            mx.eval([cache.state for cache in self.cache])
            mx.clear_cache()

    def _advance_alone(self, chunk: list[list[int]]) -> None:
        for tokens, own in zip(chunk, self._own, strict=True):
            if tokens:
                self._model(mx.array([tokens]), cache=own)
                mx.eval([layer.state for layer in own])

    def _advance_scored(self, chunk_token_count: int, count: int) -> None:
        size = min(max(1, PROMPT_LOGITS // self._width) if self._width else 1, chunk_token_count)
        targets = self._targets[self.done_token_count : self.done_token_count + size]
        logits = self._model(mx.array([self._rest[0][: len(targets)]]), cache=self.cache)[0]
        self._width = logits.shape[-1]
        self._scores += prompt_scores(logits, targets, count)
        self._rest[0] = self._rest[0][len(targets) :]
        self.done_token_count += len(targets)
        if not self.is_done:
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
        self._guide = BatchGuide([])
        self._cache: list[Any] = []
        self._drawn: mx.array | None = None  # (rows,), drawn and not yet returned
        self._scores: list[Scores[Row]] = []  # of `_drawn`
        self.scores: dict[Row, TokenScore] = {}
        """Of the tokens returned last, for the rows that want to know."""
        self._step_count = 0

    def join(self, rows: list[Row], last_tokens: list[int], cache: list[Any]) -> None:
        """Let rows in that are prefilled up to `last_tokens`; `cache` becomes the batch's."""
        samplings = [self._sampling_of(row) for row in rows]
        sampler = BatchSampler(samplings)
        inputs = mx.array(last_tokens)
        logits = self._forward(inputs, cache)
        allowed = None
        if guide := BatchGuide([sampling.guide for sampling in samplings]):
            mx.async_eval(logits)
            allowed = guide.mask(logits.shape[-1])
        drawn = self._draw(rows, sampler, inputs, logits, allowed)
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
        logits = self._forward(inputs, self._cache)
        allowed = None
        if self._guide:
            # The model computes while the guides take in the tokens it computes from and make their masks.
            mx.async_eval(logits)
            self._guide.consume(cast(list[int], inputs.tolist()))
            allowed = self._guide.mask(logits.shape[-1])
        returned, self._scores = self._scores, []
        self._drawn = self._draw(self.rows, self._sampler, inputs, logits, allowed)
        self.scores = {row: score for scores in returned for row, score in scores.read().items()}
        self._step_count += 1
        if self._step_count % 512 == 0:
            mx.clear_cache()
        return cast(list[int], inputs.tolist())

    def _draw(
        self,
        rows: list[Row],
        sampler: BatchSampler,
        inputs: mx.array,
        logits: mx.array,
        allowed: mx.array | None,
    ) -> mx.array:
        """Start to compute the next tokens of `rows`, and their scores."""
        drawn = sampler.sample(inputs, logits, allowed)
        mx.async_eval(drawn)
        if sampler.wants_scores:
            scores = Scores(rows, lambda row: self._sampling_of(row).top_logprobs, logits, drawn)
            scores.evaluate()
            self._scores.append(scores)
        return drawn

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
        token = self._last_token(index)
        cache = [layer.extract(index) if hasattr(layer, "extract") else layer for layer in self._cache]
        mx.eval([layer.state for layer in cache])
        self.remove({index})
        return token, cache

    def drop(self, index: int) -> int:
        """Take a row out without its cache, which will come back through a prefill: its drawn token."""
        token = self._last_token(index)
        self.remove({index})
        return token

    def _last_token(self, index: int) -> int:
        """The drawn token of a row that is about to leave: `step` would return it after another step."""
        assert self._drawn is not None
        row = self.rows[index]
        token = cast(int, self._drawn[index].item())
        if guide := self._sampling_of(row).guide:
            guide.consume(token)
        self.scores = {}
        for scores in self._scores:
            self.scores |= {other: score for other, score in scores.read().items() if other is row}
        return token

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
        samplings = [self._sampling_of(row) for row in self.rows]
        self._sampler = BatchSampler(samplings)
        self._guide = BatchGuide([sampling.guide for sampling in samplings])
