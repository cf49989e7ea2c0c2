"""Every route answers with the documented body, key by key, and every failure with the documented sentence."""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import pytest
import requests

from mlxgui.v1 import model_pb2, model_pb2_grpc
from mlxgui_grpc import __version__
from tests.conftest import RestSession, TinyModels
from tests.loopback_hub import LoopbackHub
from tests.support_calls import last_operation
from tests.support_http import CAPITAL, PARIS, chat_body, metric_value, native_error, openai_error
from tests.support_models import DEMO

INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")

# The keys and types of the document's examples; what else there is may be there.
LISTED_MODEL: dict[str, type | tuple[type, ...]] = {
    "id": int,
    "name": str,
    "type": str,
    "status": str,
    "memory_required_gb": (int, float),
    "use_count": int,
    "last_used_at": (str, type(None)),
    "created_at": str,
}
ONE_MODEL = {
    **LISTED_MODEL,
    "path": str,
    "version": str,
    "updated_at": str,
    "error_message": (str, type(None)),
    "metadata": dict,
}
OPENAI_MODEL: dict[str, type | tuple[type, ...]] = {
    "id": str,
    "object": str,
    "created": int,
    "owned_by": str,
    "permission": list,
    "root": str,
    "parent": type(None),
}


def has_shape(body: dict[str, Any], shape: dict[str, type | tuple[type, ...]]) -> bool:
    for key, kind in shape.items():
        assert key in body, f"{key} is missing"
        assert isinstance(body[key], kind) and not (kind is int and isinstance(body[key], bool)), key
    return True


@pytest.fixture
def demo_loaded(http: RestSession) -> None:
    assert http.post("/v1/models/demo/load").status_code == 200


def test_the_root_says_who_answers(http: RestSession) -> None:
    response = http.get("/")
    assert response.json() == {"name": "MLX-GUI API", "version": __version__, "status": "running"}
    assert response.headers["Content-Type"] == "application/json"


def test_the_root_is_a_page_for_browsers_and_links_the_documentation(http: RestSession) -> None:
    """What asks for HTML gets links, each of which leads somewhere; what asks for anything gets JSON."""
    browser = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
    page = http.get("/", headers=browser)
    assert page.headers["Content-Type"].startswith("text/html")
    assert page.headers["Vary"] == "Accept"
    links = set(re.findall(r'href="(/[^"#]*)', page.text))
    assert "/docs" in links
    for link in links:
        assert http.get(link).status_code == 200, link
    assert http.get("/", headers={"Accept": "*/*"}).json()["name"] == "MLX-GUI API"


def test_the_documentation_is_the_readme(http: RestSession) -> None:
    """As the installed package has it."""
    try:
        version("mlxgui-grpc")
    except PackageNotFoundError:
        pytest.skip("the project is not installed in this environment, so there is no README in its metadata")
    page = http.get("/docs").text
    assert "/v1/chat/completions" in page and "<script" not in page


def test_health_is_healthy(http: RestSession) -> None:
    assert http.get("/health").json() == {"status": "healthy"}


def test_the_list_of_models_is_both_documented_bodies(http: RestSession) -> None:
    body = http.get("/v1/models").json()
    assert body["object"] == "list"
    assert len(body["data"]) == len(body["models"]) >= 1
    for entry, model in zip(body["data"], body["models"], strict=True):
        assert has_shape(entry, OPENAI_MODEL) and has_shape(model, LISTED_MODEL)
        assert set(entry) == set(OPENAI_MODEL)
        assert entry["object"] == "model" and entry["permission"] == []
        assert entry["id"] == entry["root"] == model["name"]
        assert INSTANT.fullmatch(model["created_at"])
    (demo,) = (model for model in body["models"] if model["name"] == "demo")
    assert demo["type"] == "text" and demo["status"] in ("loaded", "unloaded")


def test_one_model_is_its_documented_body_and_openai_s(http: RestSession) -> None:
    """`id` stays the number."""
    body = http.get("/v1/models/demo").json()
    assert has_shape(body, ONE_MODEL)
    assert has_shape(body, {key: kind for key, kind in OPENAI_MODEL.items() if key != "id"})
    assert body["object"] == "model" and body["root"] == "demo"
    assert body["path"] == str(DEMO)
    assert body["error_message"] is None
    assert INSTANT.fullmatch(body["updated_at"])
    assert 0 < body["memory_required_gb"] < 1


