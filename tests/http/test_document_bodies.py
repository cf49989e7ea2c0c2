"""The API document's example answers: the server's own have every key of them, with values of the same JSON type.

Requests and expectations are read from the document itself, so that no example can be left out.
"""

import json
import re
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import requests

from tests.conftest import RestSession
from tests.http.document_models import EMBEDDING_ID, LLAMA, LLAMA_ID, documented, install, make_ready
from tests.support_document import LATER, Block, blocks, faults, statements
from tests.support_http import eventually, native_error
from tests.support_server import RunningServer, start

__all__ = ["documented"]  # A fixture.

SETTING = "model_inactivity_timeout_minutes"
PLACES = {
    "{model_name}": LLAMA,
    "{model_id}": LLAMA_ID,
    "{key}": SETTING,
}
QUERIES = {
    # What else the session's hub has is none of the document's.
    "/v1/discover/models": f"?query={LLAMA_ID}",
    "/v1/discover/embeddings": f"?query={EMBEDDING_ID}",
}
# Values that the document's own situation makes certain, apart from their type.
CERTAIN = ("message", "status", "model", "key", "value", "updated", "priority", "removed_files", "healthy")
LISTS = (("GET", "/v1/models"), ("GET", "/v1/manager/models"))
ENDING = ("/v1/system/shutdown", "/v1/system/restart")

ANSWERS = [block for block in blocks("json") if block.route and block.label.startswith("**Response")]
# What takes the model out of memory comes last, so that it is loaded once.
LAST = (("POST", "/v1/models/{model_name}/unload"), ("DELETE", "/v1/models/{model_name}"))
IN_ORDER = sorted(
    (block for block in ANSWERS if block.route and block.route[1] not in ENDING),
    key=lambda block: LAST.index(block.route) if block.route in LAST else -1,
)
ROUTE_HEADING = re.compile(r"#### `([A-Z]+) (/[^`]*)`")


def request_body(block: Block) -> Any:
    """The document's own body for the route of an answer."""
    for other in blocks("json"):
        if other.heading == block.heading and other.label == "**Request Body:**":
            return other.json()
    return None


def ask(http: RestSession, block: Block, query: str = "") -> requests.Response:
    assert block.route is not None
    method, path = block.route
    for place, value in PLACES.items():
        path = path.replace(place, value)
    return http.request(method, path + query, json=request_body(block))


def check(block: Block, answer: requests.Response) -> None:
    """200, and the answer keeps to the example."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    example, body = block.json(), answer.json()
    if "system" in example and body["system"]["gpu_memory"] is None:
        # The one exception: a machine without a GPU has no memory of one.
        del example["system"]["gpu_memory"]
    if block.route in LISTS:
        # Other models of the session came from no hub, or were never used.
        body["models"] = [model for model in body["models"] if model["name"] == LLAMA]
    assert faults(example, body) == []
    for key in CERTAIN:
        if key in example:
            assert body[key] == example[key], key


@pytest.fixture
def restored(http: RestSession) -> Iterator[None]:
    """The setting that the document changes is forgotten afterwards."""
    yield
    http.delete(f"/v1/settings/{SETTING}")


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    "block", IN_ORDER, ids=lambda block: f"line {block.line} {' '.join(block.route or ())}"
)
def test_an_answer_keeps_to_its_example(documented: RestSession, block: Block) -> None:
    if block.line in LATER:
        pytest.skip(LATER[block.line])
    assert block.route is not None
    if block.route in LAST:
        install(documented)
    else:
        make_ready(documented)
    check(block, ask(documented, block, QUERIES.get(block.route[1], "")))


def test_every_route_of_the_document_is_asked() -> None:
    """But for the two that say `same format`, which are asked below, and those of later issues."""
    headings = {match for _, text in statements() if (match := ROUTE_HEADING.fullmatch(text))}
    routes = {(match[1], match[2]) for match in headings}
    asked = {block.route for block in ANSWERS}
    left = {("GET", "/v1/discover/popular"), ("GET", "/v1/discover/compatible"), ("POST", "/v1/audio/speech")}
    assert len(routes) > 20 and routes - asked == left


@pytest.mark.parametrize(
    "path", ["/v1/discover/popular?limit=1", f"/v1/discover/compatible?query={LLAMA_ID}&max_memory_gb=8"]
)
def test_the_same_format_is_the_same(documented: RestSession, path: str) -> None:
    """As /v1/discover/models; `compatible` says of each model whether it fits."""
    (block,) = (block for block in ANSWERS if block.route == ("GET", "/v1/discover/models"))
    answer = documented.get(path)
    check(block, answer)
    models = answer.json()["models"]
    assert models[0]["id"] == LLAMA_ID
    assert "compatible" not in path or [model["memory_fit"] for model in models] == [True]


def test_a_compatible_model_says_so_in_the_documented_words(documented: RestSession) -> None:
    body = documented.get(f"/v1/discover/models/{LLAMA_ID}").json()
    assert body["system_compatible"] is True
    assert re.fullmatch(
        r"✅ Compatible - \d+(\.\d+)?GB available, \d+(\.\d+)?GB required", body["compatibility_message"]
    )
    assert body["library_name"] and body["pipeline_tag"] == "text-generation"


def test_a_change_of_a_setting_is_seen_in_all_settings(documented: RestSession, restored: None) -> None:
    """And forgetting it brings the default back, which is the document's example."""
    assert documented.put(f"/v1/settings/{SETTING}", json={"value": 61}).status_code == 200
    assert documented.get("/v1/settings").json()[SETTING] == 61
    detail = documented.get("/v1/settings?details=true").json()[SETTING]
    assert (detail["value"], detail["source"]) == (61, "stored")
    forgotten = documented.delete(f"/v1/settings/{SETTING}").json()
    assert (forgotten["key"], forgotten["value"]) == (SETTING, 30)
    assert documented.get("/v1/settings").json()[SETTING] == 30
    detail = documented.get("/v1/settings?details=true").json()[SETTING]
    assert (detail["value"], detail["source"]) == (30, "default")


