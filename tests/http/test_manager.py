"""What is in memory and for how long, over REST: pins, estimates, keep_alive, priorities, updates, watching."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.conftest import RestSession, TinyModels
from tests.loopback_hub import LoopbackHub
from tests.support_http import (
    EventReader,
    JsonObject,
    Series,
    chat_body,
    endless_body,
    eventually,
    installed_directory,
    metric_value,
    native_error,
    openai_error,
)
from tests.support_models import DEMO

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model(unix_channel: grpc.Channel, tiny_models: TinyModels) -> Iterator[str]:
    """A model of these tests' own, which never ends by itself."""
    with installed_directory(unix_channel, tiny_models.long, "managed") as name:
        yield name


def state(http: RestSession, name: str) -> str:
    return str(http.get(f"/v1/models/{name}/health").json()["status"])


def test_a_pin_is_kept_and_seen_and_can_be_undone(http: RestSession, model: str) -> None:
    """Both can be repeated; the model's state is not touched."""
    for verb, is_pinned in (("pin", True), ("pin", True), ("unpin", False), ("unpin", False)):
        assert http.post(f"/v1/models/{model}/{verb}").json() == {
            "message": f"Model '{model}' {verb}ned successfully",
            "pinned": is_pinned,
            "status": f"{verb}ned",
        }
        assert http.get(f"/v1/models/{model}").json()["pinned"] is is_pinned
        assert http.get("/v1/manager/status").json()["loaded_models"][model]["pinned"] is is_pinned
    assert state(http, model) == "loaded"


def test_keep_alive_0_unloads_a_model_after_its_last_use(http: RestSession, model: str) -> None:
    """Said with a load, in its query or its body, or with a request; another time is seen in the model's status."""
    assert http.post(f"/v1/models/{model}/load?keep_alive=0").json()["status"] == "loaded"
    eventually(lambda: state(http, model) == "unloaded", "the model has left")
    body = chat_body(model=model, max_tokens=1)
    for keep_alive, is_kept_for_ever in ((-1, True), ("1h", False), ("-1s", True), (3600, False)):
        assert http.post(CHAT, json={**body, "keep_alive": keep_alive}).status_code == 200
        expires_at = http.get(f"/v1/manager/models/{model}/status").json()["expires_at"]
        assert (expires_at is None) is is_kept_for_ever
    assert http.post(f"/v1/models/{model}/load", json={"keep_alive": "0s"}).json()["status"] == "loaded"
    eventually(lambda: state(http, model) == "unloaded", "the model has left")


def test_an_estimate_explains_a_load_and_does_nothing(http: RestSession, model: str) -> None:
    """More requests and longer ones need more; the sum is that of its parts."""
    http.post(f"/v1/models/{model}/unload")
    body = http.get(f"/v1/models/{model}/estimate").json()
    assert (body["model"], body["accepted"], body["refusal"]) == (model, True, None)
    assert body["already_loaded"] is False and model not in body["evicted_models"]
    parts = sum(body[key] for key in ("weight_gb", "kv_gb", "prefill_gb", "process_gb"))
    assert body["required_gb"] == pytest.approx(parts, rel=0.01) and body["weight_gb"] > 0
    few, many, long = (
        http.get(f"/v1/models/{model}/estimate?{query}").json()["kv_gb"]
        for query in (
            "concurrent_requests=1&tokens_per_request=256",
            "concurrent_requests=8&tokens_per_request=256",
            "concurrent_requests=1&tokens_per_request=32768",
        )
    )
    assert few < many < long
    assert state(http, model) == "unloaded"


def test_a_priority_is_set_and_its_place_in_the_queue_is_null_where_nothing_waits(
    http: RestSession, model: str
) -> None:
    for priority in (100, -100, 0):
        body = http.post(f"/v1/manager/models/{model}/priority", json={"priority": priority}).json()
        assert body == {
            "model": model,
            "priority": priority,
            "message": "Priority update requested",
            "queue_position": None,
        }


class Watcher:
    """A client of /v1/manager/watch."""

    def __init__(self, base_url: str) -> None:
        self._reader = EventReader(base_url, "/v1/manager/watch", None, method="GET")
        response = self._reader.open()
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")

    def next(self) -> JsonObject:
        """The snapshot of the next event."""
        snapshot: JsonObject = json.loads(self._reader.read_event().removeprefix(b"data: "))
        return snapshot

    def entry(self, model: str, condition: Callable[[JsonObject | None], bool]) -> None:
        """Read on until the model's entry, or its absence, is as it should be."""
        while not condition(self.next()["loaded_models"].get(model)):
            pass

    def close(self) -> None:
        self._reader.close(reset=True)


