"""Embedding models and cross-encoders on real tiny models: vectors against torch's, batches, places in line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxgui_grpc import model_view
from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.backends.embedding import _POOLS, load_encoder
from mlxgui_grpc.engine.embedding_queue import BATCH_TOKENS, EmbeddingQueue, Job
from mlxgui_grpc.engine.embedding_tokens import EncoderTokenizer
from mlxgui_grpc.errors import ContextLengthExceededError, InvalidRequestError, QueueFullError
from tests.support_encoders import (
    EMBEDDERS,
    MAX_TOKENS,
    QWEN3_END,
    REFERENCES,
    RERANKERS,
    build_encoder,
)

TORCH = json.loads(REFERENCES.read_text())
TEXTS: list[str] = TORCH["texts"]
WORDS = ("the", "cat", "sat", "on", "a", "mat", "what", "is", "the", "capital", "of", "france", "hello")
# 300 texts of 1 to 90 words, in no order of length.
MIXED = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(1 + i * 37 % 90)) for i in range(300)]


class Engine:
    """One model with its queue; `sent` is what the control process would hear."""

    def __init__(self, folder: Path, name: str) -> None:
        view = model_view.make_view(folder, folder.parent / "views" / name)
        self.model = load_encoder(view, is_reranker=name in RERANKERS)
        self.tokenizer = EncoderTokenizer(
            self.model.tokens, self.model.tokens.context_length, self.model.end_token
        )
        self.restart()

    def restart(self, **queue: Any) -> None:
        self.sent: list[Any] = []
        self.pass_count = 0
        self.queue = EmbeddingQueue(self.model, send=self.sent.append, **queue)

    def embed(self, texts: list[str], **job: Any) -> Any:
        """The vectors of texts, alone in the queue."""
        self.restart()
        self.submit(1, texts, **job)
        self.finish()
        return vectors_of(self.sent[-1])

    def submit(self, key: int, texts: list[str], **job: Any) -> None:
        sequences = self.tokenizer.prompts(tuple(frames.Prompt(text=text) for text in texts))
        self.queue.submit(Job(key, "embed", sequences, **job))

    def finish(self) -> None:
        while self.queue.turn():
            self.pass_count += 1

    def answers(self) -> list[int]:
        return [event.key for event in self.sent if isinstance(event, frames.Embedded)]


def vectors_of(event: frames.Embedded) -> Any:
    return np.frombuffer(event.vectors, "<f4").reshape(-1, event.dimensions)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Engine]:
    folder = tmp_path_factory.mktemp("encoders")
    engines: dict[str, Engine] = {}

    def get(name: str) -> Engine:
        if name not in engines:
            engines[name] = Engine(build_encoder(folder / name, name), name)
        engines[name].restart()
        return engines[name]

    return get


@pytest.mark.parametrize("name", EMBEDDERS)
def test_vectors_are_torch_s(engine: Callable[[str], Engine], name: str) -> None:
    """Texts of many lengths in one job; torch had each alone. Other texts have other vectors."""
    vectors, expected = engine(name).embed(TEXTS), np.array(TORCH["vectors"][name])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    cosines = vectors @ expected.T / np.linalg.norm(expected, axis=1)
    assert np.diag(cosines).min() >= 0.9999
    assert (cosines.argmax(axis=1) == np.arange(len(TEXTS))).all()


@pytest.mark.parametrize("name", RERANKERS)
def test_scores_are_torch_s(engine: Callable[[str], Engine], name: str) -> None:
    reranker = engine(name)
    pairs = reranker.tokenizer.pairs(TORCH["query"], tuple(TEXTS))
    reranker.queue.submit(Job(1, "rerank", pairs))
    reranker.finish()
    ranked = reranker.sent[-1]
    assert isinstance(ranked, frames.Reranked) and ranked.prompt_token_count == sum(
        len(pair.ids) for pair in pairs
    )
    assert np.abs(np.array(ranked.scores) - TORCH["scores"][name]).max() < 1e-4


@pytest.mark.parametrize("name", ["bert", "modernbert", "qwen3", "xlm-roberta"])
def test_a_batch_changes_no_vector_and_no_order(engine: Callable[[str], Engine], name: str) -> None:
    """300 texts at once, in far fewer passes, equal those of one at a time."""
    model = engine(name)
    texts = MIXED if name == "bert" else MIXED[:60]
    together = model.embed(texts)
    assert 0 < model.pass_count < len(texts) / 5
    alone = np.concatenate([model.embed([text]) for text in texts])
    assert np.abs(together - alone).max() < 1e-5


def test_fewer_dimensions_are_normalised_again(engine: Callable[[str], Engine]) -> None:
    model = engine("bert")
    whole, part = model.embed(TEXTS[:3]), model.embed(TEXTS[:3], dimensions=7)
    head = whole[:, :7]
    assert np.allclose(part, head / np.linalg.norm(head, axis=1, keepdims=True), atol=1e-6)
    model.restart()
    model.submit(1, TEXTS[:1], dimensions=49)
    model.finish()
    assert (model.sent[-1].reason, model.sent[-1].field) == ("INVALID_PARAMETER", "dimensions")


def test_no_pass_is_larger_than_its_limit(
    engine: Callable[[str], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And little of it is filling: no row is less than half as long as the longest, unless all are short."""
    model = engine("bert")
    shapes: list[tuple[int, int, int]] = []
    compute = model.queue._compute

    def note(sequences: Any) -> Any:
        sizes = [len(sequence.ids) for sequence in sequences]
        shapes.append((len(sizes), min(sizes), max(sizes)))
        return compute(sequences)

    monkeypatch.setattr(model.queue, "_compute", note)
    model.submit(1, MIXED)
    model.finish()
    assert all(rows * longest <= BATCH_TOKENS for rows, _, longest in shapes)
    assert all(shortest >= longest / 2 or longest <= 32 for _, shortest, longest in shapes)