def test_loading_and_unloading_say_so_and_can_be_repeated(http: RestSession) -> None:
    """The state is seen in the model's entry, its health and its list, all three alike."""
    for _ in range(2):
        assert http.post("/v1/models/demo/load").json() == {
            "message": "Model 'demo' loaded successfully",
            "status": "loaded",
        }
    http.post("/v1/chat/completions", json=chat_body())
    health = http.get("/v1/models/demo/health").json()
    assert set(health) == {"model", "status", "healthy", "last_used"}
    assert (health["model"], health["status"], health["healthy"]) == ("demo", "loaded", True)
    assert INSTANT.fullmatch(health["last_used"])
    assert http.get("/v1/models/demo").json()["status"] == "loaded"
    for _ in range(2):
        assert http.post("/v1/models/demo/unload").json() == {
            "message": "Model 'demo' unloaded successfully",
            "status": "unloaded",
        }
    health = http.get("/v1/models/demo/health").json()
    assert (health["status"], health["healthy"]) == ("unloaded", False)
    assert http.get("/v1/models/demo").json()["status"] == "unloaded"


def test_load_takes_the_documented_priority_and_refuses_others(http: RestSession) -> None:
    assert http.post("/v1/models/demo/load?priority=10").status_code == 200
    for value in ("1000", "high", "1.5", "", "-101"):
        assert "priority" in native_error(http.post("/v1/models/demo/load", params={"priority": value}), 400)
    assert "keep_alive" in native_error(http.post("/v1/models/demo/load?keep_alive=soon"), 400)


@pytest.mark.usefixtures("demo_loaded")
def test_generate_answers_as_documented(http: RestSession, demo_tokenizer: Any) -> None:
    """All documented parameters at once, the exact text, and counts that are the tokenizer's."""
    prompt = "The capital of France is"
    body = http.post(
        "/v1/models/demo/generate",
        json={
            "prompt": prompt,
            "max_tokens": 100,
            "temperature": 0.0,
            "top_p": 0.9,
            "top_k": 0,
            "repetition_penalty": 1.0,
            "repetition_context_size": 20,
            "seed": None,
        },
    ).json()
    assert set(body) == {"model", "prompt", "text", "finish_reason", "usage", "timing"}
    assert (body["model"], body["prompt"], body["text"]) == ("demo", prompt, " Paris.")
    assert body["finish_reason"] == "stop"
    usage = body["usage"]
    assert usage["prompt_tokens"] == len(demo_tokenizer.encode(prompt).ids)
    # And the token that ended it.
    assert (
        usage["completion_tokens"] == len(demo_tokenizer.encode(" Paris.", add_special_tokens=False).ids) + 1
    )
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    timing = body["timing"]
    assert set(timing) == {"generation_time_seconds", "tokens_per_second"}
    rate = usage["completion_tokens"] / timing["generation_time_seconds"]
    assert timing["tokens_per_second"] == pytest.approx(rate, rel=0.01)


def test_generate_wants_the_model_loaded(http: RestSession) -> None:
    http.post("/v1/models/demo/unload")
    response = http.post("/v1/models/demo/generate", json={"prompt": "Once"})
    assert native_error(response, 400) == (
        "Model 'demo' is not loaded. Load it first with POST /v1/models/demo/load"
    )


