"""Vision models in the engine: their answers are mlx-vlm's own, alone and in a batch, and pictures are seen once."""

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from PIL import Image

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.backends.generating import LOADERS, load_tokenizer
from mlxgui_grpc.engine.backends.text import TextModel
from mlxgui_grpc.engine.detokenizer import Detokenizer, StopMatcher
from mlxgui_grpc.engine.prompts import PromptTokenizer
from mlxgui_grpc.engine.row import EngineRow
from mlxgui_grpc.engine.sampling import RowSampling, SamplingDefaults, key_word
from mlxgui_grpc.engine.scheduler import Scheduler
from mlxgui_grpc.engine.vision_model import FeatureCache, Features
from mlxgui_grpc.engine.vision_prompts import RowImages, flat_images, grid_positions, normal_render
from mlxgui_grpc.errors import InvalidRequestError, ModelLoadFailedError, ModelUnsafeError, QueueFullError
from tests.support_models import build_tiny
from tests.support_vision import FAMILIES, build_tiny_vision, picture

Load = Callable[[str], TextModel]
WIDE, TALL, SMALL = picture(1), picture(2, 48, 90), picture(3, 30, 30)
LONG = " ".join(str(number) for number in range(150))
MAX_TURNS = 3000


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Builds and loads a family once."""

    @cache
    def loaded(family: str) -> TextModel:
        return LOADERS["vision"](build_tiny_vision(tmp_path_factory.mktemp("vision") / family, family))

    return loaded


def chat(*contents: Any) -> frames.Prompt:
    """Turns of the user and the assistant; pictures stand where they are seen."""
    images: list[frames.Image] = []
    messages: list[dict[str, Any]] = []
    for at, content in enumerate(contents):
        parts: Any = content
        if not isinstance(content, str):
            images += [part for part in content if isinstance(part, frames.Image)]
            parts = [
                {"type": "image"} if isinstance(part, frames.Image) else {"type": "text", "text": part}
                for part in content
            ]
        messages.append({"role": "assistant" if at % 2 else "user", "content": parts})
    return frames.Prompt(messages=json.dumps(messages).encode(), images=tuple(images))


def prompts_of(model: TextModel) -> PromptTokenizer:
    tokens = model.tokens
    return PromptTokenizer(
        tokens.tokenizer, tokens.render, tokens.vocabulary_size, tokens.context_length, lambda: None
    )


def tokenize(model: TextModel, prompt: frames.Prompt) -> tuple[list[int], RowImages | None]:
    prompts = prompts_of(model)
    if not prompt.images:
        return prompts.tokenize(prompt), None
    assert model.vision is not None
    return model.vision.tokenize(prompts.render(prompt), prompt.images)


class Engine:
    """A scheduler on a loaded model, with what came out of it."""

    def __init__(self, model: TextModel, max_rows: int = 16, kv_budget_bytes: int = 0) -> None:
        self.model = model
        self.rows: dict[int, EngineRow] = {}
        self.finished: set[int] = set()
        self.failed: dict[int, frames.Failed] = {}
        self.scheduler = Scheduler(
            model.model,
            end_tokens=model.tokens.end_tokens,
            max_rows=max_rows,
            send=self._receive,
            kv_cost=model.kv_cost,
            kv_budget_bytes=kv_budget_bytes,
        )

    def _receive(self, event: frames.Event) -> None:
        if isinstance(event, frames.Failed):
            self.failed |= dict.fromkeys(event.keys, event)
        elif isinstance(event, frames.Step):
            self.finished |= {piece.key for piece in event.pieces if piece.finish}

    def submit(self, prompt: frames.Prompt, sampling: frames.Sampling, *keys: int) -> None:
        ids, images = tokenize(self.model, prompt)
        rows = [
            EngineRow(
                key=key,
                prompt=ids,
                sampling=RowSampling(
                    sampling,
                    SamplingDefaults(),
                    key_word(sampling.seed, index),
                    ids,
                    self.model.tokens.vocabulary_size,
                ),
                detokenizer=Detokenizer(self.model.tokens.backend),
                stop=StopMatcher(()),
                token_limit=sampling.max_tokens,
                images=images,
            )
            for index, key in enumerate(keys)
        ]
        self.rows |= {row.key: row for row in rows}
        self.scheduler.submit(rows)

    def run(self, *keys: int) -> None:
        for _ in range(MAX_TURNS):
            if self.finished.union(self.failed).issuperset(keys):
                return
            self.scheduler.turn()
        raise AssertionError(f"{set(keys) - self.finished} did not end")

    def answer(self, prompt: frames.Prompt, sampling: frames.Sampling) -> list[int]:
        """The tokens that a request gets alone."""
        self.submit(prompt, sampling, 0)
        self.run(0)
        self.finished.clear()
        return self.rows[0].generated


def greedy(count: int) -> frames.Sampling:
    return frames.Sampling(max_tokens=count, temperature=0.0)


def reference(model: TextModel, prompt: frames.Prompt, count: int) -> list[int]:
    """What mlx-vlm's own model answers, whole prompt at once, with its own caches and positions."""
    own = model.model.model
    assert model.vision is not None
    out = model.vision._processor(
        text=[prompts_of(model).render(prompt)],
        images=[Image.frombytes("RGB", (each.width, each.height), each.pixels) for each in prompt.images]
        or None,
    )
    arrays = {name: mx.array(value) for name, value in out.items() if value is not None}
    ids, pixels = arrays.pop("input_ids"), arrays.pop("pixel_values", None)
    found = own.get_input_embeddings(ids, pixels, mask=arrays.pop("attention_mask"), **arrays)
    inputs = {name: value for name, value in found.to_dict().items() if value is not None}
    caches = make_prompt_cache(own.language_model)
    logits = own.language_model(ids, cache=caches, **inputs).logits
    deltas = {"rope_deltas": found.rope_deltas} if found.rope_deltas is not None else {}
    tokens = []
    for _ in range(count):
        tokens.append(int(mx.argmax(logits[0, -1])))
        logits = own.language_model(mx.array([tokens[-1:]]), cache=caches, **deltas).logits
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answers_are_those_of_mlx_vlm(load: Load, family: str) -> None:
    """Text alone, a picture, two in order, two across turns; another picture or another order is another answer."""
    model = load(family)
    engine = Engine(model, max_rows=1)
    prompts = {
        "text": chat("what is the capital of France"),
        "one": chat([WIDE, "what is this"]),
        "two": chat([WIDE, "compare with", TALL]),
        "swapped": chat([TALL, "compare with", WIDE]),
        "turns": chat([WIDE, "what is this"], "noise", ["and this", TALL]),
    }
    answers = {name: engine.answer(prompt, greedy(12)) for name, prompt in prompts.items()}
    assert answers == {name: reference(model, prompt, 12) for name, prompt in prompts.items()}
    assert len({tuple(answer) for answer in answers.values()}) == len(prompts)


