"""Batch equals serial: whatever else is in the batch, a row's tokens are those that it gets alone.

For each architecture 32 requests of all kinds run together in the real scheduler, joining late, cancelled, paused and
put off for want of memory on the way. Each is then run alone, and each greedy one through the model without us.
`make equal` does so for every architecture and five seeds; a test run takes the `ALWAYS` ones and, day by day, others.

Matrix products of other shapes add in another order, so two logits that are nearly the same can change places: where a
row differs it is run alone again with its logits moved by 1e-4 up and down. Only if it then leaves its own way there or
before, it is excluded as a near tie; more than one of them in 32 fails.
"""

import datetime
import functools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache
from mlx_lm.utils import MODEL_REMAPPING

from mlxgui_grpc.engine import architectures, frames, scheduler
from mlxgui_grpc.engine.backends.text import Tokens, load_tokens
from mlxgui_grpc.engine.batch import why_serial
from mlxgui_grpc.engine.detokenizer import Detokenizer, StopMatcher
from mlxgui_grpc.engine.kv_budget import KvCost
from mlxgui_grpc.engine.row import EngineRow
from mlxgui_grpc.engine.sampling import RowSampling, SamplingDefaults, key_word
from mlxgui_grpc.engine.scheduler import Scheduler
from tests.support_architectures import CONFIGURATIONS, SHARED, VOCABULARY_SIZE, WINDOW, build, module_of
from tests.support_models import DEMO

REQUEST_COUNT = 32
SEED_COUNT = int(os.environ.get("EQUAL_SEEDS", "5"))
MAX_TURNS = 2000
END_TOKEN = 7
MARGIN = 1e-4
ALWAYS = (
    "llama",
    "llama (windowed)",  # rotating caches
    "qwen3",
    "qwen3_moe",  # experts
    "gemma3_text",  # windows
    "qwen3_next",  # recurrent with padding, and experts
    "falcon_h1",  # caches of two kinds in one layer
    "mamba",  # recurrent without padding
)
OTHERS_A_DAY = 3


@dataclass(frozen=True)
class Request:
    """What one row asks for, and the turns at which something happens to it; 0: never."""

    key: int
    prompt: list[int]
    sampling: frames.Sampling
    join_turn: int
    cancel_turn: int = 0
    pause_turn: int = 0
    resume_turn: int = 0


def requests_of(seed: str) -> list[Request]:
    """Requests with prompts of 1 to 300 tokens, the borders of windows and prefills among them."""
    draw = random.Random(seed)
    lengths = [1, 1, 2, 2, 3, 7, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 2, 60, 255, 256, 257, 258, 300]
    lengths += [draw.randint(1, 90) for _ in range(REQUEST_COUNT - len(lengths))]
    draw.shuffle(lengths)
    requests = [_request(draw, key, length) for key, length in enumerate(lengths)]
    # Three choices of one request, as a Submit makes them: they share a prefill.
    first = requests[-3]
    return requests[:-2] + [
        replace(first, key=request.key, sampling=request.sampling, cancel_turn=0) for request in requests[-2:]
    ]


def _request(draw: random.Random, key: int, length: int) -> Request:
    sampling = frames.Sampling(max_tokens=draw.randint(4, 20))
    if key % 2:
        sampling = frames.Sampling(
            max_tokens=sampling.max_tokens,
            temperature=draw.choice([0.0, 0.7, 1.3]),
            top_p=draw.choice([1.0, 0.9]),
            top_k=draw.choice([0, 0, 20]),
            min_p=draw.choice([0.0, 0.0, 0.02]),
            seed=draw.randint(0, 2**31),
            repetition_penalty=draw.choice([1.0, 1.3]),
            presence_penalty=draw.choice([0.0, 0.5]),
            frequency_penalty=draw.choice([0.0, 0.4]),
            logit_bias=draw.choice([{}, {11: 2.0, 12: -100.0}]),
        )
    join_turn = draw.choice([0, 0, draw.randint(1, 30)])
    pause_turn = draw.choice([0, 0, 0, join_turn + draw.randint(1, 8)])
    return Request(
        key=key,
        prompt=[draw.randrange(VOCABULARY_SIZE) for _ in range(length)],
        sampling=sampling,
        join_turn=join_turn,
        cancel_turn=draw.choice([0, 0, 0, 0, 0, join_turn + draw.randint(1, 12)]),
        pause_turn=pause_turn,
        resume_turn=pause_turn + draw.randint(1, 12) if pause_turn else 0,
    )


