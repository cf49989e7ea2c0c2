"""The scheduler by itself, on real models: who is admitted when, who makes room, and that no text changes by it."""

import importlib
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.backends.text import TextModel, load_text_model
from mlxgui_grpc.engine.batch import kv_cost
from tests.conftest import TinyModels
from tests.support_engine import Engine, tokens_of
from tests.support_models import DEMO

ENDLESS = {0: -100.0, 2: -100.0}


@pytest.fixture(scope="module")
def demo() -> TextModel:
    return load_text_model(DEMO)


@pytest.fixture(scope="module")
def tiny(tiny_models: TinyModels) -> TextModel:
    return load_text_model(tiny_models.long)


GREEDY = frames.Sampling(max_tokens=570)
SEEDED = frames.Sampling(
    max_tokens=570, temperature=0.8, top_p=0.95, seed=7, presence_penalty=0.3, logit_bias=ENDLESS
)


def test_rows_that_make_room_say_what_they_would_have_said(tiny: TextModel) -> None:
    """Rows that outgrow what they reserved, with cache for fewer of that length: rows are put off and taken up again,
    every text, count and end is the same, greedy or seeded, and there is never more cache than allowed."""

    def converse(budget: int) -> Engine:
        engine = Engine(tiny, kv_budget_bytes=budget)
        lengths = [220, 40, 5, 190, 90, 20]
        rows = [engine.row(i, tokens_of(n, i), SEEDED if i % 2 else GREEDY) for i, n in enumerate(lengths)]
        held: list[int] = []

        def look(turn: int) -> None:
            if engine.scheduler.running_count > 1:
                held.append(engine.scheduler.kv_bytes)

        engine.scheduler.submit(rows)
        engine.run(range(6), look)
        assert not budget or max(held) <= budget
        assert engine.scheduler.kv_bytes == 0
        return engine

    free = converse(0)
    tight = converse(6 * 768 * tiny.kv_bytes_per_token)
    assert free.scheduler.preempted_count == 0 and tight.scheduler.preempted_count > 1
    assert tight.replies == free.replies
    assert {reply.token_count for reply in free.replies.values()} == {570}


def test_a_smaller_budget_takes_effect_between_two_steps(demo: TextModel) -> None:
    """Stop strings, ends and sampler states survive; the oldest row goes on; with room again all run again."""
    prompts = [f"<|user|>Tell me a story about {name}." for name in ("a cat", "a king", "the sea", "rain")]
    sampling = frames.Sampling(
        max_tokens=120,
        temperature=0.7,
        seed=3,
        frequency_penalty=0.4,
        stop=("zebra", "xylophone"),
        logit_bias=ENDLESS,
    )
    steady = frames.Sampling(max_tokens=120, logit_bias=ENDLESS)

    def converse(budgets: dict[int, int]) -> Engine:
        engine = Engine(demo)
        engine.scheduler.submit(
            [engine.row(i, prompt, steady if i % 2 else sampling) for i, prompt in enumerate(prompts)]
        )

        def limit(turn: int) -> None:
            if turn in budgets:
                engine.scheduler.limit(8, budgets[turn])
            if turn == 11 and budgets:
                assert (engine.scheduler.running_count, engine.scheduler.waiting_count) == (1, 3)

        engine.run(range(4), limit)
        return engine

    one_row = 256 * demo.kv_bytes_per_token
    free, tight = converse({}), converse({5: 4 * one_row, 10: one_row, 20: 0, 30: 2 * one_row, 60: 0})
    assert tight.scheduler.preempted_count >= 5
    assert tight.replies == free.replies


def test_a_long_prompt_makes_room_in_the_middle_of_its_prefill(tiny: TextModel) -> None:
    def converse(budget: int) -> Engine:
        engine = Engine(tiny)
        sampling = frames.Sampling(max_tokens=20)
        engine.scheduler.submit([engine.row(0, tokens_of(30, 0), sampling)])
        engine.scheduler.turn()
        engine.scheduler.submit([engine.row(1, tokens_of(1600, 1), sampling)])

        def limit(turn: int) -> None:
            if turn == 2:
                assert engine.prefilled and 1 not in engine.replies
                engine.scheduler.limit(8, budget)
            if turn == 6:
                assert engine.scheduler.running_count == (1 if budget else 2)

        engine.run(range(2), limit)
        return engine

    free, tight = converse(0), converse(1)
    assert (free.scheduler.preempted_count, tight.scheduler.preempted_count) == (0, 1)
    assert tight.replies == free.replies


