"""The vectorised sampler against plain definitions, row by row and in mixed batches."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxgui_grpc.engine.frames import Sampling
from mlxgui_grpc.engine.sampling import BatchSampler, LogitsShaper, RowSampling, SamplingDefaults, key_word

VOCABULARY = 64
RNG = np.random.default_rng(7)
LOGITS = RNG.normal(0, 2.5, VOCABULARY).astype(np.float32)
PROMPT = [1, 2, 3]


def row(word: int = 1, defaults: SamplingDefaults | None = None, **params: Any) -> RowSampling:
    return RowSampling(Sampling(**params), defaults or SamplingDefaults(), word, PROMPT, VOCABULARY)


def draw(rows: Sequence[RowSampling], logits: Any = LOGITS, inputs: Sequence[int] | None = None) -> list[int]:
    """One step of a batch; the same logits for every row unless there is one line for each."""
    array = np.broadcast_to(logits, (len(rows), VOCABULARY))
    consumed = mx.array(list(inputs or [3] * len(rows)))
    tokens: Any = BatchSampler(rows).sample(consumed, mx.array(np.array(array))).tolist()
    return list(tokens)


def softmax(logits: Any) -> Any:
    exponents = np.exp(logits - logits.max())
    return exponents / exponents.sum()


def allowed(logits: Any, *, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> set[int]:
    """Which tokens may be drawn, by the definitions in the contract."""
    p = softmax(logits.astype(np.float64))
    order = np.argsort(-p)
    kept = set(range(len(p)))
    if top_p < 1:
        mass = np.cumsum(p[order])
        kept &= set(order[: int(np.searchsorted(mass, top_p)) + 1].tolist())
    if top_k:
        kept &= set(order[:top_k].tolist())
    if min_p:
        kept &= {i for i in range(len(p)) if p[i] >= min_p * p.max()}
    return kept


FILTERS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": VOCABULARY - 1},
    {"top_k": VOCABULARY},
    {"top_k": 10**6},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_p": 0.8, "top_k": 4},
    {"top_p": 0.95, "min_p": 0.05},
    {"top_k": 6, "min_p": 0.2},
    {"top_p": 0.7, "top_k": 9, "min_p": 0.02},
]


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_only_and_all_of_the_allowed_tokens_are_drawn(params: dict[str, Any]) -> None:
    """3,000 rows of their own keys: nothing outside the set, and every likely token of it."""
    tokens = Counter(draw([row(word, temperature=1.0, **params) for word in range(3000)]))
    may = allowed(LOGITS, **params)
    assert set(tokens) <= may
    p = softmax(LOGITS)
    kept_mass = sum(p[token] for token in may)
    assert {token for token in may if p[token] / kept_mass > 0.01} <= set(tokens)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_come_as_often_as_their_probability_says(temperature: float) -> None:
    """Within six standard deviations for every token."""
    count = 8000
    tokens = Counter(draw([row(word, temperature=temperature) for word in range(count)]))
    for token, p in enumerate(softmax(LOGITS / temperature)):
        deviation = math.sqrt(count * p * (1 - p)) + 1
        assert abs(tokens[token] - count * p) < 6 * deviation


def test_filters_look_at_the_untempered_distribution() -> None:
    """A high temperature draws more evenly from the same few tokens."""
    rows = [row(word, temperature=2.0, top_p=0.5) for word in range(2000)]
    assert set(draw(rows)) == allowed(LOGITS, top_p=0.5)


def test_each_row_of_a_mixed_batch_is_as_it_is_alone() -> None:
    """Greedy, filtered, penalised and biased rows side by side, each on logits of its own."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.6},
        {"temperature": 1.3, "top_k": 3},
        {"temperature": 1.0, "min_p": 0.1},
        {"frequency_penalty": 1.5},
        {"temperature": 1.0, "presence_penalty": 1.0, "repetition_penalty": 1.5},
        {"logit_bias": {5: 100.0}},
        {"temperature": 1.5, "logit_bias": {6: 3.0, 7: -100.0}},
    ]
    lines = RNG.normal(0, 2, (6, len(kinds), VOCABULARY)).astype(np.float32)
    together = [row(10 + i, **params) for i, params in enumerate(kinds)]
    alone = [row(10 + i, **params) for i, params in enumerate(kinds)]
    inputs = [3] * len(kinds)
    for step in range(6):
        drawn = draw(together, lines[step], inputs)
        assert drawn == [draw([r], lines[step, i], [inputs[i]])[0] for i, r in enumerate(alone)]
        for i, params in enumerate(kinds):
            if not params:
                assert drawn[i] == int(lines[step, i].argmax())
        inputs = drawn


