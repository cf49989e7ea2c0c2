"""The wall: who may call at all, by Host, Origin and key, and what may be served to whom."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc
import pytest
import requests

from mlxgui.v1 import model_pb2, model_pb2_grpc
from tests.conftest import RestSession, TinyModels
from tests.support_calls import fails, last_operation
from tests.support_http import anthropic_error, chat_body, native_error, openai_error, raw_request
from tests.support_server import RunningServer, ServerDidNotStartError, start

KEY = "sk-this-is-the-only-key"
PAGE = "https://page.example"


@pytest.fixture(scope="module")
def guarded(
    server_environment: Mapping[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    tiny_models: TinyModels,
) -> Iterator[RunningServer]:
    """A server with a key, an allowed host, an allowed origin and a root of models."""
    running = start(
        tmp_path_factory.mktemp("guarded"),
        {**server_environment, "MLX_GUI_API_KEY": KEY},
        allowed_hosts=["Models.Example"],
        cors_origins=[PAGE],
        model_roots=[str(tiny_models.llama.parent)],
        standby_count=0,
    )
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def guarded_http(guarded: RunningServer) -> Iterator[RestSession]:
    with RestSession(guarded.rest_url) as session:
        yield session


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1.evil.example",
        "localhost.evil.example:{port}",
        "192.168.1.7:{port}",
        "[::2]:{port}",
        "0.0.0.0:{port}",
        "",
        "localhost@evil.example",
        "localhost, evil.example",
        "localhost:8000:9000",
        "loc\xe4lhost",
    ],
)
def test_a_foreign_host_is_refused_on_every_route(http: RestSession, host: str) -> None:
    """A page that makes its own name lead here does not get in, not even to read."""
    named = host.format(port=http.base_url.rpartition(":")[2])
    for method, path in (
        ("GET", "/"),
        ("GET", "/v1/models"),
        ("POST", "/v1/chat/completions"),
        ("OPTIONS", "/"),
    ):
        response = http.request(method, path, headers={"Host": named.encode("latin-1")}, json={})
        assert response.status_code == 403, (method, path)
        assert response.json()["detail"]


def test_a_request_without_a_host_is_refused(http: RestSession) -> None:
    status, headers, body = raw_request(http.base_url, b"GET / HTTP/1.0\r\n\r\n")
    assert status == 403 and headers["content-type"] == "application/json" and b"Host" in body


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:{port}", "127.0.0.1", "[::1]:{port}", "LOCALHOST", "localhost."]
)
def test_loopback_names_are_ours(http: RestSession, host: str) -> None:
    named = host.format(port=http.base_url.rpartition(":")[2])
    assert http.get("/health", headers={"Host": named}).status_code == 200


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "http://localhost:1",
        "null",
        "file://",
        "http://127.0.0.1.evil.example",
        "garbage",
        "http://",
    ],
)
def test_a_foreign_origin_changes_nothing(http: RestSession, origin: str) -> None:
    """Whatever the content type says: uploads are forms, and load has no body at all."""
    before = http.get("/v1/models/demo").json()
    requests_ = [
        ("POST", "/v1/models/demo/load", None, {}),
        ("POST", "/v1/models/demo/unload", None, {}),
        ("DELETE", "/v1/models/demo", None, {}),
        ("POST", "/v1/models/install", b'{"model_id": "a/b"}', {"Content-Type": "text/plain"}),
        ("POST", "/v1/chat/completions", b"{}", {"Content-Type": "application/x-www-form-urlencoded"}),
        ("POST", "/v1/system/shutdown", None, {}),
        ("DELETE", "/v1/operations/x", None, {}),
        ("PUT", "/v1/settings/log_level", b'{"value": "DEBUG"}', {}),
    ]
    for method, path, data, headers in requests_:
        response = http.request(method, path, data=data, headers={"Origin": origin, **headers})
        assert response.status_code == 403, (method, path)
        assert "--cors-origin" in response.json()["detail"]
        assert not any(name.lower().startswith("access-control") for name in response.headers)
    assert http.get("/v1/models/demo").json() == before


def test_the_server_s_own_pages_and_programs_may_change_things(http: RestSession) -> None:
    own = http.base_url
    port = own.rpartition(":")[2]
    for headers in ({"Origin": own}, {}, {"Origin": f"http://localhost:{port}", "Host": f"localhost:{port}"}):
        assert http.post("/v1/models/demo/load", headers=headers).status_code == 200


def test_pages_of_elsewhere_may_not_read_and_preflights_allow_nothing(http: RestSession) -> None:
    """CORS is off: the browser keeps the answer from the page."""
    response = http.get("/v1/models", headers={"Origin": PAGE})
    assert not any(name.lower().startswith("access-control") for name in response.headers)
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    response = http.options("/v1/chat/completions", headers=asked)
    assert response.status_code == 204
    assert not any(name.lower().startswith("access-control") for name in response.headers)


def test_options_names_the_methods_of_a_route(http: RestSession) -> None:
    for path, methods in (
        ("/health", {"GET", "HEAD", "OPTIONS"}),
        ("/v1/chat/completions", {"POST", "OPTIONS"}),
        ("/v1/models/demo", {"GET", "HEAD", "DELETE", "OPTIONS"}),
    ):
        response = http.options(path)
        assert response.status_code == 204 and response.content == b""
        assert set(response.headers["Allow"].split(", ")) >= methods
    assert http.options("/nowhere").status_code == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer sk-any-key-works"},
        {"x-api-key": "sk-your-api-key-here"},
        {"Authorization": "Basic dXNlcjpwYXNz"},
        {"Authorization": "Bearer"},
        {},
    ],
)
def test_any_key_or_none_is_accepted_on_loopback(http: RestSession, headers: dict[str, str]) -> None:
    assert http.get("/v1/models", headers=headers).status_code == 200
    response = http.post("/v1/chat/completions", json=chat_body(max_tokens=1), headers=headers)
    assert response.status_code == 200


GOOD_KEYS: list[dict[str, str]] = [
    {"Authorization": f"Bearer {KEY}"},
    {"Authorization": f"bearer {KEY}"},
    {"x-api-key": KEY},
]
BAD_KEYS: list[dict[str, str]] = [
    {},
    {"Authorization": "Bearer wrong"},
    {"Authorization": f"Basic {KEY}"},
    {"Authorization": KEY},
    {"Authorization": f"Bearer {KEY}x"},
    {"Authorization": f"Bearer {KEY[:-1]}"},
    {"Authorization": "Bearer \xff\xfe"},
    {"x-api-key": ""},
    {"x-api-key": KEY.upper()},
]


@pytest.mark.parametrize("headers", BAD_KEYS)
def test_a_server_with_a_key_refuses_every_other(guarded_http: RestSession, headers: dict[str, str]) -> None:
    """401 on every route but /health, and the sentence says how to send a key."""
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    for method, path in (
        ("GET", "/"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("POST", "/v1/models/demo/load"),
        ("DELETE", "/v1/models/demo"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/responses"),
        ("POST", "/v1/messages"),
        ("GET", "/nowhere"),
    ):
        response = guarded_http.request(method, path, json={}, headers=encoded)
        error = (anthropic_error if path == "/v1/messages" else openai_error)(response, 401)
        assert error["type"] == "authentication_error" and "Bearer" in error["message"]
        assert KEY not in response.text
        assert response.headers["WWW-Authenticate"] == "Bearer"
    assert guarded_http.get("/health", headers=encoded).status_code == 200


@pytest.mark.parametrize("headers", GOOD_KEYS)
def test_a_server_with_a_key_serves_who_has_it(guarded_http: RestSession, headers: dict[str, str]) -> None:
    assert guarded_http.get("/v1/models", headers=headers).status_code == 200
    response = guarded_http.post("/v1/models/nowhere/load", headers=headers)
    assert native_error(response, 404) == "Model 'nowhere' not found"


def test_grpc_over_tcp_wants_the_key_and_the_unix_socket_does_not(guarded: RunningServer) -> None:
    """The socket's folder guards it. Health stays open, reflection does not."""
    tcp, unix = guarded.channel(), guarded.channel(unix=True)
    stub = model_pb2_grpc.ModelServiceStub(tcp)
    request = model_pb2.ListModelsRequest()
    for metadata in ((), (("authorization", "Bearer wrong"),), (("x-api-key", ""),)):
        failure = fails(lambda metadata=metadata: stub.ListModels(request, metadata=metadata))  # type: ignore[misc]
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
        assert KEY not in failure.message
    for good in ((("authorization", f"Bearer {KEY}"),), (("x-api-key", KEY),)):
        assert stub.ListModels(request, metadata=good).models
    assert model_pb2_grpc.ModelServiceStub(unix).ListModels(request).models
    assert guarded.unix_path.parent.stat().st_mode & 0o777 == 0o700


