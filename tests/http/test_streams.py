"""Event streams: their grammar, their order, what they hold, and what a whole answer holds the same."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.conftest import RestSession
from tests.support_calls import END_TOKENS
from tests.support_http import CAPITAL, PARIS, JsonObject, chat_body, openai_error, parse_events, stream_text

PROMPTS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent.parent / "demo_prompts.json").read_text(encoding="utf-8")
)
UNICODE = [prompt for prompt in PROMPTS if prompt["kind"] == "unicode"]
NEVER_END = {str(token): value for token, value in END_TOKENS.items()}


def stream(http: RestSession, body: JsonObject, path: str = "/v1/chat/completions") -> list[JsonObject]:
    response = http.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    return parse_events(response.content)


def finish_reasons(payloads: list[JsonObject]) -> list[str]:
    return [
        choice["finish_reason"]
        for payload in payloads
        for choice in payload["choices"]
        if choice["finish_reason"] is not None
    ]


def test_a_stream_is_a_role_then_text_then_one_finish_then_done(http: RestSession) -> None:
    """All chunks carry the same id, time and model, and each the documented keys."""
    payloads = stream(http, chat_body())
    first, *middle, last = payloads
    assert first["choices"] == [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert len(middle) >= 1
    for payload in middle:
        (choice,) = payload["choices"]
        assert set(choice) == {"index", "delta", "finish_reason"} and choice["finish_reason"] is None
        assert set(choice["delta"]) == {"content"} and choice["delta"]["content"]
    assert stream_text(payloads) == PARIS
    for payload in payloads:
        assert set(payload) == {"id", "object", "created", "model", "system_fingerprint", "choices"}
        assert payload["object"] == "chat.completion.chunk" and payload["model"] == "demo"
    assert len({(payload["id"], payload["created"]) for payload in payloads}) == 1
    assert first["id"].startswith("chatcmpl-")


def test_the_head_of_a_stream_lets_no_proxy_hold_it_back(http: RestSession) -> None:
    response = http.post("/v1/chat/completions", json=chat_body(stream=True))
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert "Content-Length" not in response.headers


def test_usage_comes_last_when_asked_for_and_agrees_with_the_whole_answer(http: RestSession) -> None:
    """Until then `usage` is null in each chunk; without the option it is in none."""
    whole = http.post("/v1/chat/completions", json=chat_body()).json()
    *chunks, last = stream(http, chat_body(stream_options={"include_usage": True}))
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    assert all("usage" not in chunk for chunk in stream(http, chat_body()))
    *chunks, last = stream(
        http,
        {"model": "demo", "prompt": "The capital of France is", "stream_options": {"include_usage": True}},
        "/v1/completions",
    )
    assert last["choices"] == [] and last["usage"]["total_tokens"] > last["usage"]["prompt_tokens"] > 0


def test_a_streamed_continuation_is_the_whole_one_in_pieces(http: RestSession) -> None:
    body = {"model": "demo", "prompt": ["The capital of France is", "The capital of Japan is"]}
    whole = http.post("/v1/completions", json=body).json()
    payloads = stream(http, body, "/v1/completions")
    for index in range(2):
        assert stream_text(payloads, index) == whole["choices"][index]["text"]
    assert finish_reasons(payloads) == ["stop", "stop"]
    assert {payload["object"] for payload in payloads} == {"text_completion"}
    assert all(payload["id"].startswith("cmpl-") for payload in payloads)


@pytest.mark.parametrize("prompt", UNICODE, ids=[prompt["id"] for prompt in UNICODE])
def test_characters_split_over_tokens_arrive_whole(http: RestSession, prompt: dict[str, Any]) -> None:
    """Streamed and whole answers are the text that the model was trained on, character by character."""
    body = {"model": "demo", "messages": prompt["messages"]}
    payloads = stream(http, body)
    assert stream_text(payloads) == prompt["expect"]
    assert "\N{REPLACEMENT CHARACTER}" not in json.dumps(payloads, ensure_ascii=False)
    whole = http.post("/v1/chat/completions", json=body).json()
    assert whole["choices"][0]["message"]["content"] == prompt["expect"]


def test_n_choices_interleave_and_each_has_its_role_text_and_finish(
    http: RestSession, endless_model: str
) -> None:
    sampled = chat_body("Tell me a story.", endless_model, n=3, temperature=1.2, seed=5, max_tokens=20)
    payloads = stream(http, sampled)
    for index in range(3):
        own = [choice for payload in payloads for choice in payload["choices"] if choice["index"] == index]
        assert own[0]["delta"] == {"role": "assistant"}
        assert own[-1]["finish_reason"] in ("stop", "length")
        assert all(choice["finish_reason"] is None for choice in own[:-1])
    whole = http.post("/v1/chat/completions", json=sampled).json()
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert [stream_text(payloads, index) for index in range(3)] == texts
    assert len(set(texts)) == 3


def test_a_seed_repeats_its_text_on_every_route(http: RestSession) -> None:
    """Alone, streamed or not; another seed gives another text."""
    hot: dict[str, Any] = {"temperature": 1.5, "max_tokens": 24}

    def chat(seed: int) -> str:
        return str(
            http.post("/v1/chat/completions", json=chat_body("Tell me a story.", seed=seed, **hot)).json()[
                "choices"
            ][0]["message"]["content"]
        )

    assert chat(11) == chat(11) == stream_text(stream(http, chat_body("Tell me a story.", seed=11, **hot)))
    assert len({chat(seed) for seed in (11, 12, 13, -5)}) == 4
    http.post("/v1/models/demo/load")
    native = [
        http.post("/v1/models/demo/generate", json={"prompt": "Once", "seed": seed, **hot}).json()["text"]
        for seed in (3, 3, 4)
    ]
    assert native[0] == native[1] != native[2]


def test_finish_reasons_and_counts_are_exact(http: RestSession, demo_tokenizer: Any) -> None:
    """`stop` at the model's end, `length` at max_tokens, which is then the exact count."""
    for limit in (1, 2, 5):
        answer = http.post(
            "/v1/chat/completions", json=chat_body("Tell me a story.", max_tokens=limit)
        ).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == limit
        text = answer["choices"][0]["message"]["content"]
        assert len(demo_tokenizer.encode(text, add_special_tokens=False).ids) == limit
        assert finish_reasons(stream(http, chat_body("Tell me a story.", max_completion_tokens=limit))) == [
            "length"
        ]
    answer = http.post("/v1/chat/completions", json=chat_body()).json()
    tokens = len(demo_tokenizer.encode(PARIS, add_special_tokens=False).ids)
    assert answer["usage"]["completion_tokens"] == tokens + 1  # and the token that ended it
    answer = http.post(
        "/v1/chat/completions", json=chat_body("Tell me a story.", max_tokens=40, logit_bias=NEVER_END)
    ).json()
    assert answer["usage"]["completion_tokens"] == 40