@dataclasses.dataclass(frozen=True)
class Request:
    """A row of the mixed batch: when it comes, and what is done to it."""

    prompt: frames.Prompt
    sampling: frames.Sampling
    join: int = 0
    pause: int = 0
    cancel: int = 0


def mixed_requests() -> list[Request]:
    sampled = frames.Sampling(max_tokens=14, temperature=0.9, top_p=0.9, seed=7, repetition_penalty=1.2)
    return [
        Request(chat("hello"), greedy(30)),
        Request(chat([WIDE, "what is this"]), greedy(25)),
        Request(chat([TALL, "a"]), msgspec.structs.replace(sampled, max_tokens=20)),
        Request(chat("tell me a story about a fox " * 4), sampled, join=2),
        Request(chat([SMALL, "b", WIDE]), greedy(16), join=3, pause=9),
        Request(chat([WIDE, LONG]), greedy(10), join=4),
        Request(chat([WIDE, "first"], "yes", ["second", TALL]), sampled, join=6, cancel=14),
        Request(chat(LONG), greedy(12), join=7, pause=16),
        Request(chat([TALL, "last"]), greedy(8), join=12),
        Request(chat("good bye"), greedy(9), join=13),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_equals_serial(load: Load, family: str) -> None:
    """Ten requests, text and pictures, that come, pause, make room and leave at different turns: each has the tokens
    that it has alone."""
    model = load(family)
    assert model.batchable and not model.notes
    requests = mixed_requests()
    alone = Engine(model, max_rows=1)
    expected = [alone.answer(request.prompt, request.sampling) for request in requests]
    engine = Engine(model)
    widest = 0
    for turn in range(MAX_TURNS):
        for key, request in enumerate(requests):
            if request.join == turn:
                engine.submit(request.prompt, request.sampling, key)
            if request.pause == turn and turn:
                engine.scheduler.pause(key)
            if request.pause + 8 == turn and request.pause:
                engine.scheduler.resume(key)
            if request.cancel == turn and turn:
                engine.scheduler.cancel(frozenset({key}))
        if turn in (10, 20):  # For ten turns there is room for two rows.
            engine.scheduler.limit(16, (2 * 512 + 256) * model.kv_bytes_per_token if turn == 10 else 0)
        engine.scheduler.turn()
        widest = max(widest, engine.scheduler.running_count)
        if turn > 40 and len(engine.finished) == len(requests) - 1:
            break
    assert widest >= 5 and engine.scheduler.preempted_count > 0 and not engine.failed
    answers = [engine.rows[key].generated for key in range(len(requests))]
    assert answers[6] == expected[6][: len(answers[6])]  # cancelled
    answers[6] = expected[6]
    assert answers == expected


@pytest.mark.parametrize("family", ["qwen2_vl", "idefics3", "gemma3"])
def test_a_row_that_made_room_or_paused_decodes_on(load: Load, family: str) -> None:
    """One at a time too: another request's pictures do not become this one's."""
    model = load(family)
    prompts = [chat([WIDE, "what is this"]), chat([TALL, "and this"])]
    expected = [Engine(model, max_rows=1).answer(prompt, greedy(20)) for prompt in prompts]
    engine = Engine(model, max_rows=1)
    engine.submit(prompts[0], greedy(20), 0)
    while len(engine.rows[0].generated) < 5:
        engine.scheduler.turn()
    engine.scheduler.pause(0)
    engine.submit(prompts[1], greedy(20), 1)
    engine.run(1)
    engine.scheduler.resume(0)
    engine.run(0)
    assert [engine.rows[key].generated for key in (0, 1)] == expected


@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm"])
def test_a_picture_is_seen_once(load: Load, family: str) -> None:
    """By content: in one request, across turns and across requests; choices of one request share the prefill."""
    model = load(family)
    seen = model.model.features
    first, same = picture(11), picture(11)
    engine = Engine(model)
    before = (seen.hit_count, seen.miss_count)
    engine.submit(chat([first, "x"]), frames.Sampling(max_tokens=6, temperature=1.0, seed=3), 1, 2, 3)
    engine.run(1, 2, 3)
    tiles = seen.miss_count - before[1]
    assert seen.hit_count == before[0] and tiles >= 1
    assert len({tuple(engine.rows[key].generated) for key in (1, 2, 3)}) == 3
    engine.submit(chat([same, "y"], "z", ["again", first]), greedy(4), 4)
    engine.run(4)
    assert (seen.hit_count - before[0], seen.miss_count - before[1]) == (2 * tiles, tiles)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "gemma3"])