def test_an_allowed_host_and_origin_are_let_in_and_no_others(guarded_http: RestSession) -> None:
    """Never with credentials, and never `*`."""
    key = {"x-api-key": KEY}
    assert guarded_http.get("/v1/models", headers={**key, "Host": "models.example"}).status_code == 200
    assert guarded_http.get("/v1/models", headers={**key, "Host": "models.example:8000"}).status_code == 200
    assert guarded_http.get("/v1/models", headers={**key, "Host": "other.example"}).status_code == 403
    response = guarded_http.get("/v1/models", headers={**key, "Origin": PAGE})
    assert response.headers["Access-Control-Allow-Origin"] == PAGE
    assert "Origin" in response.headers["Vary"]
    assert "Access-Control-Allow-Credentials" not in response.headers
    assert "X-Request-Id" in response.headers["Access-Control-Expose-Headers"]
    response = guarded_http.post("/v1/models/nowhere/load", headers={**key, "Origin": PAGE})
    assert response.status_code == 404
    assert response.headers["Access-Control-Allow-Origin"] == PAGE
    for origin in (
        "https://other.example",
        PAGE + ".evil.example",
        "http://page.example",
        PAGE.upper() + "x",
    ):
        response = guarded_http.post("/v1/models/nowhere/load", headers={**key, "Origin": origin})
        assert response.status_code == 403
        assert "Access-Control-Allow-Origin" not in response.headers