@functools.cache
def demo_tokens() -> Tokens:
    return load_tokens(DEMO)


class Engine:
    """A scheduler whose clock shows its turns, and every row that it was given."""

    def __init__(self, model: Any, max_rows: int) -> None:
        self.rows: dict[int, EngineRow] = {}
        self.finished: set[int] = set()
        self.turn = 0
        self.scheduler = Scheduler(
            model,
            end_tokens=frozenset({END_TOKEN}),
            max_rows=max_rows,
            send=self._receive,
            kv_cost=KvCost(((1, 0),)),
            clock=lambda: float(self.turn),
        )

    def _receive(self, event: frames.Event) -> None:
        assert isinstance(event, frames.Step | frames.Prefilled), event
        if isinstance(event, frames.Step):
            self.finished |= {piece.key for piece in event.pieces if piece.finish}

    def submit(self, request: Request) -> None:
        word = key_word(request.sampling.seed, 0)
        self.rows[request.key] = EngineRow(
            key=request.key,
            prompt=request.prompt,
            sampling=RowSampling(request.sampling, SamplingDefaults(), word, request.prompt, VOCABULARY_SIZE),
            detokenizer=Detokenizer(demo_tokens().backend),
            stop=StopMatcher(()),
            token_limit=request.sampling.max_tokens,
            submit_time=float(self.turn),
        )
        self.scheduler.submit([self.rows[request.key]])


def alone(model: Any, request: Request) -> list[int]:
    """The tokens of a request that nothing happens to."""
    engine = Engine(model, 1)
    engine.submit(request)
    while not engine.finished:
        assert engine.scheduler.turn()
    return engine.rows[request.key].generated


def together(model: Any, requests: list[Request]) -> Engine:
    """Run all in one batch, each with what happens to it, and all with too little memory for some time."""
    engine = Engine(model, 24)
    awaited = {request.key for request in requests}
    while awaited:
        turn = engine.turn
        assert turn < MAX_TURNS, f"rows {awaited} did not end"
        for request in requests:
            if request.join_turn == turn:
                engine.submit(request)
            if turn and request.pause_turn == turn:
                engine.scheduler.pause(request.key)
            if turn and request.resume_turn == turn:
                engine.scheduler.resume(request.key)
            if turn and request.cancel_turn == turn:
                engine.scheduler.cancel(frozenset({request.key}))
                awaited.discard(request.key)
        if turn in (8, 24):
            engine.scheduler.limit(24, 3 * 512 if turn == 8 else 0)
        engine.scheduler.turn()
        engine.turn += 1
        awaited -= engine.finished
    return engine


def without_us(model: Any, request: Request, count: int) -> list[int]:
    """What mlx-lm's own caches give for a greedy request. The last token of the prompt is a step by itself, as in
    mlx-lm's generate_step."""
    cache = make_prompt_cache(model)
    if len(request.prompt) > 1:
        model(mx.array([request.prompt[:-1]]), cache=cache)
    token, tokens = request.prompt[-1], []
    for _ in range(count):
        token = cast(int, mx.argmax(model(mx.array([[token]]), cache=cache)[:, -1], axis=-1).item())
        tokens.append(token)
    return tokens


class Nudged:
    """A model whose logits are moved by up to `MARGIN`, each another way."""

    def __init__(self, model: Any, seed: int, sign: int) -> None:
        self._model = model
        noise = mx.random.uniform(-1, 1, (VOCABULARY_SIZE,), key=mx.random.key(seed))
        self._noise = sign * MARGIN * noise

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        return cast(mx.array, self._model(tokens, cache=cache) + self._noise)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@dataclass
class Comparison:
    """What came of 32 requests."""

    token_count: int = 0
    near_ties: list[int] = field(default_factory=list)
    different: list[tuple[int, int]] = field(default_factory=list)
    """Rows, each with the place of the first token that is another one."""


