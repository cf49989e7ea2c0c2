"""Parameters of every route: unknown ones and wrong values are refused by name, and nothing is done."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import RestSession
from tests.http.routes import BODIES, Route, all_routes
from tests.support_http import PARIS, anthropic_error, chat_body, native_error, openai_error

ROUTES = [route for route in all_routes() if route.rule.startswith("/v1/")]
# OpenAI's clients send to these whatever their users tell them to.
LENIENT = ("models.list_models", "models.show_model")
# The demo model is not for these; tests/grpc/test_embeddings.py asks one that is.
OTHERS = ("openai.audio", "openai.voices", "openai.create_embedding", "openai.create_ranking")
DIALECTS = ("openai", "responses", "messages")
NATIVE = [
    route
    for route in ROUTES
    if route.endpoint.partition(".")[0] not in DIALECTS and route.endpoint not in LENIENT
]
# They do something and have no documented body: what they are told may be a query string or an object.
COMMANDS = [route for route in NATIVE if route.method in ("POST", "DELETE") and route.endpoint not in BODIES]


def name_of(route: Route) -> str:
    return f"{route.method} {route.rule}"


@pytest.fixture(scope="module", autouse=True)
def nothing_was_done(http: RestSession) -> Iterator[None]:
    """After all of it the demo model is there, loaded, unpinned, and answers; the server runs; no setting is stored."""
    assert http.post("/v1/models/demo/load").status_code == 200
    settings = http.get("/v1/settings").json()
    yield
    model = http.get("/v1/models/demo").json()
    assert (model["status"], model["pinned"]) == ("loaded", False)
    assert http.get("/v1/settings").json() == settings
    answer = http.post("/v1/chat/completions", json=chat_body()).json()
    assert answer["choices"][0]["message"]["content"] == PARIS


@pytest.mark.parametrize("route", NATIVE, ids=name_of)
def test_an_unknown_parameter_is_refused_by_name(http: RestSession, route: Route) -> None:
    """Also beside those that are known; a misspelt one would be lost silently. Of two values none is guessed."""
    for query, name in (("nonsense=1", "nonsense"), ("Force=true", "Force"), ("a=1&a=2", "a"), ("=1", "")):
        answer = http.request(route.method, f"{route.path}?{query}", json=route.body)
        assert f"`{name}`" in native_error(answer, 400)


@pytest.mark.parametrize("route", [route for route in ROUTES if route not in NATIVE], ids=name_of)
def test_openai_s_routes_report_an_unknown_parameter(http: RestSession, route: Route) -> None:
    """In the header of warnings, and on a stream."""
    if route.endpoint in OTHERS:
        pytest.skip("takes another model")
    # There twice, too.
    answer = http.request(route.method, f"{route.path}?api-version=1&api-version=2", json=route.body)
    assert answer.status_code == 200
    assert "`api-version`" in answer.headers["X-MLXGUI-Warnings"]
    if route.body is not None:
        answer = http.request(
            route.method, f"{route.path}?api-version=1", json={**route.body, "stream": True, "store": True}
        )
        assert all(name in answer.headers["X-MLXGUI-Warnings"] for name in ("`api-version`", "`store`"))


@pytest.mark.parametrize("route", COMMANDS, ids=name_of)
def test_a_command_s_body_is_read_or_refused(http: RestSession, route: Route) -> None:
    """Unknown members by name, what is no object, keys that are there twice, and a query beside it."""
    for raw, words in (
        (b'{"nonsense": 1}', "`nonsense`"),
        (b'{"nonsense": null}', "`nonsense`"),
        (b"[]", "object"),
        (b"null", "object"),
        (b'{"a": 1, "a": 1}', "twice"),
        (b'{"a": ', "JSON"),
        (b"force=true", "JSON"),
    ):
        assert words in native_error(http.request(route.method, route.path, data=raw), 400)
    answer = http.request(route.method, f"{route.path}?force=true", data=b'{"nonsense": 1}')
    assert native_error(answer, 400)


@pytest.mark.parametrize("route", [route for route in ROUTES if route.endpoint in BODIES], ids=name_of)
def test_a_key_that_is_there_twice_is_refused_by_name(http: RestSession, route: Route) -> None:
    """With the same value too."""
    assert route.body is not None
    key = next(iter(route.body))
    raw = json.dumps(route.body)[:-1] + f', "{key}": {json.dumps(route.body[key])}}}'
    answer = http.request(route.method, route.path, data=raw)
    if route in NATIVE:
        assert f"`{key}` is there twice" in native_error(answer, 400)
    elif route.endpoint.startswith("messages."):
        assert anthropic_error(answer, 400)["details"]["param"] == key
    else:
        assert openai_error(answer, 400)["param"] == key


TRUTHS = ["", "maybe", "2", "null"]
INTEGERS = ["", "high", "1.5", "1e3", "0x1", "٣", "9" * 30, "-" + "9" * 30]
NUMBERS = ["", "much", "nan", "inf", "-inf", "1e999", "9" * 100]
BAD_QUERIES: list[tuple[str, str, str, list[str]]] = [
    ("POST", "/v1/models/demo/load", "priority", [*INTEGERS, "101", "-101"]),
    ("POST", "/v1/models/demo/load", "keep_alive", ["", "soon", "5 m", "m", "1e400", "9" * 40]),
    ("POST", "/v1/models/demo/unload", "force", TRUTHS),
    ("DELETE", "/v1/models/demo", "force", TRUTHS),
    ("DELETE", "/v1/models/demo", "remove_files", TRUTHS),
    ("POST", "/v1/models/demo/update", "wait", TRUTHS),
    ("GET", "/v1/models/demo/estimate", "concurrent_requests", [*INTEGERS, "0", "-1", "1025"]),
    ("GET", "/v1/models/demo/estimate", "tokens_per_request", [*INTEGERS, "0", "-1"]),
    ("GET", "/v1/manager/models", "include_available", TRUTHS),
    ("GET", "/v1/discover/models", "limit", [*INTEGERS, "0", "-1", "101"]),
    ("GET", "/v1/discover/models", "sort", ["", "size", "Downloads", "downloads,likes"]),
    ("GET", "/v1/discover/popular", "limit", [*INTEGERS, "0", "101"]),
    ("GET", "/v1/discover/embeddings", "limit", [*INTEGERS, "0", "101"]),
    ("GET", "/v1/discover/compatible", "limit", [*INTEGERS, "0", "101"]),
    ("GET", "/v1/discover/compatible", "max_memory_gb", [*NUMBERS, "-1", "0", "0.0", "1e30"]),
    ("GET", "/v1/operations", "limit", [*INTEGERS, "0", "-1", "1001"]),
    ("GET", "/v1/operations", "include_done", TRUTHS),
    ("GET", "/v1/operations", "page_token", ["x", "-1", "9" * 1000]),
    ("POST", "/v1/system/shutdown", "grace_seconds", [*NUMBERS, "-1", "3601"]),
    ("POST", "/v1/system/restart", "grace_seconds", [*NUMBERS, "-1", "3601"]),
    ("GET", "/v1/settings", "details", TRUTHS),
]


@pytest.mark.parametrize(
    ("method", "path", "name", "values"),
    BAD_QUERIES,
    ids=[f"{method} {path} {name}" for method, path, name, _ in BAD_QUERIES],
)
def test_a_wrong_value_in_a_query_is_refused_by_name(
    http: RestSession, method: str, path: str, name: str, values: list[str]
) -> None:
    for value in values:
        answer = http.request(method, path, params={name: value})
        # The names of the contract's fields are longer.
        assert name.rstrip("s") in native_error(answer, 400), value


NO_INTEGERS = ["5", 1.5, True, [5], {}, 2**31, 10**400]
BAD_COMMANDS: list[tuple[str, str, str, list[Any]]] = [
    ("POST", "/v1/models/demo/load", "priority", [*NO_INTEGERS, 101, -101]),
    ("POST", "/v1/models/demo/load", "keep_alive", ["soon", "", [], {}, True, 1e300]),
    ("POST", "/v1/models/demo/unload", "force", ["true", 1, 0, []]),
    ("DELETE", "/v1/models/demo", "force", ["true", 1]),
    ("DELETE", "/v1/models/demo", "remove_files", ["false", 0]),
    ("POST", "/v1/models/demo/update", "revision", [5, [], {}, True]),
    ("POST", "/v1/models/demo/update", "wait", ["false", 0]),
    ("POST", "/v1/system/shutdown", "grace_seconds", ["5", True, [], -1, 3601, 10**400]),
    ("POST", "/v1/system/restart", "grace_seconds", ["5", True, [], -1, 3601, 10**400]),
    ("POST", "/v1/manager/models/demo/priority", "priority", [*NO_INTEGERS, None, "high", 101, -101]),
]


@pytest.mark.parametrize(
    ("method", "path", "name", "values"),
    BAD_COMMANDS,
    ids=[f"{method} {path} {name}" for method, path, name, _ in BAD_COMMANDS],
)
def test_a_wrong_value_in_a_command_s_body_is_refused_by_name(
    http: RestSession, method: str, path: str, name: str, values: list[Any]
) -> None:
    """JSON's own types: a text is no number, a number no truth."""
    for value in values:
        answer = http.request(method, path, data=json.dumps({name: value}))
        assert name in native_error(answer, 400), value


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(http: RestSession, number: str) -> None:
    for method, path, name in (
        ("POST", "/v1/manager/models/demo/priority", "priority"),
        ("POST", "/v1/models/demo/load", "priority"),
        ("POST", "/v1/models/demo/load", "keep_alive"),
        ("POST", "/v1/system/shutdown", "grace_seconds"),
        ("PUT", "/v1/settings/server_port", "value"),
        ("PUT", "/v1/settings/max_model_memory_gb", "value"),
    ):
        assert name in native_error(http.request(method, path, data=f'{{"{name}": {number}}}'), 400)


