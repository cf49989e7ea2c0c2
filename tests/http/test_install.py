"""Installing over REST from the loopback hub: waiting for it or not, joining, cancelling, resuming, failing cleanly."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RestSession
from tests.loopback_hub import TOKEN, LoopbackHub
from tests.support_http import (
    CAPITAL,
    PARIS,
    EventReader,
    JsonObject,
    Series,
    chat_body,
    endless_body,
    eventually,
    native_error,
    openai_error,
)
from tests.support_models import DEMO
from tests.support_server import RunningServer

WEIGHTS = "model.safetensors"
INSTALL = "/v1/models/install"


@pytest.fixture
def cleared(hub: LoopbackHub) -> Iterator[LoopbackHub]:
    """The session's hub, without faults before and after."""
    hub.recover()
    yield hub
    hub.recover()


def operation(http: RestSession, identity: str) -> JsonObject:
    body: JsonObject = http.get(f"/v1/operations/{identity}").json()
    return body


def finished(http: RestSession, identity: str) -> JsonObject:
    body: JsonObject = eventually(
        lambda: next(filter(lambda now: now["done"], [operation(http, identity)]), None), "the install ends"
    )
    return body


def is_installed(http: RestSession, name: str) -> bool:
    return http.get(f"/v1/models/{name}").status_code == 200


def snapshot_is_whole(http: RestSession, name: str) -> bool:
    """Every file of the model is, byte for byte, what was published."""
    path = Path(http.get(f"/v1/models/{name}").json()["path"])
    return all(
        hashlib.sha256((path / file.name).read_bytes()).digest() == hashlib.sha256(file.read_bytes()).digest()
        for file in DEMO.iterdir()
        if file.suffix in (".json", ".safetensors", ".jinja")
    )


def test_installing_waits_and_the_model_answers(http: RestSession, cleared: LoopbackHub) -> None:
    """Under the name that was asked for; a second time it is there already; then it is gone with its files."""
    cleared.add("rest/waits", DEMO)
    for _ in range(2):
        assert http.post(INSTALL, json={"model_id": "rest/waits", "name": "waited-for"}).json() == {
            "message": "Model 'waited-for' installed successfully",
            "model_name": "waited-for",
            "model_id": "rest/waits",
            "status": "installed",
        }
    assert len(cleared.fetches(WEIGHTS)) >= 1
    model = http.get("/v1/models/waited-for").json()
    assert (model["huggingface_id"], model["author"]) == ("rest/waits", "rest")
    assert snapshot_is_whole(http, "waited-for")
    answer = http.post("/v1/chat/completions", json=chat_body(CAPITAL, "waited-for")).json()
    assert answer["choices"][0]["message"]["content"] == PARIS
    assert http.delete("/v1/models/waited-for").json()["removed_files"] is True
    assert not Path(model["path"]).exists()


def test_an_operation_tells_its_progress_in_bytes(http: RestSession, cleared: LoopbackHub) -> None:
    """`wait=false` answers at once where to look; it can be looked at, listed, and ends with the model."""
    cleared.add("rest/progress", DEMO)
    hold = cleared.hold(WEIGHTS, 1_500_000)
    accepted = http.post(INSTALL + "?wait=false", json={"model_id": "rest/progress"})
    assert accepted.status_code == 202
    begun = accepted.json()
    assert (begun["kind"], begun["model"], begun["done"], begun["status"]) == (
        "install",
        "progress",
        False,
        "running",
    )
    assert accepted.headers["Location"] == f"/v1/operations/{begun['id']}"
    assert hold.reached.wait(60)

    def partly() -> JsonObject | None:
        progress: JsonObject = operation(http, begun["id"])["progress"]
        is_partly = 0 < progress["done_bytes"] < progress["total_bytes"]
        return progress if is_partly and progress["current_file"] == WEIGHTS else None

    progress = eventually(partly, "some bytes have come")
    total = sum(
        file.stat().st_size for file in DEMO.iterdir() if file.suffix in (".json", ".safetensors", ".jinja")
    )
    assert progress["total_bytes"] == total
    assert not is_installed(http, "progress")
    listed = http.get("/v1/operations?include_done=false").json()["operations"]
    assert [entry["id"] for entry in listed] == [begun["id"]]
    hold.release()
    ended = finished(http, begun["id"])
    assert (ended["status"], ended["error"]) == ("succeeded", None)
    assert ended["result"]["name"] == "progress"
    assert ended["progress"]["done_bytes"] == ended["progress"]["total_bytes"] == total
    assert http.delete("/v1/models/progress").status_code == 200