def test_a_paused_row_makes_room_first_and_goes_on_where_it_was(demo: TextModel) -> None:
    sampling = frames.Sampling(max_tokens=60, temperature=0.9, seed=5, logit_bias=ENDLESS)
    one_row = 256 * demo.kv_bytes_per_token

    def converse(disturb: Callable[[Engine, int], None]) -> Engine:
        engine = Engine(demo)
        engine.scheduler.submit([engine.row(i, "Once upon a time", sampling) for i in range(2)])
        engine.run(range(2), lambda turn: disturb(engine, turn))
        return engine

    def pause_and_squeeze(engine: Engine, turn: int) -> None:
        if turn == 10:  # The older one, and yet it is not the younger one, which decodes, that gives way.
            engine.scheduler.pause(0)
            engine.scheduler.limit(8, one_row)
        if turn == 20:
            assert (engine.scheduler.running_count, engine.scheduler.preempted_count) == (1, 1)
            engine.scheduler.resume(0)
        if turn == 21:
            assert engine.scheduler.waiting_count == 1, "it waits for room"

    def pause_twice(engine: Engine, turn: int) -> None:
        if turn in (10, 14):
            engine.scheduler.pause(0)
        if turn == 13:
            engine.scheduler.resume(0)
            engine.scheduler.pause(0)
        if turn == 16:
            engine.scheduler.resume(0)

    free = converse(lambda engine, turn: None)
    assert converse(pause_and_squeeze).replies == free.replies
    assert converse(pause_twice).replies == free.replies


def test_a_row_that_runs_alone_is_served_whatever_the_budget(tiny: TextModel) -> None:
    """And so are ten of them, one after the other, in the order of their arrival."""
    engine = Engine(tiny, kv_budget_bytes=1)
    engine.scheduler.submit(
        [engine.row(i, tokens_of(300, i), frames.Sampling(max_tokens=5)) for i in range(10)]
    )

    def alone(turn: int) -> None:
        assert engine.scheduler.running_count <= 1

    engine.run(range(10), alone)
    assert engine.began == list(range(10)) and engine.scheduler.preempted_count == 0


def test_nobody_passes_a_row_that_waits_for_room(tiny: TextModel) -> None:
    """A long prompt at the head of the queue is not put off for ever by short ones behind it that would fit."""
    engine = Engine(tiny, kv_budget_bytes=4 * 1024 * tiny.kv_bytes_per_token)
    engine.scheduler.submit(
        [engine.row(i, tokens_of(20, i), frames.Sampling(max_tokens=100)) for i in range(3)]
    )
    engine.scheduler.turn()
    engine.scheduler.submit([engine.row(3, tokens_of(3000, 3), frames.Sampling(max_tokens=5))])
    engine.scheduler.submit(
        [engine.row(i, tokens_of(20, i), frames.Sampling(max_tokens=5)) for i in range(4, 8)]
    )
    engine.run(range(8))
    assert engine.began[:4] == [0, 1, 2, 3]


def test_larger_priorities_go_first_and_equal_ones_in_order_of_arrival(tiny: TextModel) -> None:
    engine = Engine(tiny, max_rows=1)
    priorities = [0, 5, -3, 5, 0, 100, -100]
    rows = [
        engine.row(i, tokens_of(4, i), frames.Sampling(max_tokens=2), priority=priority)
        for i, priority in enumerate(priorities)
    ]
    engine.scheduler.submit(rows)
    engine.run(range(7))
    assert engine.began == [5, 1, 3, 0, 4, 2, 6]


def test_a_stream_of_high_priorities_starves_nobody(tiny: TextModel) -> None:
    """Rows of priority 0 and -5, then one of priority 20 every second, and time for one row a second: a point of
    priority is worth a second, so the first gets its turn after 20 seconds and the second after 25."""
    engine = Engine(tiny, max_rows=1)
    short = frames.Sampling(max_tokens=1)
    engine.scheduler.submit(
        [engine.row(1, tokens_of(4, 1), short), engine.row(2, tokens_of(4, 2), short, priority=-5)]
    )
    for second in range(30):
        engine.now = float(second)
        engine.scheduler.submit([engine.row(100 + second, tokens_of(4, second), short, priority=20)])
        while len(engine.began) == second:
            engine.scheduler.turn()
    assert engine.began == [*range(100, 120), 1, *range(120, 125), 2, 125, 126, 127]


def test_fewer_rows_at_once_lets_those_that_run_finish_and_more_start_at_once(tiny: TextModel) -> None:
    engine = Engine(tiny, max_rows=4)
    sampling = frames.Sampling(max_tokens=40)
    engine.scheduler.submit([engine.row(i, tokens_of(4, i), sampling) for i in range(12)])
    running: list[int] = []

    def limit(turn: int) -> None:
        if turn == 5:
            assert engine.scheduler.running_count == 4
            engine.scheduler.limit(1, 0)
        if turn == 100:
            engine.scheduler.limit(3, 0)
        running.append(engine.scheduler.running_count)

    engine.run(range(12), limit)
    assert {reply.token_count for reply in engine.replies.values()} == {40}
    assert running[6] == 4, "nobody is thrown out"
    assert max(running[60:100]) == 1 and max(running[110:]) == 3
    assert engine.began == list(range(12))


