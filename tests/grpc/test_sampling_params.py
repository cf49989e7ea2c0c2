"""Sampling parameters have their effect, in a mixed batch too, and a seed repeats its text."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from mlxgui.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.support_calls import CALL_SECONDS, chat, completion, fails, text_of

Stub = inference_pb2_grpc.InferenceServiceStub

STORY = "Tell me a story."
HOT: dict[str, Any] = {"temperature": 1.6, "max_tokens": 24}


def ask(inference: Stub, **params: Any) -> str:
    return text_of(inference.Chat(chat(STORY, **params), timeout=CALL_SECONDS))


def test_temperature_zero_is_greedy_whatever_the_filters(inference: Stub) -> None:
    greedy = ask(inference, max_tokens=24)
    for params in ({"temperature": 0.0}, {"top_p": 0.3}, {"top_k": 5}, {"min_p": 0.5}, {"seed": 7}):
        assert ask(inference, max_tokens=24, **params) == greedy


def test_the_same_seed_draws_the_same_text_alone_and_among_others(inference: Stub) -> None:
    """Others join and leave the batch meanwhile; the seeded row's noise is its own."""
    alone = ask(inference, seed=11, **HOT)
    assert ask(inference, seed=11, **HOT) == alone
    with ThreadPoolExecutor(12) as pool:
        others = [
            pool.submit(ask, inference, seed=100 + i, temperature=1.0, max_tokens=5 + 3 * i) for i in range(8)
        ]
        again = [pool.submit(ask, inference, seed=11, **HOT) for _ in range(4)]
        assert [future.result() for future in again] == [alone] * 4
        assert len({future.result() for future in others}) > 1


def test_seeds_differ_and_no_seed_is_a_fresh_one(inference: Stub) -> None:
    assert len({ask(inference, seed=seed, **HOT) for seed in (-(2**63), -1, 0, 1, 2**63 - 1)}) == 5
    assert len({ask(inference, **HOT) for _ in range(4)}) > 1


def test_choices_of_one_seed_differ_from_each_other_and_repeat(inference: Stub) -> None:
    request = chat(STORY, n=4, seed=3, **HOT)
    first = [text_of(inference.Chat(request), i) for i in range(4)]
    assert len(set(first)) == 4
    assert [text_of(inference.Chat(request), i) for i in range(4)] == first
    # The first choice is what n = 1 gives.
    assert ask(inference, seed=3, **HOT) == first[0]


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({"top_k": 1}, id="top_k 1"),
        pytest.param({"top_p": 1e-6}, id="tiny top_p"),
        pytest.param({"min_p": 1.0}, id="min_p 1"),
        pytest.param({"temperature": 1e-4}, id="tiny temperature"),
    ],
)
def test_the_narrowest_sampler_is_greedy(inference: Stub, params: dict[str, Any]) -> None:
    greedy = ask(inference, max_tokens=24)
    for seed in range(3):
        assert ask(inference, **{**HOT, "seed": seed, **params}) == greedy


def test_logit_bias_forces_and_bans_a_token(inference: Stub, demo_tokenizer: Any) -> None:
    forced = demo_tokenizer.encode("Paris", add_special_tokens=False).ids[0]
    text = demo_tokenizer.decode([forced])
    assert ask(inference, logit_bias={forced: 100.0}, max_tokens=4) == text * 4
    greedy = ask(inference, max_tokens=1)
    (first,) = demo_tokenizer.encode(greedy, add_special_tokens=False).ids
    assert not ask(inference, logit_bias={first: -100.0}, max_tokens=1).startswith(greedy)


def test_penalties_make_repetition_rarer(inference: Stub, demo_tokenizer: Any) -> None:
    """A story that may not end goes in circles; each penalty, in its own way, finds more different tokens."""

    def variety(**params: Any) -> int:
        bias = {0: -100.0, 2: -100.0}
        text = ask(inference, logit_bias=bias, max_tokens=320, **params)
        return len(set(demo_tokenizer.encode(text, add_special_tokens=False).ids))

    neutral = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
    without_effect = [{}, neutral, {"repetition_penalty": 4.0, "repetition_context_size": 0}]
    with_effect = [
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"repetition_penalty": 4.0, "repetition_context_size": 320},
    ]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda params: variety(**params), [*without_effect, *with_effect]))
    plain = found[0]
    assert found[:3] == [plain] * 3
    assert all(more > plain for more in found[3:])


def test_wider_sampling_gives_more_different_first_tokens(inference: Stub) -> None:
    """128 draws in one request: temperature widens the distribution, top_k and top_p cap it."""

    def draws(**params: Any) -> Counter[str]:
        found: Counter[str] = Counter()
        for seed in range(8):
            request = completion("The", n=16, max_tokens=1, seed=seed, **params)
            found.update(choice.text for choice in inference.Generate(request).choices)
        return found

    wide, capped, nucleus = (
        draws(temperature=2.0),
        draws(temperature=2.0, top_k=2),
        draws(temperature=2.0, top_p=0.5),
    )
    assert len(capped) <= 2 < len(wide)
    assert len(nucleus) < len(wide)