def test_the_same_install_twice_is_one_download(http: RestSession, cleared: LoopbackHub) -> None:
    """Those who ask meanwhile join it; another source under the same name is refused."""
    cleared.add("rest/joined", DEMO)
    before = len(cleared.fetches(WEIGHTS))
    hold = cleared.hold(WEIGHTS, 1024)
    first = http.post(INSTALL + "?wait=false", json={"model_id": "rest/joined"}).json()
    assert hold.reached.wait(60)
    again = http.post(INSTALL, json={"model_id": "rest/joined"}, headers={"Prefer": "respond-async"})
    assert again.status_code == 202 and again.json()["id"] == first["id"]
    other = http.post(INSTALL, json={"model_id": "rest/other", "name": "joined"})
    native_error(other, 409)
    assert other.headers["X-Should-Retry"] == "false"
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(post_install, http.base_url, "rest/joined") for _ in range(4)]
        hold.release()
        assert [answer.result() for answer in answers] == [(200, "joined")] * 4
    assert finished(http, first["id"])["status"] == "succeeded"
    assert len(cleared.fetches(WEIGHTS)) == before + 1
    assert http.delete("/v1/models/joined").status_code == 200


def post_install(base_url: str, model_id: str) -> tuple[int, str]:
    with RestSession(base_url) as session:
        response = session.post(INSTALL, json={"model_id": model_id})
    return response.status_code, response.json().get("model_name", response.text)


def test_a_cancelled_install_registers_nothing_and_a_repeat_resumes(
    http: RestSession, cleared: LoopbackHub
) -> None:
    """Who waits is told; the next attempt asks only for the bytes that are missing."""
    cleared.add("rest/cancelled", DEMO)
    after = 400 * 1024
    assert (DEMO / WEIGHTS).stat().st_size > 2 * after
    hold = cleared.hold(WEIGHTS, after)
    begun = http.post(INSTALL + "?wait=false", json={"model_id": "rest/cancelled"}).json()
    assert hold.reached.wait(60)
    eventually(lambda: operation(http, begun["id"])["progress"]["done_bytes"] > 100_000, "bytes are on disk")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post_install, http.base_url, "rest/cancelled")
        cancelled = http.delete(f"/v1/operations/{begun['id']}").json()
        assert (cancelled["done"], cancelled["status"]) == (True, "cancelled")
        hold.release()
        # It either waited for the one that was cancelled, or came after it and began its own.
        assert waiting.result()[0] in (200, 409)
        was_joined = waiting.result()[0] == 409
    assert is_installed(http, "cancelled") is not was_joined
    if was_joined:
        assert post_install(http.base_url, "rest/cancelled") == (200, "cancelled")
    assert (cleared.fetches(WEIGHTS)[-1].range_start or 0) > 0
    assert snapshot_is_whole(http, "cancelled")
    # Cancelling what has ended changes nothing.
    assert http.delete(f"/v1/operations/{begun['id']}").json()["status"] == "cancelled"
    assert http.delete("/v1/models/cancelled").status_code == 200