def test_other_architectures_are_served_as_mlx_vlm_does_one_at_a_time(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those without a test of their own: positions that the model keeps on itself are each row's all the same, and the
    caches are those that it makes, of which Gemma 3n's layers want more than mlx-lm's know."""
    from mlxgui_grpc.engine.backends import vision

    monkeypatch.setattr(vision, "_FAMILIES", {})
    model = LOADERS["vision"](build_tiny_vision(tmp_path / "model", family))
    assert not model.batchable and "one at a time: batching is not proven" in model.notes[0]
    made = [type(layer) for layer in make_prompt_cache(model.model.language_model)]
    assert [type(layer) for layer in model.model.make_cache()[:-1]] == made
    prompts = [chat([WIDE, "what is this", TALL]), chat("nothing to see"), chat([TALL, LONG])]
    expected = [reference(model, prompt, 12) for prompt in prompts]
    engine = Engine(model, max_rows=1)
    engine.submit(prompts[0], greedy(12), 0)
    while len(engine.rows[0].generated) < 3:
        engine.scheduler.turn()
    engine.scheduler.pause(0)
    for key in (1, 2):
        engine.submit(prompts[key], greedy(12), key)
    engine.run(1, 2)
    engine.scheduler.resume(0)
    engine.run(0)
    assert [engine.rows[key].generated for key in range(3)] == expected


def test_pictures_that_wait_are_bounded(load: Load, tmp_path: Path) -> None:
    """When their rows are gone, others may come."""
    _, vision = load_tokenizer(build_tiny_vision(tmp_path / "model", "llava"), "vision")
    assert vision is not None
    vision._limit_bytes = 3 * 56 * 56 * 4 + 1
    held = [vision.tokenize("<image>a", [WIDE]) for _ in range(2)]
    with pytest.raises(QueueFullError, match="try again"):
        vision.tokenize("<image>a", [WIDE])
    del held[0]
    assert vision.tokenize("<image>a", [WIDE])[1].nbytes == 3 * 56 * 56 * 4


def test_the_feature_cache_is_bounded() -> None:
    cached = FeatureCache(limit_bytes=100)
    small = Features(mx.zeros((1, 10)))
    for name in (b"a", b"b", b"a", b"c"):
        if cached.find(name) is None:
            cached.add(name, small)
    assert cached.held_bytes == 80 and cached.find(b"b") is None and cached.find(b"a") is not None
    cached.add(b"large", Features(mx.zeros((1, 26))))
    assert cached.find(b"large") is None and cached.held_bytes == 80


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_positions_are_those_of_the_model(load: Load, family: str) -> None:
    language_model = load(family).model.language_model
    ids, images = tokenize(load(family), chat(["a", WIDE, "b"], "c", [TALL, SMALL, "d"]))
    assert images is not None and images.positions is not None
    grids = np.concatenate([item.arrays["image_grid_thw"] for item in images.items])
    positions, _ = language_model.get_rope_index(mx.array([ids]), mx.array(grids))
    assert (np.array(positions)[:, 0] == images.positions).all()
    assert (
        grid_positions(np.zeros(4, dtype=bool), np.zeros((0, 3), dtype=int), 2).tolist() == [[0, 1, 2, 3]] * 3
    )


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("qwen2_vl", "<|image_pad|>"),
        ("qwen2_vl", "<|vision_start|><|video_pad|>"),
        ("idefics3", "<image>"),
        ("llava", "<image>"),
        ("gemma3", "<image_soft_token>"),
    ],
)
def test_image_tokens_as_text_are_refused_beside_pictures(load: Load, family: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"own tokens for images|stands for a video"):
        tokenize(load(family), chat([WIDE, f"look {words}"]))
    assert len(tokenize(load(family), chat(f"look {words}"))[0]) < 40


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_image_tokens_are_counted_without_weights(load: Load, family: str, tmp_path: Path) -> None:
    folder = build_tiny_vision(tmp_path / "model", family)
    (folder / "model.safetensors").unlink()
    tokens, vision = load_tokenizer(folder, "vision")
    assert vision is not None and tokens.render is not None
    prompt = chat([WIDE, "what is this", TALL])
    ids, _ = vision.tokenize(
        tokens.render(json.loads(prompt.messages), add_generation_prompt=True), prompt.images
    )
    assert ids == tokenize(load(family), prompt)[0] and len(ids) > 20


@pytest.mark.parametrize("placeholder", ["<start_of_image>", "<image_soft_token>"])
def test_the_template_says_which_token_the_processor_replaces(placeholder: str, tmp_path: Path) -> None:
    """Gemma 3's writes the one, Gemma 3n's the other, and both processors have both."""
    folder = build_tiny_vision(tmp_path / "model", "gemma3")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<start_of_image>", placeholder))
    tokens, vision = load_tokenizer(folder, "vision")
    assert vision is not None and tokens.render is not None
    content = [{"type": "image"}, {"type": "text", "text": "a"}]
    assert vision.placeholder == placeholder
    assert f"\n{placeholder}a<" in tokens.render([{"role": "user", "content": content}])


def test_pictures_that_a_model_cannot_take_fail_their_request_only(load: Load) -> None:
    engine = Engine(load("qwen2_vl"))
    engine.submit(chat("hello"), greedy(20), 1)
    engine.submit(chat([picture(77), "x"]), greedy(5), 2)
    images = engine.rows[2].images
    assert images is not None
    item = dataclasses.replace(images.items[0], key=b"?", arrays={**images.items[0].arrays})
    item.arrays["pixel_values"] = item.arrays["pixel_values"][:, :-3]
    engine.rows[2].images = dataclasses.replace(images, items=(item,))
    engine.run(1, 2)
    assert engine.failed[2].reason == "GENERATION_FAILED" and len(engine.rows[1].generated) == 20


def test_templates_get_the_content_that_they_were_written_for() -> None:
    image_and_text = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    text = [{"role": "user", "content": "a"}]

    def of_parts(messages: list[dict[str, Any]], **_: Any) -> str:
        return "".join(
            "<image>" if part["type"] == "image" else part["text"]
            for each in messages
            for part in each["content"]
        )

    def of_text(messages: list[dict[str, Any]], **_: Any) -> str:
        return "".join(str(each["content"]) for each in messages)

    for render in (of_parts, of_text):
        adapted = normal_render(flat_images(render, "<image>"))
        assert adapted(text) == "a"
        assert adapted(image_and_text).replace("\n", "") == "<image>a"


def test_what_mlx_vlm_cannot_load_is_served_as_text_where_mlx_lm_can(tmp_path: Path) -> None:
    """With a note; what neither can load fails with mlx-vlm's words."""
    folder = build_tiny(tmp_path / "model", "qwen3")
    model = LOADERS["vision"](folder)
    assert model.vision is None and "mlx-vlm cannot load this checkpoint" in model.notes[0]
    assert len(Engine(model).answer(chat("hello"), greedy(3))) == 3
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadFailedError, match=r"mlx-vlm cannot .*, nor can mlx-lm"):
        LOADERS["vision"](folder)