def test_a_preflight_of_an_allowed_page_needs_no_key(guarded_http: RestSession) -> None:
    """Browsers send none with it."""
    response = guarded_http.options(
        "/v1/chat/completions",
        headers={
            "Origin": PAGE,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os",
        },
    )
    assert response.status_code == 204
    assert response.headers["Access-Control-Allow-Origin"] == PAGE
    assert "POST" in response.headers["Access-Control-Allow-Methods"]
    assert "x-stainless-os" in response.headers["Access-Control-Allow-Headers"]


def test_a_refusal_tells_an_allowed_page_why(guarded_http: RestSession) -> None:
    """Without the header its script could not read the 401."""
    response = guarded_http.get("/v1/models", headers={"Origin": PAGE})
    assert response.status_code == 401
    assert response.headers["Access-Control-Allow-Origin"] == PAGE


def test_the_key_is_in_no_log_and_on_no_command_line(
    guarded: RunningServer, guarded_http: RestSession
) -> None:
    assert guarded_http.get("/v1/models", headers={"x-api-key": KEY}).status_code == 200
    assert KEY not in guarded.log()
    commands = [" ".join(process.cmdline()) for process in guarded.descendants()]
    assert commands and not any(KEY in command for command in commands)


def test_a_directory_over_rest_needs_a_root_that_allows_it(
    http: RestSession, guarded_http: RestSession, tiny_models: TinyModels, tmp_path: Any
) -> None:
    """A page, or a program of another user, cannot have any folder of this user's read."""
    detail = native_error(http.post("/v1/models/install", json={"path": str(tiny_models.llama)}), 403)
    assert "unix socket" in detail
    assert http.get("/v1/models/tiny-llama").status_code == 404

    key = {"x-api-key": KEY}
    allowed = guarded_http.post("/v1/models/install", json={"path": str(tiny_models.llama)}, headers=key)
    assert allowed.status_code == 200, allowed.text
    assert allowed.json()["model_name"] == "tiny-llama" and allowed.json()["status"] == "installed"
    (tmp_path / "link").symlink_to("/")
    inside = tiny_models.llama.parent / "way-out"
    inside.symlink_to(tmp_path)
    try:
        for path in ("/etc", str(tiny_models.llama.parent / ".." / ".."), str(inside), str(tmp_path)):
            response = guarded_http.post("/v1/models/install", json={"path": path}, headers=key)
            assert native_error(response, 403)
    finally:
        inside.unlink()
    assert guarded_http.delete("/v1/models/tiny-llama", headers=key).json()["removed_files"] is False


def test_a_directory_over_grpc_tcp_needs_a_root_too_and_the_unix_socket_none(
    channel: grpc.Channel, unix_channel: grpc.Channel, tiny_models: TinyModels
) -> None:
    request = model_pb2.InstallModelRequest(local_directory=str(tiny_models.qwen3), name="by-socket")
    failure = fails(lambda: model_pb2_grpc.ModelServiceStub(channel).InstallModel(request))
    assert (failure.code, failure.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
    stub = model_pb2_grpc.ModelServiceStub(unix_channel)
    assert last_operation(stub.InstallModel(request)).success.name == "by-socket"
    stub.DeleteModel(model_pb2.DeleteModelRequest(name="by-socket"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"host": "0.0.0.0", "bridge": True}, ["0.0.0.0", "MLX_GUI_API_KEY", "--insecure"]),
        ({"host": "::", "bridge": True}, ["::", "--insecure"]),
        ({"grpc_host": "0.0.0.0"}, ["--tls-certificate", "--insecure"]),
        ({"grpc_host": "0.0.0.0", "api_key": "k"}, ["--tls-certificate", "--insecure"]),
        ({"require_key": True}, ["MLX_GUI_API_KEY"]),
    ],
    ids=["REST", "REST IPv6", "gRPC", "gRPC with a key but no TLS", "a key that is not set"],
)
def test_beyond_loopback_a_start_without_key_is_refused_in_one_line(
    start_server: Callable[..., RunningServer], options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ServerDidNotStartError) as refused:
        start_server(**options)
    assert refused.value.status == 2
    (line,) = refused.value.words.strip().splitlines()
    assert all(word in line for word in words), line


def test_insecure_said_aloud_serves_everybody(start_server: Callable[..., RunningServer]) -> None:
    """Under any address in figures, as each of them is ours; names stay foreign."""
    server = start_server(host="0.0.0.0", grpc_host="0.0.0.0", insecure=True, bridge=True)
    port = re.findall(r":(\d+)$", server.rest_url)[0]
    url = f"http://127.0.0.1:{port}/health"
    for host, status in (("192.168.1.7", 200), (f"0.0.0.0:{port}", 200), ("evil.example", 403)):
        assert requests.get(url, headers={"Host": host}, timeout=60).status_code == status
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_address.rpartition(':')[2]}") as channel:
        assert model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest()).models