def test_jobs_stand_in_line_by_priority_and_small_ones_share_a_pass(
    engine: Callable[[str], Engine],
) -> None:
    model = engine("bert")
    for key, time, priority in ((1, 0.0, 0), (2, 40.0, 0), (3, 80.0, 100), (4, 10.0, -100)):
        model.submit(key, MIXED[:90], priority=priority, submit_time=time)
    model.finish()
    assert model.answers() == [3, 1, 2, 4]
    assert model.queue.work_count == sum(
        event.prompt_token_count for event in model.sent if isinstance(event, frames.Embedded)
    )
    model.restart()
    for key in range(1, 21):
        model.submit(key, ["hello world"])
    model.finish()
    assert model.pass_count == 1 and sorted(model.answers()) == list(range(1, 21))


def test_a_long_job_lets_those_pass_that_came_while_it_was_computed(engine: Callable[[str], Engine]) -> None:
    """On a clock on which a pass takes a second: who comes 2 seconds later waits for some passes, not for all."""
    model = engine("bert")
    model.restart(clock=iter(np.arange(0.0, 1e6, 0.5)).__next__)
    model.submit(1, MIXED, submit_time=0.0)
    model.submit(2, ["hello"], submit_time=1.0)
    model.finish()
    assert model.answers() == [2, 1] and model.pass_count > 5


def test_a_cancelled_job_leaves_between_two_passes(engine: Callable[[str], Engine]) -> None:
    model = engine("bert")
    model.submit(1, MIXED)
    model.submit(2, TEXTS)
    assert model.queue.turn()
    assert (model.queue.running_count, model.queue.waiting_count) == (1, 1)
    done = model.queue.work_count
    model.queue.cancel(frozenset({1}))
    model.finish()
    assert model.answers() == [2]
    assert model.queue.work_count - done == sum(
        len(one.ids) for one in model.tokenizer.prompts(tuple(frames.Prompt(text=text) for text in TEXTS))
    )