def test_files_outside_of_the_view_are_not_read(tmp_path: Path) -> None:
    folder = build_tiny_vision(tmp_path / "model", "llava")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(ModelUnsafeError, match="outside"):
        LOADERS["vision"](folder)
    index.unlink()
    marker = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_file": "code.py"}))
    with pytest.raises(ModelUnsafeError, match="model_file"):
        LOADERS["vision"](folder)
    assert not marker.exists()


def test_pictures_are_looked_at_one_by_one_while_others_decode(load: Load) -> None:
    """None of those that are known."""
    model = load("qwen3_vl")
    engine, seen = Engine(model), model.model.features
    engine.submit(chat("hello"), greedy(40), 1)
    engine.scheduler.turn()
    prompt = chat([picture(31), picture(32), "x", picture(33)])
    for expected in (3, 0):
        engine.submit(prompt, greedy(2), 2)
        before, looks, work = seen.miss_count, [], engine.scheduler.work_count
        while 2 not in engine.finished:
            misses, said = seen.miss_count, len(engine.rows[1].generated)
            engine.scheduler.turn()
            looks.append(seen.miss_count - misses)
            assert len(engine.rows[1].generated) == said + 1 and engine.scheduler.work_count > work
        assert seen.miss_count - before == expected and max(looks) == min(expected, 1)
        engine.finished.discard(2)
