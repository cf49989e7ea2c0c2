"""Log-probabilities against a computation by hand from the model's own logits, and prompts that are computed once."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlxgui_grpc.engine import frames, scheduler
from mlxgui_grpc.engine.backends.text import TextModel, load_text_model
from mlxgui_grpc.engine.logprobs import TokenTexts, logprob_bytes
from mlxgui_grpc.engine.runtime import refuse_many_logprobs
from mlxgui_grpc.errors import InvalidRequestError
from tests.conftest import TinyModels
from tests.support_engine import Engine, tokens_of
from tests.support_models import DEMO


@pytest.fixture(scope="module")
def tiny(tiny_models: TinyModels) -> TextModel:
    return load_text_model(tiny_models.long)


def by_hand(model: TextModel, tokens: list[int]) -> Any:
    """log p of each token of the vocabulary at each place, given those before: line i is of token i + 1."""
    logits = model.model(mx.array([tokens]), cache=make_prompt_cache(model.model))[0]
    lines = np.array(logits.astype(mx.float32)).astype(np.float64)
    lines -= lines.max(axis=-1, keepdims=True)
    return lines - np.log(np.exp(lines).sum(axis=-1, keepdims=True))


def agrees(entry: frames.Logprob, line: Any, count: int) -> None:
    assert entry.logprob == pytest.approx(line[entry.token], abs=2e-4)
    assert len(entry.top) == count
    values = [other.logprob for other in entry.top]
    assert values == sorted(values, key=lambda value: -(value or 0.0))
    assert values == pytest.approx(sorted(line, reverse=True)[:count], abs=2e-4)
    assert [other.logprob for other in entry.top] == pytest.approx(
        [line[o.token] for o in entry.top], abs=2e-4
    )
    assert len({other.token for other in entry.top}) == count and not any(other.top for other in entry.top)


def test_they_are_the_model_s_own_whatever_the_sampler_makes_of_them(tiny: TextModel) -> None:
    """Rows with 0, 1, 5 and 20 of the likeliest beside rows with none, under penalties, bias and a constraint, and
    joined at different times."""
    wants: dict[int, frames.Sampling] = {
        0: frames.Sampling(max_tokens=12, top_logprobs=0),
        1: frames.Sampling(max_tokens=9, top_logprobs=1, temperature=0.7, top_k=4, seed=1),
        2: frames.Sampling(max_tokens=20, top_logprobs=5, frequency_penalty=1.0, logit_bias={77: 6.0}),
        3: frames.Sampling(max_tokens=14, top_logprobs=20, temperature=1.5, top_p=0.8, seed=2),
        4: frames.Sampling(max_tokens=30, temperature=1.0, seed=3),
        5: frames.Sampling(
            max_tokens=30,
            top_logprobs=2,
            temperature=1.0,
            seed=4,
            constraint=frames.Constraint("regex", "[0-9]{8}x"),
        ),
    }
    engine = Engine(tiny, max_rows=4)
    rows = {key: engine.guided(key, f"Say {key} of them", given) for key, given in wants.items()}
    engine.scheduler.submit(list(rows.values()))
    engine.run(rows)
    assert not engine.replies[4].logprobs
    for key, row in rows.items():
        count = wants[key].top_logprobs
        if count is None:
            continue
        reply = engine.replies[key]
        assert [entry.token for entry in reply.logprobs] == row.generated
        lines = by_hand(tiny, row.prompt + row.generated)
        for at, entry in enumerate(reply.logprobs):
            agrees(entry, lines[len(row.prompt) - 1 + at], count)
            if count:
                assert math.fsum(math.exp(other.logprob or 0.0) for other in entry.top) <= 1.0001


@pytest.mark.parametrize("length", [1, 2, 40, 700])
def test_those_of_a_prompt_come_with_an_echo(tiny: TextModel, length: int) -> None:
    """Short and in chunks, beside a row that decodes, for each of two choices; nothing predicts its first token."""
    engine = Engine(tiny)
    prompt = [3 + index * 31 % 900 for index in range(length)]
    given = frames.Sampling(max_tokens=2, top_logprobs=3, temperature=1.0, seed=1)
    engine.scheduler.submit([engine.row(9, "Hello", frames.Sampling(max_tokens=20))])
    engine.scheduler.submit([engine.row(key, prompt, given, echo=True) for key in range(2)])
    engine.run([0, 1, 9])
    lines = by_hand(tiny, prompt)
    for key in range(2):
        entries = engine.replies[key].prompt_logprobs
        assert [entry.token for entry in entries] == prompt
        assert (entries[0].logprob, entries[0].top) == (None, ())
        for at in range(1, length):
            agrees(entries[at], lines[at - 1], 3)
        assert len(engine.replies[key].logprobs) == 2


@pytest.mark.parametrize("top_logprobs", [None, 0])
def test_a_row_that_generates_nothing_ends_with_its_prefill(
    tiny: TextModel, top_logprobs: int | None
) -> None:
    """Beside one that does, whose text is what it is alone; one that is to pause then has no one to resume it."""
    prompt, text = list(range(3, 43)), frames.Sampling(max_tokens=5)
    alone = Engine(tiny)
    alone.scheduler.submit([alone.row(9, "Hello", text)])
    alone.run([9])
    engine = Engine(tiny)
    given = frames.Sampling(top_logprobs=top_logprobs)
    rows = [engine.row(key, prompt, given, echo=True) for key in range(2)]
    engine.scheduler.submit([rows[0], engine.row(9, "Hello", text), rows[1]])
    engine.scheduler.pause(0)
    engine.run([0, 1, 9])
    assert engine.replies[9] == alone.replies[9]
    for key in range(2):
        reply = engine.replies[key]
        assert (reply.finish, reply.token_count, reply.logprobs) == ("length", 0, [])
        assert [entry.token for entry in reply.prompt_logprobs] == ([] if top_logprobs is None else prompt)
    assert not engine.scheduler.keys()


def test_tokens_are_told_as_their_exact_bytes(tiny: TextModel) -> None:
    """Joined, the bytes of a text's tokens are the text's; half a character is shown as U+FFFD."""
    texts = TokenTexts(tiny.tokens.backend)
    for text in ("Hello, world! ½ naïve 東京 🙂\n\ttab", "<think>\n\nyes</think><tool_call>", "a  b"):
        ids = tiny.tokens.tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(texts.bytes_of(token) for token in ids).decode() == text
    half = next(token for token in range(1000) if texts.bytes_of(token) == b"\xf0")
    assert half and texts.bytes_of(10**6) == b""


def test_a_sentencepiece_tokenizer_s_bytes() -> None:
    """Its word boundary is a space, its byte tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {"<unk>": 0, "▁Hi": 1, "<0xE2>": 2, "<0x82>": 3, "é": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    texts = TokenTexts(tokenizer)
    assert [texts.bytes_of(token) for token in range(1, 5)] == [b" Hi", b"\xe2", b"\x82", "é".encode()]


@pytest.mark.parametrize("length", [100, 900])
def test_choices_of_one_prompt_are_prefilled_once(tiny: TextModel, length: int) -> None:
    """Four rows of one prompt cost one prefill and say what four requests with their seeds would; a row more than
    there is room for computes it again by itself."""
    prompt = [3 + index * 37 % 900 for index in range(length)]
    given = frames.Sampling(max_tokens=6, temperature=0.9, seed=11)

    def converse(prompts: list[list[int]], max_rows: int) -> Engine:
        engine = Engine(tiny, max_rows=max_rows)
        engine.scheduler.submit([engine.row(key, own, given) for key, own in enumerate(prompts)])
        engine.run(range(len(prompts)))
        return engine

    shared, apart = converse([prompt] * 4, 8), converse([list(prompt) for _ in range(4)], 8)
    assert shared.replies == apart.replies and len({reply.text for reply in shared.replies.values()}) > 1
    saved = apart.scheduler.work_count - shared.scheduler.work_count
    assert 3 * (length - 1) <= saved <= 3 * length
    tight = converse([prompt] * 4, 3)
    assert tight.replies == apart.replies
    assert length - 1 <= tight.scheduler.work_count - shared.scheduler.work_count <= length


def test_a_shared_prefill_goes_on_for_who_stays(tiny: TextModel) -> None:
    """One choice is cancelled while the prompt is computed, another makes room for the rest and comes back."""
    prompt = [3 + index * 41 % 900 for index in range(1500)]
    given = frames.Sampling(max_tokens=5, temperature=0.9, seed=12)

    def converse(disturb: bool) -> Engine:
        engine = Engine(tiny)
        engine.scheduler.submit([engine.row(9, "Hi", frames.Sampling(max_tokens=60))])
        engine.scheduler.submit([engine.row(key, prompt, given) for key in range(4)])

        def each(turn: int) -> None:
            if disturb and len(engine.prefilled) == 1 and engine.scheduler.preempted_count == 0:
                engine.scheduler.cancel(frozenset({1}))
                engine.scheduler.limit(8, 1)
                engine.scheduler.turn()
                engine.scheduler.limit(8, 0)

        engine.run([0, 2, 3, 9], each)
        return engine

    quiet, disturbed = converse(False), converse(True)
    assert disturbed.scheduler.preempted_count > 0 and 1 not in disturbed.replies
    assert {key: disturbed.replies[key] for key in (0, 2, 3)} == {
        key: quiet.replies[key] for key in (0, 2, 3)
    }


def test_the_demo_model_is_sure_of_what_it_says() -> None:
    model = load_text_model(DEMO)
    engine = Engine(model)
    engine.scheduler.submit(
        [engine.row(0, "The capital of France is", frames.Sampling(max_tokens=3, top_logprobs=2))]
    )
    engine.run([0])
    for entry in engine.replies[0].logprobs:
        assert entry.top[0].token == entry.token and entry.top[0].logprob == entry.logprob


def test_those_of_long_prompts_come_in_frames_of_bounded_size(
    tiny: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are computed in short turns while others decode; the estimate of their bytes is none too low."""
    monkeypatch.setattr(scheduler, "STEP_LOGPROB_BYTES", 50_000)
    engine = Engine(tiny)
    receive, largest = engine.scheduler._send, 0

    def look(event: frames.Event) -> None:
        nonlocal largest
        if isinstance(event, frames.Step):
            size = len(frames.encode(event))
            assert size <= 200 + 200 * len(event.pieces) + sum(map(logprob_bytes, event.pieces))
            largest = max(largest, size)
        receive(event)

    engine.scheduler._send = look
    prompt = tokens_of(700, 1)
    engine.scheduler.submit(
        [engine.row(9, "Hello", frames.Sampling(max_tokens=40, logit_bias={0: -100, 2: -100}))]
    )
    engine.scheduler.turn()
    given = frames.Sampling(max_tokens=2, top_logprobs=5)
    engine.scheduler.submit([engine.row(key, prompt, given, echo=True) for key in range(3)])
    engine.run([0, 1, 2, 9])
    assert 20_000 < largest < 100_000
    for key in range(3):
        assert [entry.token for entry in engine.replies[key].prompt_logprobs] == prompt
    done = [event.done_token_count for event in engine.prefilled]
    assert max(np.diff(done)) <= scheduler.CHUNK_TOKENS_SCORED and len(done) >= 5


def test_more_of_a_prompt_than_can_be_told_are_refused() -> None:
    def submit(choices: int) -> frames.Submit:
        sampling = frames.Sampling(top_logprobs=20)
        return frames.Submit(tuple(range(choices)), frames.Prompt(text="a"), sampling, echo=True)

    refuse_many_logprobs(submit(4), 12_000)
    with pytest.raises(InvalidRequestError, match=r"12000 tokens .* 5 choices .* at most 1048576") as refused:
        refuse_many_logprobs(submit(5), 12_000)
    assert refused.value.field == "sampling.top_logprobs"