def test_a_broken_connection_is_taken_up_where_it_broke(http: RestSession, cleared: LoopbackHub) -> None:
    cleared.add("rest/cut", DEMO)
    before = len(cleared.fetches(WEIGHTS))
    cleared.cut(WEIGHTS, 1_500_000)
    assert post_install(http.base_url, "rest/cut") == (200, "cut")
    fetches = cleared.fetches(WEIGHTS)[before:]
    assert (fetches[-1].range_start or 0) > 0
    assert snapshot_is_whole(http, "cut")
    assert http.delete("/v1/models/cut").status_code == 200


def test_a_client_that_leaves_does_not_end_the_install(http: RestSession, cleared: LoopbackHub) -> None:
    """It is the server's from when it began: who comes back finds the model."""
    cleared.add("rest/left", DEMO)
    hold = cleared.hold(WEIGHTS, 1024)
    client = EventReader(http.base_url, INSTALL, {"model_id": "rest/left"})
    assert hold.reached.wait(60)
    client.close(reset=True)
    hold.release()
    eventually(lambda: is_installed(http, "left"), "the install went on")
    assert http.delete("/v1/models/left").status_code == 200


@pytest.mark.parametrize(
    ("model_id", "status", "words"),
    [
        ("rest/nowhere", 404, ["rest/nowhere"]),
        ("rest/gated", 403, ["rest/gated", "HF_TOKEN"]),
        ("rest/unsafe", 400, ["model_file"]),
        ("rest/no-model", 400, ["weights"]),
        ("rest/pickle", 400, ["safetensors"]),
        ("rest/damaged", 400, ["model.safetensors"]),
    ],
)
def test_what_cannot_be_installed_is_refused_cleanly(
    http: RestSession, cleared: LoopbackHub, model_id: str, status: int, words: list[str]
) -> None:
    """With its reason, as an answer and as an operation alike, and nothing is registered."""
    config = json.loads((DEMO / "config.json").read_text())
    files = {file.name: file.read_bytes() for file in DEMO.iterdir() if file.is_file()}
    published: dict[str, dict[str, bytes]] = {
        "rest/gated": files,
        "rest/unsafe": files | {"config.json": json.dumps({**config, "model_file": "evil.py"}).encode()},
        "rest/no-model": {"README.md": b"nothing here"},
        "rest/pickle": {"config.json": json.dumps(config).encode(), "pytorch_model.bin": b"\x80\x04." * 9},
        "rest/damaged": files | {WEIGHTS: b"\xff" * 100_000},
    }
    if model_id in published:
        cleared.add(model_id, published[model_id], gated=model_id == "rest/gated")
    detail = native_error(http.post(INSTALL, json={"model_id": model_id}), status)
    assert all(word in detail for word in words), detail
    begun = http.post(INSTALL + "?wait=false", json={"model_id": model_id})
    if begun.status_code == 202:
        ended = finished(http, begun.json()["id"])
        assert (ended["status"], ended["result"]) == ("failed", None)
        assert ended["error"]["detail"] == detail
    else:
        assert native_error(begun, status) == detail
    assert not is_installed(http, model_id.partition("/")[2])


def test_a_model_that_the_engine_does_not_know_says_so_when_it_is_to_load(
    http: RestSession, cleared: LoopbackHub
) -> None:
    """400 with the cause, which its entry shows as well; the other models go on."""
    config = json.loads((DEMO / "config.json").read_text())
    files = {file.name: file.read_bytes() for file in DEMO.iterdir() if file.is_file()}
    odd = {"config.json": json.dumps({**config, "model_type": "no_such_architecture"}).encode()}
    cleared.add("rest/odd", files | odd)
    assert post_install(http.base_url, "rest/odd") == (200, "odd")
    detail = native_error(http.post("/v1/models/odd/load"), 400)
    assert "no_such_architecture" in detail
    answer = openai_error(http.post("/v1/chat/completions", json=chat_body(model="odd", stream=True)), 400)
    assert answer["message"] == detail
    entry = http.get("/v1/models/odd").json()
    assert (entry["status"], entry["error_message"]) == ("failed", detail)
    health = http.get("/v1/models/odd/health").json()
    assert (health["healthy"], health["status"], health["reason"]) == (False, "failed", detail)
    assert http.post("/v1/chat/completions", json=chat_body()).status_code == 200
    assert http.delete("/v1/models/odd").status_code == 200