def test_all_fail_together_and_the_queue_goes_on(engine: Callable[[str], Engine]) -> None:
    model = engine("bert")
    model.submit(1, MIXED)
    model.submit(2, TEXTS)
    model.queue.fail_all("GENERATION_FAILED", "x")
    assert model.sent == [frames.Failed((1, 2), "GENERATION_FAILED", "x")] and not model.queue.turn()
    assert len(model.embed(["hello"])) == 1


def test_a_text_of_qwen3_ends_with_its_end_token_once(engine: Callable[[str], Engine]) -> None:
    """Token ids are taken as they are."""
    tokenizer = engine("qwen3").tokenizer
    (text,) = tokenizer.prompts((frames.Prompt(text="hello"),))
    assert text.ids[-1] == QWEN3_END and QWEN3_END not in text.ids[:-1]
    assert tokenizer.tokenize(frames.Prompt(text="hello")) == text.ids.tolist()
    (ids,) = tokenizer.prompts((frames.Prompt(token_ids=(5, 6)),))
    assert ids.ids.tolist() == [5, 6]


def test_what_does_not_fit_is_refused_by_name(engine: Callable[[str], Engine]) -> None:
    """Nothing is cut, whatever the checkpoint's tokenizer was stored with."""
    tokenizer = engine("bert").tokenizer
    fits, long = "a " * (MAX_TOKENS - 2), "a " * (MAX_TOKENS - 1)
    (whole,) = tokenizer.prompts((frames.Prompt(text=fits),))
    assert len(whole.ids) == MAX_TOKENS
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (
            ContextLengthExceededError,
            rf"inputs\[1\] has {MAX_TOKENS + 1} tokens .* {MAX_TOKENS}",
            lambda: tokenizer.prompts((frames.Prompt(text="a"), frames.Prompt(text=long))),
        ),
        (
            ContextLengthExceededError,
            r"inputs\[0\] has 3000000 bytes",
            lambda: tokenizer.prompts((frames.Prompt(text="a" * 3_000_000),)),
        ),
        (
            InvalidRequestError,
            r"inputs\[0\]: token id 5000",
            lambda: tokenizer.prompts((frames.Prompt(token_ids=(1, 5000)),)),
        ),
        (
            ContextLengthExceededError,
            r"documents\[1\] has .* with the query",
            lambda: tokenizer.pairs("what", ("a", long)),
        ),
    ]
    for error, words, call in cases:
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize("kind", ["max", "weighted_mean"])
def test_the_rarer_ways_of_pooling(kind: Any) -> None:
    """By their definitions; what fills a row up has no part in them."""
    states = np.random.default_rng(1).standard_normal((2, 5, 3)).astype(np.float32)
    lengths = (5, 2)
    mask = np.array([[float(place < length) for place in range(5)] for length in lengths], np.float32)
    pooled = np.array(_POOLS[kind](mx.array(states), mx.array(mask)))
    for row, length in enumerate(lengths):
        own, weights = states[row, :length], np.arange(1, length + 1)[:, None]
        expected = own.max(axis=0) if kind == "max" else (own * weights).sum(axis=0) / weights.sum()
        assert np.allclose(pooled[row], expected, atol=1e-6)


def test_jobs_that_are_held_are_bounded(engine: Callable[[str], Engine]) -> None:
    """When they are answered, others may come; texts of one kind hold little more than their token ids."""
    model = engine("bert")
    model.restart(limit_bytes=10_000)
    queue = model.queue
    sequences = model.tokenizer.prompts(tuple(frames.Prompt(text="hello") for _ in range(30)))
    assert all(sequence.segments is None for sequence in sequences)
    jobs = [Job(key, "embed", sequences) for key in range(2)]
    for job in jobs:
        queue.refuse_when_full()
        queue.hold(job)
        queue.submit(job)
    with pytest.raises(QueueFullError, match="try again"):
        queue.refuse_when_full()
    del job, jobs
    model.finish()
    queue.refuse_when_full()
    assert model.answers() == [0, 1]
