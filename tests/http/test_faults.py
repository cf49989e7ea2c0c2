"""Processes that are killed under their clients: what the clients see, and that the server goes on."""

import json
import os
import signal
from collections.abc import Iterator, Mapping

import psutil
import pytest
import requests

from tests.conftest import RestSession
from tests.loopback_hub import LoopbackHub
from tests.support_http import (
    PARIS,
    EventReader,
    Series,
    chat_body,
    endless_body,
    eventually,
    native_error,
    openai_error,
    parse_events,
)
from tests.support_models import DEMO
from tests.support_server import RunningServer, start

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def fragile(
    server_environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server whose processes these tests kill; it must end cleanly all the same."""
    running = start(tmp_path_factory.mktemp("fragile"), server_environment, standby_count=0)
    yield running
    assert running.stop() == 0


@pytest.fixture
def fragile_http(fragile: RunningServer) -> Iterator[RestSession]:
    with RestSession(fragile.rest_url) as session:
        yield session


def bridge_of(server: RunningServer) -> psutil.Process:
    (bridge,) = (child for child in server.descendants() if "rest_bridge" in child.cmdline())
    return bridge


def decoding(server: RunningServer) -> EventReader:
    """A stream of a model that is at work."""
    client = EventReader(server.rest_url, CHAT, endless_body("demo", stream=True))
    assert client.open().status == 200
    client.read_until_content()
    return client


def test_a_worker_killed_mid_stream_is_an_error_event_and_the_model_comes_back(
    fragile: RunningServer, fragile_http: RestSession
) -> None:
    """Never a silent [DONE]: the last event but it is the error; whoever waits for a whole answer gets a 503."""
    streams = [decoding(fragile) for _ in range(3)]
    whole = EventReader(fragile.rest_url, CHAT, endless_body("demo"))
    eventually(lambda: Series(fragile.channel()).running("demo") == 4, "all four decode")
    fragile.worker().send_signal(signal.SIGKILL)
    for client in streams:
        *_, last, done = client.read_rest()
        assert done == b"data: [DONE]"
        payload = json.loads(last.removeprefix(b"data: "))
        assert set(payload) == {"error"}
        error = payload["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["code"]) == ("server_error", "engine_dead")
        assert "demo" in error["message"]
        client.close()
    answer = whole.open()
    assert answer.status == 503
    assert json.loads(answer.read())["error"]["code"] == "engine_dead"
    whole.close()
    health = fragile_http.get("/v1/models/demo/health").json()
    assert health["healthy"] is False
    again = fragile_http.post(CHAT, json=chat_body()).json()
    assert again["choices"][0]["message"]["content"] == PARIS


def test_a_bridge_killed_mid_stream_breaks_it_frees_the_engine_and_is_restarted(
    fragile: RunningServer, fragile_http: RestSession
) -> None:
    """The client's stream has no [DONE]; the new bridge has the old address."""
    client = decoding(fragile)
    waiting = EventReader(fragile.rest_url, CHAT, endless_body("demo"))
    series = Series(fragile.channel())
    finished = series.finished("demo")
    eventually(lambda: series.running("demo") == 2, "both decode")
    old = bridge_of(fragile)
    old.send_signal(signal.SIGKILL)
    assert b"data: [DONE]" not in client.read_rest()
    with pytest.raises(ConnectionError):
        waiting.open()
    client.close()
    waiting.close()
    eventually(lambda: series.running("demo") == 0, "the engine is idle")
    assert series.finished("demo") == finished

    def answered() -> bool:
        try:
            return requests.get(fragile.rest_url + "/health", timeout=60).status_code == 200
        except requests.ConnectionError:
            return False

    eventually(answered, "the bridge is back")
    assert bridge_of(fragile).pid != old.pid
    payloads = parse_events(fragile_http.post(CHAT, json=chat_body(stream=True)).content)
    assert payloads[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_server_killed_mid_install_leaves_nothing_half_registered_and_a_repeat_resumes(
    server_environment: Mapping[str, str], hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """After SIGKILL no process of it is left; the next start knows the model not, and fetches only what is missing."""
    home = tmp_path_factory.mktemp("killed")
    environment = {**server_environment, "HF_HOME": str(tmp_path_factory.mktemp("killed-cache"))}
    hub.add("faults/killed", DEMO)
    hold = hub.hold("model.safetensors", 2_000_000)
    server = start(home, environment, standby_count=0)
    begun = requests.post(
        server.rest_url + "/v1/models/install?wait=false", json={"model_id": "faults/killed"}, timeout=60
    ).json()
    client = EventReader(server.rest_url, CHAT, endless_body("demo", stream=True))
    client.open()
    client.read_until_content()
    assert hold.reached.wait(60)

    def operation() -> int:
        body = requests.get(f"{server.rest_url}/v1/operations/{begun['id']}", timeout=60).json()
        return int(body["progress"]["done_bytes"])

    eventually(lambda: operation() > 1_000_000, "bytes are on disk")
    ours = server.descendants()
    assert len(ours) >= 3
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(60)
    _, alive = psutil.wait_procs(ours, timeout=60)
    assert not alive
    lines = client.read_rest()
    client.close()
    # An error before [DONE], or no [DONE] at all.
    assert b"data: [DONE]" not in lines or b'"error"' in lines[-2]
    hold.release()

    again = start(home, environment, standby_count=0)
    try:
        with RestSession(again.rest_url) as http:
            assert http.get("/v1/models/killed").status_code == 404
            assert [model["name"] for model in http.get("/v1/models").json()["models"]] == ["demo"]
            ended = http.get(f"/v1/operations/{begun['id']}").json()
            assert ended["done"] is True and ended["status"] in ("failed", "cancelled")
            assert http.get("/v1/operations?include_done=false").json()["operations"] == []
            installed = http.post("/v1/models/install", json={"model_id": "faults/killed"})
            assert installed.status_code == 200, installed.text
            assert (hub.fetches("model.safetensors")[-1].range_start or 0) >= 1_000_000
            assert http.get("/v1/models/killed").json()["status"] == "unloaded"
            assert http.delete("/v1/models/killed").json()["removed_files"] is True
    finally:
        assert again.stop() == 0


def test_stopping_lets_streams_finish_and_refuses_new_work(
    server_environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """SIGTERM: the story is told to its end; a new chat is 503 with Retry-After, or finds nobody; exit status 0."""
    server = start(tmp_path_factory.mktemp("draining"), server_environment, standby_count=0)
    client = EventReader(
        server.rest_url, CHAT, endless_body("demo", stream=True, max_tokens=600, temperature=0.0)
    )
    client.open()
    client.read_until_content()
    server.process.send_signal(signal.SIGTERM)

    def refused() -> bool:
        try:
            response = requests.post(server.rest_url + CHAT, json=chat_body(max_tokens=1), timeout=60)
        except requests.ConnectionError:
            return True
        if response.status_code == 200:
            return False
        error = openai_error(response, 503)
        assert error["code"] in ("server_draining", "server_unreachable")
        assert int(response.headers["Retry-After"]) >= 1
        return True

    eventually(refused, "new work is refused")
    *_, finish, done = client.read_rest()
    client.close()
    assert done == b"data: [DONE]"
    assert json.loads(finish.removeprefix(b"data: "))["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(60) == 0


def test_a_hub_that_nobody_can_reach_is_502(
    server_environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """And nothing of the model is registered; the server is as well as before."""
    with LoopbackHub() as gone:
        endpoint = gone.endpoint
    environment = {**server_environment, "HF_ENDPOINT": endpoint}
    server = start(tmp_path_factory.mktemp("alone"), environment, standby_count=0)
    try:
        with RestSession(server.rest_url) as http:
            detail = native_error(http.post("/v1/models/install", json={"model_id": "some/model"}), 502)
            assert "hub" in detail.lower()
            assert http.get("/v1/models/model").status_code == 404
            assert http.get("/health").json() == {"status": "healthy"}
    finally:
        assert server.stop() == 0