def test_a_gated_repository_opens_to_a_token(cleared: LoopbackHub, start_server: Any, tmp_path: Path) -> None:
    """Under the older variable too; it is in no log, and the host of the files never sees it."""
    cleared.add("rest/gated-open", DEMO, gated=True)
    environment = {"HUGGINGFACE_HUB_TOKEN": TOKEN, "HF_HOME": str(tmp_path)}
    server: RunningServer = start_server(bridge=True, environment=environment)
    assert post_install(server.rest_url, "rest/gated-open") == (200, "gated-open")
    assert not any(request.is_authorized for request in cleared.requests if request.host == "cdn")
    assert TOKEN not in server.log()


@pytest.mark.parametrize(
    ("hub_status", "status", "code"), [(503, 502, "hub"), (429, 429, "hub"), (500, 502, "hub")]
)
def test_a_hub_that_fails_is_said_to(
    http: RestSession, cleared: LoopbackHub, hub_status: int, status: int, code: str
) -> None:
    """502, or 429 where it asks for patience; what is installed goes on working."""
    cleared.add("rest/later", DEMO)
    cleared.fail(hub_status, headers={"Retry-After": "1"})
    response = http.post(INSTALL, json={"model_id": "rest/later"})
    assert code in native_error(response, status).lower()
    assert not is_installed(http, "later")
    assert http.post("/v1/chat/completions", json=chat_body()).status_code == 200
    cleared.recover()
    assert post_install(http.base_url, "rest/later") == (200, "later")
    assert http.delete("/v1/models/later").status_code == 200


def test_a_name_that_is_taken_is_409_and_another_is_suggested(
    http: RestSession, cleared: LoopbackHub
) -> None:
    cleared.add("rest/demo", DEMO)
    response = http.post(INSTALL, json={"model_id": "rest/demo"})
    detail = native_error(response, 409)
    assert "'rest-demo'" in detail
    assert http.get("/v1/models/demo").json()["path"] == str(DEMO)
    assert post_install_named(http, "rest/demo", "rest-demo") == "rest-demo"
    assert http.delete("/v1/models/rest-demo").json()["removed_files"] is True


def post_install_named(http: RestSession, model_id: str, name: str) -> str:
    return str(http.post(INSTALL, json={"model_id": model_id, "name": name}).json()["model_name"])


def test_an_unknown_operation_is_404(http: RestSession) -> None:
    for method in ("GET", "DELETE"):
        assert "nonsense" in native_error(http.request(method, "/v1/operations/nonsense"), 404)
    for query in ("limit=0", "limit=x", "limit=1001", "include_done=maybe", "page_token=x"):
        name = query.partition("=")[0]
        assert name in native_error(http.get(f"/v1/operations?{query}"), 400)


def test_a_running_model_is_not_deleted_unless_forced(
    http: RestSession, cleared: LoopbackHub, series: Series
) -> None:
    """409 with the way out; `force=true` ends its requests, whose streams say so."""
    cleared.add("rest/busy", DEMO)
    assert post_install(http.base_url, "rest/busy")[0] == 200
    client = EventReader(http.base_url, "/v1/chat/completions", endless_body("busy", stream=True))
    client.open()
    client.read_until_content()
    for method, path in (("DELETE", "/v1/models/busy"), ("POST", "/v1/models/busy/unload")):
        response = http.request(method, path)
        assert native_error(response, 409)
        assert response.headers["X-Should-Retry"] == "false"
    assert http.delete("/v1/models/busy?force=true").json()["status"] == "deleted"
    last = client.read_rest()[-2:]
    client.close()
    assert last[1] == b"data: [DONE]"
    assert json.loads(last[0].removeprefix(b"data: "))["error"]["code"] == "cancelled"
    assert series.running("busy") == 0
    assert not is_installed(http, "busy")