# --- Failures ---


def sentence(line: int) -> str:
    """The `detail` of the example at a line."""
    (block,) = (block for block in blocks("json") if block.line == line)
    return str(block.json()["detail"])


def test_an_unknown_model_is_the_documented_404(documented: RestSession) -> None:
    for line, name in ((1275, "invalid-model"), (1284, "nonexistent-model")):
        for method, path in (
            ("GET", ""),
            ("DELETE", ""),
            ("POST", "/load"),
            ("POST", "/unload"),
            ("GET", "/health"),
        ):
            answer = documented.request(method, f"/v1/models/{name}{path}")
            assert native_error(answer, 404) == sentence(line)
        for method, path in (("GET", "status"), ("POST", "priority")):
            answer = documented.request(
                method,
                f"/v1/manager/models/{name}/{path}",
                json={"priority": 1} if method == "POST" else None,
            )
            assert native_error(answer, 404) == sentence(line)


def test_a_model_that_is_not_loaded_is_the_documented_400(documented: RestSession) -> None:
    install(documented)
    assert documented.post(f"/v1/models/{LLAMA}/unload").status_code == 200
    answer = documented.post(f"/v1/models/{LLAMA}/generate", json={"prompt": "Once upon a time"})
    assert native_error(answer, 400) == sentence(1291)


# --- A server of its own, which is filled, restarted and ended ---


@pytest.fixture(scope="module")
def own(
    server_environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    running = start(tmp_path_factory.mktemp("document"), server_environment, standby_count=0)
    yield running
    if running.process.poll() is None:
        running.stop()


def test_a_model_over_the_memory_is_the_documented_400(own: RunningServer) -> None:
    """With both numbers; the estimate says the same and changes nothing."""
    with RestSession(own.rest_url) as http:
        assert http.put("/v1/settings/max_model_memory_gb", json={"value": 0.001}).status_code == 200
        detail = native_error(http.post("/v1/models/demo/load"), 400)
        number = r"\d+(\.\d+)?"
        pattern = re.sub(rf"{number}(?=GB)", lambda _: number, re.escape(sentence(1298)).replace(r"\.", "."))
        # The document's sentence as it is, then the way out.
        assert re.fullmatch(pattern + "; max_model_memory_gb limits it", detail), detail
        estimate = http.get("/v1/models/demo/estimate").json()
        assert (estimate["accepted"], estimate["refusal"]) == (False, detail)
        assert http.delete("/v1/settings/max_model_memory_gb").status_code == 200
        assert http.post("/v1/models/demo/load").status_code == 200
        assert http.get("/v1/models/demo/estimate").json()["already_loaded"] is True


def ending(path: str) -> Block:
    (block,) = (block for block in ANSWERS if block.route == ("POST", path))
    return block


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_restart_and_shutdown_answer_as_documented_and_do_it(own: RunningServer) -> None:
    """Restart: the same process, with the settings that waited for it and the models that were loaded. Then none."""
    port = free_port()
    with RestSession(own.rest_url) as http:
        assert http.post("/v1/models/demo/load").status_code == 200
        changed = http.put("/v1/settings/server_port", json={"value": port}).json()
        assert (changed["value"], changed["pending_restart"]) == (port, True)
        detail = http.get("/v1/settings?details=true").json()["server_port"]
        assert detail["pending_restart"] is True and detail["value"] != port
        check(ending("/v1/system/restart"), http.post("/v1/system/restart", json={"grace_seconds": 5}))
    with RestSession(f"http://127.0.0.1:{port}") as http:

        def is_back() -> bool:
            try:
                return bool(http.get("/v1/models/demo/health").json()["status"] == "loaded")
            except (requests.ConnectionError, KeyError):
                return False

        eventually(is_back, "the server is back with its model, on the other port")
        assert own.process.poll() is None
        assert http.get("/v1/settings").json()["server_port"] == port
        check(ending("/v1/system/shutdown"), http.post("/v1/system/shutdown?grace_seconds=5"))
    assert own.process.wait(60) == 0


def test_the_parts_of_the_harness_find_what_is_wrong() -> None:
    """Missing keys, other types, numbers for truths, words for instants, empty lists."""
    example = json.loads(
        '{"a": 1, "b": true, "c": null, "d": "2025-01-04T10:30:00", "e": [{"f": 1.5}], "g": {}, "h": "x"}'
    )
    good = {
        "a": 1.5,
        "b": False,
        "c": None,
        "d": "2026-01-01T00:00:00",
        "e": [{"f": 2}],
        "g": {"i": 1},
        "h": "y",
    }
    assert faults(example, good) == []
    for key, value in (
        ("a", True),
        ("a", "1"),
        ("b", 0),
        ("c", "x"),
        ("d", "2026-01-01"),
        ("d", "2026-01-01T00:00:00Z"),
        ("e", []),
        ("e", [{}]),
        ("e", [{"f": 1}, {"f": "1"}]),
        ("g", []),
        ("h", None),
    ):
        assert len(faults(example, {**good, key: value})) == 1, (key, value)
    assert faults(example, {}) == [f"$.{key} is missing" for key in example]