def test_noise_depends_on_key_and_position_only() -> None:
    first, again, other = row(5, temperature=2.0), row(5, temperature=2.0), row(6, temperature=2.0)
    flat = np.zeros(VOCABULARY, dtype=np.float32)
    sequence = [draw([first], flat)[0] for _ in range(12)]
    # In a batch, behind others, and after a change of the batch.
    neighbours = [row(100 + i, temperature=1.0) for i in range(3)]
    assert [draw([*neighbours, again], flat)[3] for _ in range(6)] == sequence[:6]
    assert [draw([again], flat)[0] for _ in range(6)] == sequence[6:]
    assert len(set(sequence)) > 3
    assert [draw([other], flat)[0] for _ in range(12)] != sequence


def test_seeds_become_keys_that_differ_by_choice() -> None:
    assert key_word(3, 0) == key_word(3, 0)
    words = {key_word(seed, choice) for seed in range(-50, 50) for choice in range(4)}
    assert len(words) == 400 and all(0 <= word < 2**32 for word in words)
    assert len({key_word(None, 0) for _ in range(20)}) > 10


def test_the_checkpoint_s_defaults_hold_until_the_request_says_otherwise() -> None:
    defaults = SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20, min_p=0.1, repetition_penalty=1.2)
    plain = row(defaults=defaults)
    assert (plain.temperature, plain.top_p, plain.top_k, plain.min_p) == (0.6, 0.95, 20, 0.1)
    assert plain.shaper is not None
    given = row(defaults=defaults, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
    assert (given.temperature, given.top_p, given.top_k, given.min_p) == (0.0, 1.0, 0, 0.0)
    assert given.shaper is None


def shaped(params: dict[str, Any], generated: Sequence[int], logits: Any = LOGITS) -> Any:
    """The logits that a row sees after its prompt and these tokens."""
    shaper = row(**params).shaper
    assert shaper is not None
    out = None
    for token in [PROMPT[-1], *generated]:
        out = shaper.shape(mx.array([token]), mx.array(logits)[None])
    return np.array(out)[0]


def test_presence_and_frequency_penalties_are_openai_s() -> None:
    """Over the generated text, not the prompt: logit - count * frequency - (count > 0) * presence."""
    got = shaped({"presence_penalty": 0.5, "frequency_penalty": 0.25}, [9, 9, 4])
    expected = LOGITS.copy()
    expected[9] -= 0.5 + 2 * 0.25
    expected[4] -= 0.5 + 0.25
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize(("window", "seen"), [(20, {1, 2, 3, 8, 9}), (3, {3, 8, 9}), (1, {9}), (0, set())])
def test_the_repetition_penalty_looks_at_the_last_tokens_prompt_included(window: int, seen: set[int]) -> None:
    """CTRL's: positive logits are divided, negative ones multiplied."""
    params = {"repetition_penalty": 2.0, "repetition_context_size": window}
    got = shaped(params, [8, 9])
    expected = LOGITS.copy()
    for token in seen:
        expected[token] *= 0.5 if expected[token] > 0 else 2.0
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_bias_is_added_last() -> None:
    got = shaped({"logit_bias": {0: 1.5, 63: -100.0}}, [0])
    expected = LOGITS.copy()
    expected[0] += 1.5
    expected[63] -= 100
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_token_of_the_prompt_that_has_no_logit_is_left_out_of_the_penalty() -> None:
    """A picture's may have none; MLX would write beyond the array."""
    sampling = Sampling(repetition_penalty=2.0)
    shaped = [
        LogitsShaper(sampling, 2.0, tail, 4).shape(mx.array([1]), mx.array([[1.0, 2.0, -3.0, 4.0]])).tolist()
        for tail in ([1, 2], [1, 4, 2, 999_999])
    ]
    assert shaped == [[[1.0, 1.0, -6.0, 4.0]]] * 2