def test_watching_shows_what_comes_and_goes(http: RestSession, model: str, series: Series) -> None:
    """The first event is the state of now; then each change, in the form of /v1/manager/status."""

    def live_calls() -> float:
        return metric_value(http.get("/metrics").text, "mlxgui:http_live_calls")

    http.post(f"/v1/models/{model}/unload")
    before = live_calls()
    watcher = Watcher(http.base_url)
    try:
        first = watcher.next()
        assert set(first) == set(http.get("/v1/manager/status").json())
        assert model not in first["loaded_models"]
        assert live_calls() == before + 1
        http.post(f"/v1/models/{model}/load")
        watcher.entry(model, lambda entry: entry is not None and entry["status"] == "loaded")
        client = EventReader(http.base_url, CHAT, endless_body(model, stream=True))
        client.open()
        client.read_until_content()
        watcher.entry(model, lambda entry: entry is not None and entry["running_request_count"] == 1)
        client.close(reset=True)
        watcher.entry(model, lambda entry: entry is not None and entry["running_request_count"] == 0)
        http.post(f"/v1/models/{model}/unload")
        watcher.entry(model, lambda entry: entry is None)
    finally:
        watcher.close()
    eventually(lambda: live_calls() == before, "its place is free again")
    assert series.running(model) == 0


def test_a_forced_unload_is_a_conflict_to_who_waits_for_an_answer(
    http: RestSession, model: str, series: Series
) -> None:
    """409 and not to be repeated; without force, in a query or a body, it is the unload that is refused."""
    waiting = EventReader(http.base_url, CHAT, endless_body(model))
    eventually(lambda: series.running(model) == 1, "it decodes")
    for refused in (
        http.post(f"/v1/models/{model}/unload"),
        http.post(f"/v1/models/{model}/unload?force=false"),
        http.post(f"/v1/models/{model}/unload", json={"force": False}),
        http.delete(f"/v1/models/{model}"),
    ):
        assert model in native_error(refused, 409)
        assert refused.headers["X-Should-Retry"] == "false"
    assert http.post(f"/v1/models/{model}/unload", json={"force": True}).json()["status"] == "unloaded"
    answer = waiting.open()
    assert (answer.status, answer.headers["X-Should-Retry"]) == (409, "false")
    assert json.loads(answer.read())["error"]["code"] == "cancelled"
    waiting.close()


def test_an_update_fetches_a_newer_revision_and_says_when_there_is_none(
    http: RestSession, hub: LoopbackHub
) -> None:
    """In one call, or as an operation to look at."""
    hub.recover()
    first = hub.add("rest/updated", DEMO)
    http.post("/v1/models/install", json={"model_id": "rest/updated"})
    current = http.post("/v1/models/updated/update").json()
    assert (current["status"], current["revision"]) == ("up_to_date", first)
    assert current["message"] == "Model 'updated' is up to date"
    files: dict[str, Any] = {file.name: file.read_bytes() for file in DEMO.iterdir() if file.is_file()}
    second = hub.add("rest/updated", {**files, "README.md": b"newer"})
    newer = http.post("/v1/models/updated/update", json={}).json()
    assert newer == {
        "message": "Model 'updated' updated successfully",
        "model_name": "updated",
        "model_id": "rest/updated",
        "revision": second,
        "status": "updated",
    }
    assert http.get("/v1/models/updated").json()["revision"] == second
    begun = http.post("/v1/models/updated/update?wait=false")
    assert begun.status_code == 202 and begun.headers["Location"].startswith("/v1/operations/")
    eventually(lambda: http.get(begun.headers["Location"]).json()["done"], "it ends")
    assert http.get(begun.headers["Location"]).json()["kind"] == "update"
    assert http.delete("/v1/models/updated").status_code == 200
    native_error(http.post("/v1/models/demo/update"), 400)
    native_error(http.post("/v1/models/updated/update"), 404)


def test_models_that_only_lie_in_the_cache_are_listed_on_demand(http: RestSession, hub: LoopbackHub) -> None:
    """Available without a download, under the hub id's name."""
    hub.recover()
    hub.add("rest/available", DEMO)
    http.post("/v1/models/install", json={"model_id": "rest/available"})
    http.delete("/v1/models/available?remove_files=false")

    def listed(query: str) -> list[JsonObject]:
        models = http.get(f"/v1/manager/models{query}").json()["models"]
        return [entry for entry in models if entry["huggingface_id"] == "rest/available"]

    assert listed("") == []
    (entry,) = listed("?include_available=true")
    assert (entry["status"], entry["id"]) == ("available", 0)
    assert Path(entry["path"]).exists()
    http.post("/v1/models/install", json={"model_id": "rest/available"})
    assert http.delete("/v1/models/available").status_code == 200


def test_a_request_that_names_no_model_gets_the_default_one(http: RestSession) -> None:
    """Where a setting names one; else it is refused."""
    body = chat_body(max_tokens=1)
    del body["model"]
    assert openai_error(http.post(CHAT, json=body), 400)["param"] == "model"
    assert http.put("/v1/settings/default_model", json={"value": "demo"}).json()["value"] == "demo"
    try:
        for named in (body, {**body, "model": "default"}):
            assert http.post(CHAT, json=named).json()["model"] == "demo"
            assert (
                http.post("/v1/completions", json={**named, "prompt": "x", "messages": None}).json()["model"]
                == "demo"
            )
    finally:
        assert http.delete("/v1/settings/default_model").json()["value"] == ""
    openai_error(http.post(CHAT, json=body), 400)