BAD_SAMPLING: list[tuple[str, dict[str, Any]]] = [
    ("temperature", {"temperature": -0.1}),
    ("temperature", {"temperature": 2.1}),
    ("temperature", {"temperature": float("nan")}),
    ("temperature", {"temperature": float("inf")}),
    ("top_p", {"top_p": 1.1}),
    ("top_p", {"top_p": -1.0}),
    ("top_p", {"top_p": 0.0}),
    ("top_k", {"top_k": -1}),
    ("min_p", {"min_p": 1.5}),
    ("repetition_penalty", {"repetition_penalty": 0.0}),
    ("repetition_penalty", {"repetition_penalty": 11.0}),
    ("repetition_context_size", {"repetition_context_size": -1}),
    ("repetition_context_size", {"repetition_context_size": 16_385}),
    ("presence_penalty", {"presence_penalty": 2.5}),
    ("frequency_penalty", {"frequency_penalty": -2.5}),
    ("frequency_penalty", {"frequency_penalty": float("-inf")}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": 16_385}),
    ("n", {"n": 0}),
    ("n", {"n": 17}),
    ("stop", {"stop": [""]}),
    ("stop", {"stop": ["x"] * 17}),
    ("logit_bias", {"logit_bias": {1: 101.0}}),
    ("logit_bias", {"logit_bias": {-1: 1.0}}),
    ("logit_bias", {"logit_bias": {1: float("nan")}}),
    ("logit_bias", {"logit_bias": {1_000_000: 1.0}}),
    ("logit_bias", {"logit_bias": dict.fromkeys(range(1025), 1.0)}),
    ("top_logprobs", {"top_logprobs": 21}),
    ("max_thinking_tokens", {"max_thinking_tokens": -1}),
    ("prompt_lookup_tokens", {"prompt_lookup_tokens": 17}),
    ("json_schema", {"json_schema": ""}),
    ("json_schema", {"json_schema": "{"}),
    ("json_schema", {"json_schema": "[]"}),
    ("json_schema", {"json_schema": '{"a":' * 65 + "1" + "}" * 65}),
    ("json_schema", {"json_schema": '{"$ref": "#"}'}),
    ("regex", {"regex": ""}),
    ("grammar", {"grammar": ""}),
]


@pytest.mark.parametrize(("field", "params"), BAD_SAMPLING, ids=lambda value: str(value)[:40])
def test_a_value_out_of_its_range_is_refused_by_name(
    inference: Stub, field: str, params: dict[str, Any]
) -> None:
    """INVALID_ARGUMENT with a BadRequest that names the field, for unary and stream, never clamped."""
    request = chat(STORY, **params)
    for failure in (
        fails(lambda: inference.Chat(request)),
        fails(lambda: inference.ChatStream(inference_pb2.ChatStreamRequest(request=request))),
    ):
        assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER")
        assert failure.fields == [f"sampling.{field}"]
        assert field in failure.message


NOT_YET: list[dict[str, Any]] = [
    {"prompt_lookup_tokens": 3},
    {"adapter": "a"},
    {"draft_model": "d"},
]


@pytest.mark.parametrize("params", NOT_YET, ids=lambda params: next(iter(params)))
def test_what_a_later_version_brings_is_refused_and_not_dropped(
    inference: Stub, params: dict[str, Any]
) -> None:
    failure = fails(lambda: inference.Chat(chat(STORY, **params)))
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED")
    assert failure.fields == [f"sampling.{next(iter(params))}"]


@pytest.mark.parametrize(
    ("field", "size_kib"),
    [("json_schema", 128), ("regex", 16), ("grammar", 64)],
    ids=lambda value: str(value),
)
def test_a_constraint_over_its_size_is_refused_with_the_limit(
    inference: Stub, field: str, size_kib: int
) -> None:
    failure = fails(lambda: inference.Chat(chat(STORY, **{field: "a" * (size_kib * 1024 + 1)})))
    assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "PAYLOAD_TOO_LARGE")
    assert f"{size_kib} KiB" in failure.message and failure.fields == [f"sampling.{field}"]


def test_every_sampling_parameter_is_covered_here() -> None:
    """A field added to the contract wants a row above."""
    tested = {field for field, _ in BAD_SAMPLING} | {next(iter(params)) for params in NOT_YET}
    tested |= {"seed", "json_object"}
    assert tested == {field.name for field in common_pb2.SamplingParams.DESCRIPTOR.fields}