def test_chat_loads_the_model_and_answers_as_documented(http: RestSession) -> None:
    """Also with the model not in memory, under a name in other case, and with a fresh id each time."""
    http.post("/v1/models/demo/unload")
    body = http.post(
        "/v1/chat/completions", json=chat_body(max_tokens=100, temperature=0.7, seed=1, stream=False)
    )
    answer = body.json()
    assert set(answer) == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert answer["id"].startswith("chatcmpl-") and answer["object"] == "chat.completion"
    assert isinstance(answer["created"], int) and answer["model"] == "demo"
    (choice,) = answer["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": PARIS, "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    other = http.post("/v1/chat/completions", json=chat_body(model="DEMO")).json()
    assert other["choices"][0]["message"]["content"] == PARIS
    assert other["id"] != answer["id"]


def test_completions_answer_in_openai_s_form(http: RestSession) -> None:
    """One prompt, several, token ids; `echo`; an index counts through the prompts' choices."""
    answer = http.post("/v1/completions", json={"model": "demo", "prompt": "The capital of France is"}).json()
    assert answer["id"].startswith("cmpl-") and answer["object"] == "text_completion"
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": " Paris.", "logprobs": None, "finish_reason": "stop"}
    prompts = ["The capital of France is", "The capital of Japan is"]
    answer = http.post("/v1/completions", json={"model": "demo", "prompt": prompts, "n": 2}).json()
    texts = [(choice["index"], choice["text"]) for choice in answer["choices"]]
    assert texts == [(0, " Paris."), (1, " Paris."), (2, " Tokyo."), (3, " Tokyo.")]
    echoed = http.post("/v1/completions", json={"model": "demo", "prompt": prompts[0], "echo": True}).json()
    assert echoed["choices"][0]["text"] == "The capital of France is Paris."


def test_completions_take_token_ids(http: RestSession, demo_tokenizer: Any) -> None:
    ids = demo_tokenizer.encode("The capital of France is").ids
    for prompt, count in ((ids, 1), ([ids, ids], 2)):
        answer = http.post("/v1/completions", json={"model": "demo", "prompt": prompt}).json()
        assert [choice["text"] for choice in answer["choices"]] == [" Paris."] * count
        assert answer["usage"]["prompt_tokens"] == len(ids) * count


def test_metrics_count_what_was_asked(http: RestSession) -> None:
    """Prometheus' text, with vLLM's names, of the server and of the bridge."""

    def value(name: str, **labels: str) -> float:
        return metric_value(http.get("/metrics").text, name, **labels)

    before = {
        "chats": value("mlxgui:request_success_total", model_name="demo"),
        "prompt": value("mlxgui:prompt_tokens_total", model_name="demo"),
        "generated": value("mlxgui:generation_tokens_total", model_name="demo"),
    }
    usage = http.post("/v1/chat/completions", json=chat_body()).json()["usage"]
    assert value("mlxgui:request_success_total", model_name="demo") == before["chats"] + 1
    assert value("mlxgui:prompt_tokens_total", model_name="demo") == before["prompt"] + usage["prompt_tokens"]
    assert (
        value("mlxgui:generation_tokens_total", model_name="demo")
        == before["generated"] + usage["completion_tokens"]
    )
    assert value("mlxgui:num_requests_running", model_name="demo") == 0
    assert value("mlxgui:time_to_first_token_seconds_count", model_name="demo") > 0
    assert value("mlxgui:process_resident_memory_bytes") > 0
    assert http.get("/metrics").headers["Content-Type"].startswith("text/plain")


UNKNOWN = [
    ("GET", "/v1/models/{name}"),
    ("DELETE", "/v1/models/{name}"),
    ("POST", "/v1/models/{name}/load"),
    ("POST", "/v1/models/{name}/unload"),
    ("GET", "/v1/models/{name}/health"),
    ("POST", "/v1/models/{name}/generate"),
]
NAMES = [
    "nonexistent-model",
    "owner/nonexistent",
    "a/b/c",
    "name with space",
    "模型",
    "..",
    "install",
    "demo/demo",
]


@pytest.mark.parametrize(("method", "path"), UNKNOWN, ids=[f"{method} {path}" for method, path in UNKNOWN])
@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_model_is_404_with_the_documented_sentence(
    http: RestSession, method: str, path: str, name: str
) -> None:
    """Slashes in a name count whether they are written or escaped."""
    for written in {quote(name, safe="/"), quote(name, safe="")}:
        url = path.format(name=written)
        response = send_unchanged(http, method, url, {"prompt": "x"} if "generate" in path else None)
        assert native_error(response, 404) == f"Model '{name}' not found"


def send_unchanged(
    http: RestSession, method: str, path: str, json: dict[str, Any] | None = None
) -> requests.Response:
    """Send a path with its escapes and dots as written."""
    request = http.prepare_request(requests.Request(method, http.base_url + "/", json=json))
    request.url = http.base_url + path
    return http.send(request, timeout=60)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_an_unknown_model_is_404_in_openai_s_form_before_any_event(
    http: RestSession, path: str, stream: bool
) -> None:
    body = {**chat_body(model="nonexistent-model"), "stream": stream}
    if path == "/v1/completions":
        body = {"model": "nonexistent-model", "prompt": "x", "stream": stream}
    error = openai_error(http.post(path, json=body), 404)
    assert error == {
        "message": "Model 'nonexistent-model' not found",
        "type": "invalid_request_error",
        "param": error["param"],
        "code": "model_not_found",
    }


def test_a_hub_id_names_a_model_everywhere(
    http: RestSession, hub: LoopbackHub, local_models: model_pb2_grpc.ModelServiceStub
) -> None:
    """In paths with the slash as it is or escaped, in bodies, in other case; deleting removes its files."""
    hub.add("loop-owner/Routes-Model", DEMO)
    installed = http.post("/v1/models/install", json={"model_id": "loop-owner/Routes-Model"})
    assert installed.json() == {
        "message": "Model 'routes-model' installed successfully",
        "model_name": "routes-model",
        "model_id": "loop-owner/Routes-Model",
        "status": "installed",
    }
    for name in (
        "routes-model",
        "loop-owner/Routes-Model",
        "loop-owner%2FRoutes-Model",
        "LOOP-owner/routes-model",
    ):
        assert send_unchanged(http, "GET", f"/v1/models/{name}").json()["name"] == "routes-model", name
        assert send_unchanged(http, "GET", f"/v1/models/{name}/health").json()["model"] == "routes-model"
        assert send_unchanged(http, "POST", f"/v1/models/{name}/load").json()["status"] == "loaded"
        answer = send_unchanged(
            http, "POST", f"/v1/models/{name}/generate", {"prompt": "The capital of France is"}
        )
        assert answer.json()["text"] == " Paris."
    chat = http.post("/v1/chat/completions", json=chat_body(model="loop-owner/Routes-Model")).json()
    assert chat["choices"][0]["message"]["content"] == PARIS
    snapshot = http.get("/v1/models/routes-model").json()["path"]
    unloaded = send_unchanged(http, "POST", "/v1/models/loop-owner%2Froutes-model/unload")
    assert unloaded.json()["message"] == "Model 'routes-model' unloaded successfully"
    send_unchanged(http, "POST", "/v1/models/loop-owner%2Froutes-model/load")
    # Loaded and idle: it is unloaded and deleted.
    deleted = send_unchanged(http, "DELETE", "/v1/models/loop-owner%2FRoutes-Model").json()
    assert (
        deleted.items()
        >= {
            "message": "Model 'routes-model' deleted successfully",
            "removed_files": True,
            "status": "deleted",
        }.items()
    )
    assert not Path(snapshot).exists()
    assert native_error(http.get("/v1/models/routes-model"), 404) == "Model 'routes-model' not found"


def test_delete_can_keep_the_files_and_never_touches_a_directory_of_the_user(
    http: RestSession, hub: LoopbackHub, unix_channel: grpc.Channel, tiny_models: TinyModels
) -> None:
    hub.add("loop-owner/kept", DEMO)
    http.post("/v1/models/install", json={"model_id": "loop-owner/kept"})
    path = Path(http.get("/v1/models/kept").json()["path"])
    deleted = http.delete("/v1/models/kept?remove_files=false").json()
    assert deleted["removed_files"] is False and deleted["status"] == "deleted"
    assert (path / "config.json").exists()

    stub = model_pb2_grpc.ModelServiceStub(unix_channel)
    request = model_pb2.InstallModelRequest(local_directory=str(tiny_models.llama), name="mine")
    last_operation(stub.InstallModel(request))
    deleted = http.delete("/v1/models/mine").json()
    assert deleted["message"] == "Model 'mine' deleted successfully"
    assert deleted["removed_files"] is False and "not downloaded" in deleted["reason"]
    assert (tiny_models.llama / "config.json").exists()
    assert "remove_files" in native_error(http.delete("/v1/models/demo?remove_files=maybe"), 400)


@pytest.mark.parametrize(
    "path", ["/nowhere", "/v1", "/v1/", "/v1/nowhere", "/v1/chat", "/v1/operations/a/b", "/favicon.ico"]
)
def test_an_unknown_route_is_404_in_json(http: RestSession, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        response = send_unchanged(http, method, path)
        assert "GET / links" in openai_error(response, 404)["message"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", {"POST"}),
        ("PUT", "/v1/completions", {"POST"}),
        ("DELETE", "/v1/models", {"GET", "HEAD"}),
        ("POST", "/health", {"GET", "HEAD"}),
        ("PATCH", "/v1/models/demo", {"GET", "HEAD", "DELETE"}),
        ("POST", "/v1/models/demo/health", {"GET", "HEAD"}),
        ("BREW", "/metrics", {"GET", "HEAD"}),
    ],
)
def test_a_wrong_method_is_405_in_json_and_names_the_right_ones(
    http: RestSession, method: str, path: str, allowed: set[str]
) -> None:
    response = http.request(method, path)
    assert response.status_code == 405
    assert allowed <= set(response.headers["Allow"].split(", "))
    assert response.json()["detail"]


def test_head_is_get_without_its_body(http: RestSession) -> None:
    for path in ("/", "/health", "/v1/models"):
        response = http.head(path)
        assert response.status_code == 200 and response.content == b""


def test_request_ids_are_echoed_and_made_where_missing(http: RestSession) -> None:
    """On successes, failures and streams; one that could harm a log is replaced. The server's log has it."""
    for method, path, body in (
        ("GET", "/health", None),
        ("GET", "/v1/models/missing", None),
        ("GET", "/nowhere", None),
        ("POST", "/v1/chat/completions", chat_body(stream=True)),
        ("POST", "/v1/chat/completions", {}),
    ):
        response = http.request(method, path, json=body, headers={"X-Request-Id": "my-id_1.2"})
        assert response.headers["X-Request-Id"] == "my-id_1.2"
        made = [http.request(method, path, json=body).headers["X-Request-Id"] for _ in range(2)]
        assert made[0] != made[1] and all(re.fullmatch(r"[0-9a-f]{32}", one) for one in made)
    for evil in ("a b", "x" * 65, "é".encode("latin-1"), "../../x"):
        answered = http.get("/health", headers={"X-Request-Id": evil}).headers["X-Request-Id"]
        assert re.fullmatch(r"[0-9a-f]{32}", answered)


def test_the_request_id_reaches_the_server_s_log(http: RestSession, server: Any) -> None:
    http.post("/v1/chat/completions", json=chat_body(CAPITAL), headers={"X-Request-Id": "find-me-in-the-log"})
    assert "find-me-in-the-log" in server.log()


def test_keys_without_effect_are_reported_and_refused_ones_named(http: RestSession) -> None:
    """In the body, and in a header for clients that read no body."""
    response = http.post(
        "/v1/chat/completions", json=chat_body(store=True, service_tier="auto", made_up=1, user="me", n=1)
    )
    warnings = response.json()["warnings"]
    for key in ("store", "service_tier", "made_up", "user"):
        assert any(f"`{key}`" in warning for warning in warnings)
        assert f"`{key}`" in response.headers["X-MLXGUI-Warnings"]
    refused_chats: list[tuple[str, Any]] = [
        ("functions", [{"name": "f"}]),
        ("web_search_options", {}),
        ("prediction", {"type": "content", "content": "x"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "a", "format": "wav"}),
    ]
    for key, value in refused_chats:
        assert (
            openai_error(http.post("/v1/chat/completions", json=chat_body(**{key: value})), 400)["param"]
            == key
        )
    refused_completions: list[tuple[str, Any]] = [("suffix", "x"), ("best_of", 2)]
    for key, value in refused_completions:
        body = {"model": "demo", "prompt": "x", key: value}
        assert openai_error(http.post("/v1/completions", json=body), 400)["param"] == key


def test_what_this_version_does_not_do_is_501_and_says_so(http: RestSession) -> None:
    """Never an answer that pretends."""
    for path in ("/v1/audio/transcriptions", "/v1/audio/speech"):
        assert openai_error(http.post(path), 501)["code"] == "not_implemented"
    body = chat_body(draft_model="other")
    response = http.post("/v1/chat/completions", json=body)
    assert openai_error(response, 501)["param"] == "draft_model"
    assert response.headers["X-Should-Retry"] == "false"