def test_a_cancelled_row_leaves_the_queue_at_once(tiny: TextModel) -> None:
    engine = Engine(tiny, max_rows=1)
    sampling = frames.Sampling(max_tokens=30)
    engine.scheduler.submit([engine.row(i, tokens_of(4, i), sampling) for i in range(4)])
    engine.scheduler.turn()
    engine.scheduler.cancel(frozenset({1, 2}))
    assert engine.scheduler.waiting_count == 1
    engine.run([0, 3])
    assert engine.began == [0, 3] and set(engine.scheduler.keys()) == set()


def test_a_recomputed_prompt_reports_no_progress_twice(tiny: TextModel) -> None:
    """Its reader has had text of it already."""
    engine = Engine(tiny)
    sampling = frames.Sampling(max_tokens=20)
    engine.scheduler.submit([engine.row(i, tokens_of(1300, i), sampling) for i in range(2)])

    def squeeze(turn: int) -> None:
        if len(engine.began) == 2 and engine.scheduler.preempted_count == 0:
            told.append(len(engine.prefilled))
            engine.scheduler.limit(8, 1)

    told: list[int] = []
    engine.run(range(2), squeeze)
    assert engine.scheduler.preempted_count == 1 and told[0] > 0
    assert len(engine.prefilled) == told[0]


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 4096,
}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
STATE = {"state_size": 8, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4}


@pytest.mark.parametrize(
    ("family", "special", "bytes_per_token"),
    [
        ("llama", {}, 6 * 2 * 2 * 16 * 4),  # layers x (key, value) x shared heads x width x bytes
        ("deepseek_v3", {**LATENT, "n_routed_experts": None}, 6 * (32 + 8) * 4),  # one latent row per layer
        (
            "gemma3_text",
            {"sliding_window": 128, "sliding_window_pattern": 6},
            1 * 2 * 2 * 16 * 4,
        ),  # one is global
        ("mamba", STATE, 0),  # what it holds does not grow
    ],
)
def test_what_a_token_takes_is_what_the_caches_grow_by(
    family: str, special: dict[str, Any], bytes_per_token: int
) -> None:
    module = importlib.import_module(f"mlx_lm.models.{family}")
    config = {"model_type": family, **SIZES, **special}
    model = module.Model(module.ModelArgs.from_dict(config))
    cost, cache = kv_cost(model), make_prompt_cache(model)
    for length in (767, 1):
        model(mx.zeros((1, length), dtype=mx.int32), cache=cache)
    assert cost.bytes_per_token == bytes_per_token
    assert cost.of(768) == sum(layer.nbytes for layer in cache) > 0


class Panic(BaseException):
    """As those of Rust libraries are: no Exception."""


@pytest.mark.parametrize("error", [ValueError("no prefix"), Panic("a bug")])
@pytest.mark.parametrize("way", ["decodes", "pauses", "makes room"])
def test_a_row_whose_text_cannot_be_made_fails_alone(tiny: TextModel, way: str, error: BaseException) -> None:
    """Wherever its token is accounted for: its caller is told once, and the others go on."""

    def refuse(token: int) -> str:
        raise error

    engine = Engine(tiny)
    sampling = frames.Sampling(max_tokens=12, logit_bias=ENDLESS)
    rows = [engine.row(key, tokens_of(5, key), sampling) for key in range(3)]
    engine.scheduler.submit(rows)
    for _ in range(3):
        engine.scheduler.turn()
    rows[2].detokenizer.add = refuse
    if way == "pauses":
        engine.scheduler.pause(2)
        engine.scheduler.resume(2)
    elif way == "makes room":
        engine.scheduler._preempt()
    engine.run(range(3))
    assert list(engine.failed) == [2] and engine.failed[2].reason == "GENERATION_FAILED"
    assert str(error) in engine.failed[2].message and engine.scheduler.keys() == ()
    assert [engine.replies[key].finish for key in (0, 1)] == ["length", "length"]


@pytest.mark.parametrize("way", ["pauses", "makes room"])
def test_a_row_that_leaves_the_batch_as_memory_runs_out_is_not_lost(tiny: TextModel, way: str) -> None:
    def refuse(token: int) -> str:
        raise MemoryError

    engine = Engine(tiny)
    rows = [engine.row(key, tokens_of(5, key), frames.Sampling(max_tokens=12)) for key in range(2)]
    engine.scheduler.submit(rows)
    engine.scheduler.turn()
    rows[1].detokenizer.add = refuse
    with pytest.raises(MemoryError):
        engine.scheduler.pause(1) if way == "pauses" else engine.scheduler._preempt()
    engine.scheduler.fail_all("GENERATION_FAILED", "x")
    assert set(engine.failed) == {0, 1}
