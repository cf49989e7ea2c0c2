"""Clients that leave: their request leaves the engine, streaming or not, by FIN or RST, whoever else is there."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import RestSession
from tests.support_http import (
    PARIS,
    EventReader,
    JsonObject,
    Series,
    chat_body,
    endless_body,
    eventually,
    metric_value,
    parse_events,
)


def generate_body(model: str) -> JsonObject:
    chat = endless_body(model)
    del chat["messages"], chat["model"]
    return {**chat, "prompt": "Once upon a time"}


@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
@pytest.mark.parametrize("kind", ["stream", "chat", "completion", "generate"])
def test_a_client_that_leaves_frees_its_place(
    http: RestSession, series: Series, endless_model: str, kind: str, reset: bool
) -> None:
    """No choice of it is ever finished: it was ended, not waited for."""
    finished = series.finished(endless_model)
    body = endless_body(endless_model)
    path = "/v1/chat/completions"
    if kind == "completion":
        del body["messages"]
        body, path = {**body, "prompt": "Once upon a time"}, "/v1/completions"
    elif kind == "generate":
        body, path = generate_body(endless_model), f"/v1/models/{endless_model}/generate"
    client = EventReader(http.base_url, path, {**body, "stream": True} if kind == "stream" else body)
    if kind == "stream":
        client.open()
        client.read_until_content()
    eventually(lambda: series.running(endless_model) == 1, "the request reached the engine")
    client.close(reset=reset)
    eventually(lambda: series.running(endless_model) == 0, "the engine is idle")
    assert series.finished(endless_model) == finished


def test_a_storm_of_leaving_clients_leaves_nothing_behind(
    http: RestSession, series: Series, endless_model: str
) -> None:
    """Forty clients open streams, read nothing to three events and go, in every way; others' answers are right."""
    finished = series.finished(endless_model)

    def visit(number: int) -> None:
        client = EventReader(
            http.base_url, "/v1/chat/completions", endless_body(endless_model, stream=number % 4 != 3)
        )
        if number % 4 in (1, 2):
            client.open()
            for _ in range(number % 3 + 1):
                client.read_event()
        client.close(reset=number % 2 == 0)

    with ThreadPoolExecutor(8) as pool:
        visits = [pool.submit(visit, number) for number in range(40)]
        others = [pool.submit(http_answer, http.base_url) for _ in range(4)]
        for done in visits:
            done.result()
        assert [other.result() for other in others] == [PARIS] * 4
    eventually(lambda: series.running(endless_model) == 0, "the engine is idle")
    assert series.finished(endless_model) == finished
    eventually(
        lambda: metric_value(http.get("/metrics").text, "mlxgui:http_live_calls") == 0,
        "the bridge has no call left",
    )


def http_answer(base_url: str) -> str:
    with RestSession(base_url) as session:
        answer = session.post("/v1/chat/completions", json=chat_body()).json()
    return str(answer["choices"][0]["message"]["content"])


def test_leaving_one_stream_leaves_the_others_alone(
    http: RestSession, series: Series, endless_model: str
) -> None:
    """The neighbour in the batch goes on and gets exactly its text."""
    body = endless_body(endless_model, max_tokens=400, stream=True)
    alone = http.post("/v1/chat/completions", json=body)
    staying = EventReader(http.base_url, "/v1/chat/completions", body)
    staying.open()
    staying.read_until_content()
    leaving = EventReader(http.base_url, "/v1/chat/completions", endless_body(endless_model, stream=True))
    leaving.open()
    leaving.read_until_content()
    leaving.close()
    count = 1
    while (line := staying.read_event()) != b"data: [DONE]":
        choices = json.loads(line.removeprefix(b"data: "))["choices"]
        count += bool(choices and choices[0]["delta"].get("content"))
    staying.close()
    assert count > 1
    assert parse_events(alone.content)[-1]["choices"][0]["finish_reason"] == "length"
    eventually(lambda: series.running(endless_model) == 0, "the engine is idle")


def test_more_streams_than_places_are_429_and_quick_routes_still_answer(
    http: RestSession, series: Series, endless_model: str
) -> None:
    """56 long calls at once; the next is refused with Retry-After, and is served once places are free."""
    clients = [
        EventReader(http.base_url, "/v1/chat/completions", endless_body(endless_model, stream=True))
        for _ in range(56)
    ]
    try:
        eventually(
            lambda: metric_value(http.get("/metrics").text, "mlxgui:http_live_calls") == 56,
            "all places are taken",
        )
        refused = http.post("/v1/chat/completions", json=chat_body())
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert http.get("/health").json() == {"status": "healthy"}
        assert http.get("/v1/models/demo").status_code == 200
    finally:
        for client in clients:
            client.close()
    eventually(lambda: series.running(endless_model) == 0, "the engine is idle")
    eventually(
        lambda: http.post("/v1/chat/completions", json=chat_body()).status_code == 200,
        "a place is free again",
    )