BAD_SETTINGS: dict[str, list[Any]] = {
    "server_port": [*NO_INTEGERS, None, -1, 65536],
    "max_concurrent_requests": [*NO_INTEGERS, None, 0, -1, 1025],
    "auto_unload_inactive_models": ["true", 1, 0, None, []],
    "model_inactivity_timeout_minutes": [*NO_INTEGERS, None, 0, -1, 10081],
    "enable_system_tray": ["false", 1, None],
    "log_level": [5, None, True, "", "LOUD", "\x00", "x" * 10_000],
    "huggingface_cache_dir": [
        5,
        None,
        ["/x"],
        "relative/path",
        "/proc/nowhere",
        "a\x00b",
        "/" + "x" * 10_000,
    ],
    "enable_gpu_acceleration": ["true", 1, None],
    "bind_to_all_interfaces": ["true", 1, None],
    "max_concurrent_models": [*NO_INTEGERS, None, 0, -1, 65],
    # One that is not installed may be yet: that is a note.
    "default_model": [5, None, True, " ", "x" * 10_000, "\ud800"],
    "preload_models": ["demo", 5, None, [5], [None], [""], ["x" * 10_000], ["demo"] * 17],
    "max_context_length": [*NO_INTEGERS, None, -1, 2**24 + 1],
    "max_model_memory_gb": ["8", True, None, [], -1, 65537, 10**400],
    "image_url_fetch": [5, None, True, ["a.example"], "", "yes", "a.example:80", "\ud800", "x" * 10_000],
}