@pytest.mark.parametrize("stop", [" capital", ["nowhere", " capital"], "The", "Paris."])
def test_a_stop_string_ends_the_text_before_it(http: RestSession, stop: str | list[str]) -> None:
    """Wherever it falls in the tokens; streamed, nothing of it is ever sent."""
    found = stop if isinstance(stop, str) else stop[1]
    expected = PARIS[: PARIS.index(found)]
    answer = http.post("/v1/chat/completions", json=chat_body(stop=stop)).json()["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == (expected, "stop")
    assert answer["stop_reason"] == found
    payloads = stream(http, chat_body(stop=stop))
    assert stream_text(payloads) == expected
    assert finish_reasons(payloads) == ["stop"]


def test_a_failure_before_the_first_event_is_an_honest_status(http: RestSession) -> None:
    for fields, status in (({"temperature": 5}, 400), ({"model": "missing"}, 404), ({"messages": []}, 400)):
        response = http.post("/v1/chat/completions", json=chat_body(stream=True) | fields)
        openai_error(response, status)
    response = http.post("/v1/chat/completions", json=chat_body("word " * 9000, stream=True))
    assert openai_error(response, 400)["code"] == "context_length_exceeded"


def test_events_arrive_as_they_are_decoded(http: RestSession) -> None:
    """The first text is readable while the model is still at work: the answer has no end yet."""
    body = chat_body("Tell me a story.", stream=True, max_tokens=1500, logit_bias=NEVER_END)
    with http.post("/v1/chat/completions", json=body, stream=True) as response:
        lines = response.iter_lines(chunk_size=1)
        seen = [next(lines) for _ in range(4)]
        assert json.loads(seen[2].removeprefix(b"data: "))["choices"][0]["delta"]["content"]
        assert http.get("/metrics").text.count('mlxgui:num_requests_running{model_name="demo"} 1.0') == 1


def test_connections_are_kept_between_requests_and_closed_on_demand(http: RestSession) -> None:
    """A stream does not cost the connection: many requests of each kind go over one."""
    with requests.Session() as session:
        session.trust_env = False
        for _ in range(3):
            response = session.post(
                http.base_url + "/v1/chat/completions", json=chat_body(stream=True), timeout=60
            )
            assert parse_events(response.content)
            assert session.get(http.base_url + "/health", timeout=60).json() == {"status": "healthy"}
        response = session.get(http.base_url + "/health", headers={"Connection": "close"}, timeout=60)
        assert response.headers["Connection"] == "close"


def test_text_of_every_shape_survives_the_stream(http: RestSession) -> None:
    """What a user says that looks like an event, a line end or JSON comes back in the echo of /v1/completions."""
    for text in (
        'data: {"x": 1}\n\ndata: [DONE]\n\n',
        "a\r\nb\rc\u2028d\u2029e\u0085f",
        '"quoted" \\ back\\slash \t tab',
        "event: error\nid: 1\nretry: 1\n: comment",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 café ￿",
    ):
        body = {"model": "demo", "prompt": text, "echo": True, "max_tokens": 1}
        whole = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        assert whole.startswith(text)
        assert stream_text(stream(http, body, "/v1/completions")) == whole


def test_pieces_are_never_empty(http: RestSession) -> None:
    payloads = stream(http, chat_body(CAPITAL))
    contents = [choice["delta"].get("content") for payload in payloads for choice in payload["choices"]]
    assert "" not in contents
    assert all(first["created"] == second["created"] for first, second in pairwise(payloads))