def compare(model: Any, requests: list[Request]) -> Comparison:
    """Run the requests together and each alone."""
    engine = together(model, requests)
    assert engine.scheduler.preempted_count > 0 and engine.scheduler.kv_bytes == 0
    result = Comparison()
    for request in requests:
        expected = alone(model, request)
        tokens = engine.rows[request.key].generated
        is_whole = request.key in engine.finished
        result.token_count += len(tokens)
        if tokens == (expected if is_whole else expected[: len(tokens)]):
            continue
        at = _first_difference(tokens, expected)
        nudged = [alone(Nudged(model, seed, sign), request) for seed in (1, 2) for sign in (1, -1)]
        if any(other != expected and _first_difference(other, expected) <= at for other in nudged):
            result.near_ties.append(request.key)
        else:
            result.different.append((request.key, at))
    return result


def _first_difference(tokens: list[int], others: list[int]) -> int:
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(tokens), len(others)))


def check(name: str, seed: int) -> None:
    """Batch equals serial equals mlx-lm; of an architecture that is not batched, serial equals mlx-lm."""
    model = build(name, seed)
    requests = requests_of(f"{name}/{seed}")
    for request in requests[:: 2 if why_serial(model) else 4]:
        tokens = alone(model, request)
        if not request.key % 2:
            assert tokens == without_us(model, request, len(tokens)), request.key
    if not why_serial(model):
        result = compare(model, requests)
        assert not result.different
        assert len(result.near_ties) <= 1
        assert result.token_count > 150


def _today() -> list[str]:
    others = [name for name in CONFIGURATIONS if name not in ALWAYS]
    first = datetime.date.today().toordinal() * OTHERS_A_DAY % len(others)
    return [*ALWAYS, *(others + others)[first : first + OTHERS_A_DAY]]


@pytest.fixture
def without_compiling() -> Iterator[None]:
    """MLX's compiler runs g++ for each new kind of function, which costs more than all else here."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 300 tokens is prefilled in several chunks."""
    monkeypatch.setattr(scheduler, "CHUNK_TOKENS_BUSY", 100)
    monkeypatch.setattr(scheduler, "CHUNK_TOKENS_ALONE", 200)


@pytest.mark.parametrize("name", _today())
def test_batch_equals_serial(name: str, without_compiling: None, small_chunks: None) -> None:
    check(name, 1)


@pytest.mark.campaign
@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("seed", range(1, SEED_COUNT + 1))
def test_every_architecture(name: str, seed: int, without_compiling: None, small_chunks: None) -> None:
    check(name, seed)


def test_prompts_of_one_and_two_tokens_share_a_prefill(without_compiling: None) -> None:
    """Its one column has padding, which a windowed cache cannot have in a column by itself."""
    model, sampling = build("llama (windowed)"), frames.Sampling(max_tokens=8)
    requests = [Request(key, [5 + key, 6][: key + 1], sampling, 0) for key in range(2)]
    engine = Engine(model, 2)
    for request in requests:
        engine.submit(request)
    while len(engine.finished) < 2:
        assert engine.scheduler.turn()
    assert [engine.rows[one.key].generated for one in requests] == [alone(model, one) for one in requests]


def test_the_comparison_notices_a_cache_that_forgets_its_padding(
    monkeypatch: pytest.MonkeyPatch, without_compiling: None
) -> None:
    """A batch cache that does not move padded rows to where they belong: most rows differ."""
    monkeypatch.setattr(BatchKVCache, "finalize", lambda self: setattr(self, "_right_padding", None))
    model, requests = build("llama"), requests_of("llama/1")
    engine = together(model, requests)
    checked = [request for request in requests if request.key in engine.finished][:12]
    differ = [engine.rows[request.key].generated != alone(model, request) for request in checked]
    assert len(checked) == 12 and sum(differ) >= 5


def test_the_list_names_what_is_tested_and_knows_all_aliases() -> None:
    tested = {module_of(name) for name in CONFIGURATIONS}
    assert tested >= architectures.BATCHED >= architectures.PREFILLED_ALONE
    assert architectures.ALIASES == MODEL_REMAPPING
    assert all(architectures.is_batched(name) for name in ("llama", "mistral", "falcon_mamba", "kimi_k2"))


def test_what_is_not_batched_says_why() -> None:
    assert why_serial(build("qwen3")) == ""
    assert "chunks" in why_serial(build("llama4")) and "'nobody'" in architectures.serial_note("nobody")
    dynamic = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64}
    assert "scaled by the length" in why_serial(build("internlm3", configuration={**SHARED, **dynamic}))