@pytest.mark.parametrize("key", BAD_SETTINGS)
def test_a_wrong_value_of_a_setting_is_refused(http: RestSession, key: str) -> None:
    """Of another type, out of range, or one that the next start would fail with; the old one stays."""
    before = http.get("/v1/settings").json()
    for value in BAD_SETTINGS[key]:
        answer = http.put(f"/v1/settings/{key}", data=json.dumps({"value": value}))
        detail = native_error(answer, 400)
        assert "value" in detail or key in detail, (value, detail)
    for body in ({}, {"val": 1}, {"value": 1, "more": 1}):
        native_error(http.put(f"/v1/settings/{key}", json=body), 400)
    assert http.get("/v1/settings").json() == before


def test_every_setting_has_its_wrong_values(http: RestSession) -> None:
    assert set(BAD_SETTINGS) == set(http.get("/v1/settings").json())


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
@pytest.mark.parametrize("key", ["colour", "Server_Port", "server_port ", "__class__", "%00", "x" * 10_000])
def test_an_unknown_setting_is_404(http: RestSession, method: str, key: str) -> None:
    body = {"value": 1} if method == "PUT" else None
    assert "not found" in native_error(http.request(method, f"/v1/settings/{key}", json=body), 404)


def test_a_setting_that_would_lock_its_user_out_is_refused_with_the_way_out(http: RestSession) -> None:
    """Beyond loopback without a key the next start would refuse."""
    detail = native_error(http.put("/v1/settings/bind_to_all_interfaces", json={"value": True}), 400)
    assert "key" in detail.lower()


@pytest.mark.parametrize("path", sorted({route.path for route in ROUTES}))
def test_a_wrong_method_is_405_and_names_the_right_ones(http: RestSession, path: str) -> None:
    """In JSON, with the documented `detail`."""
    answer = http.patch(path)
    assert answer.status_code == 405
    allowed = set(answer.headers["Allow"].split(", "))
    assert {route.method for route in ROUTES if route.path == path} <= allowed
    assert openai_error(answer, 405)["code"] == "method_not_allowed"
