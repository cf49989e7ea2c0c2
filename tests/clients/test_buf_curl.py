"""`buf curl`, given an address and no proto file, runs the main job: the server's reflection says what there is."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support_http import CAPITAL, PARIS
from tests.support_server import RunningServer, clean_environment

CHECKOUT = Path(__file__).parent.parent.parent
BUF_SECONDS = 120

Curl = Callable[..., "subprocess.CompletedProcess[str]"]

CHAT = {"request": {"model": "demo", "messages": [{"role": "ROLE_USER", "content": [{"text": CAPITAL}]}]}}


def find_buf() -> str | None:
    """The checkout's buf, the one MLXGUI_BUF names, or the one on the path."""
    local = CHECKOUT / "node_modules" / ".bin" / "buf"
    return str(local) if local.exists() else os.environ.get("MLXGUI_BUF") or shutil.which("buf")


@pytest.fixture(scope="module", params=["tcp", "unix"])
def curl(request: pytest.FixtureRequest, server: RunningServer) -> Iterator[Curl]:
    """Runs `buf curl` on a path of the server, over TCP and over the unix socket."""
    buf = find_buf()
    if buf is None:
        pytest.skip("buf is not installed: `make env-dev` does it, or MLXGUI_BUF names it")
    is_unix = request.param == "unix"
    base = "http://localhost" if is_unix else f"http://{server.grpc_address}"
    socket = ["--unix-socket", str(server.unix_path)] if is_unix else []

    def run(path: str, *flags: str, data: Any = None) -> "subprocess.CompletedProcess[str]":
        body = [] if data is None else ["--data", json.dumps(data)]
        command = [buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", *socket, *flags, *body]
        return subprocess.run(
            [*command, f"{base}{path}"],
            # Node, which starts it, has words to say on stderr about a preloaded BLAS.
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=BUF_SECONDS,
            check=False,
        )

    yield run


def messages(output: str) -> list[dict[str, Any]]:
    """The JSON documents of an output, one after the other."""
    decoder = json.JSONDecoder()
    found = []
    rest = output.strip()
    while rest:
        value, end = decoder.raw_decode(rest)
        found.append(value)
        rest = rest[end:].lstrip()
    return found


def answer(result: "subprocess.CompletedProcess[str]") -> list[dict[str, Any]]:
    assert result.returncode == 0, result.stderr
    return messages(result.stdout)


def test_it_finds_every_service_and_method(curl: Curl) -> None:
    services = curl("", "--list-services").stdout.split()
    assert set(services) >= {
        "mlxgui.v1.AudioService",
        "mlxgui.v1.InferenceService",
        "mlxgui.v1.ModelService",
        "mlxgui.v1.SystemService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    methods = curl("", "--list-methods")
    assert methods.returncode == 0, methods.stderr
    found = set(methods.stdout.split())
    assert {"mlxgui.v1.InferenceService/ChatStream", "mlxgui.v1.ModelService/InstallModel"} <= found
    assert "grpc.reflection.v1.ServerReflection/ServerReflectionInfo" in found


@pytest.mark.parametrize("reflection", ["grpc-v1", "grpc-v1alpha"])
def test_both_versions_of_reflection_serve_it(curl: Curl, reflection: str) -> None:
    result = curl("/grpc.health.v1.Health/Check", "--reflect-protocol", reflection, data={})
    assert answer(result) == [{"status": "SERVING"}]


def test_it_loads_chats_and_streams(curl: Curl) -> None:
    """LoadModel's snapshots end with the model, the stream is start, deltas, finish and end, health follows."""
    *_, last = answer(curl("/mlxgui.v1.ModelService/LoadModel", data={"name": "demo"}))
    assert last["operation"]["done"] is True
    assert last["operation"]["success"]["state"] == "MODEL_STATE_LOADED"
    health = curl("/grpc.health.v1.Health/Check", data={"service": "model/demo"})
    assert answer(health) == [{"status": "SERVING"}]
    (whole,) = answer(curl("/mlxgui.v1.InferenceService/Chat", data=CHAT["request"]))
    (choice,) = whole["choices"]
    assert choice["message"]["content"] == [{"text": PARIS}]
    assert choice["finishReason"] == "FINISH_REASON_STOP"
    events = answer(curl("/mlxgui.v1.InferenceService/ChatStream", data=CHAT))
    assert set(events[0]) == {"start"} and set(events[-1]) == {"end"}
    assert "".join(event.get("delta", {}).get("text", "") for event in events) == PARIS
    assert events[-2]["finish"]["finishReason"] == "FINISH_REASON_STOP"
    assert events[-1]["end"]["usage"] == whole["usage"]


def test_an_error_shows_its_reason(curl: Curl) -> None:
    """buf knows the types of google.rpc, so the details are readable."""
    result = curl("/mlxgui.v1.ModelService/GetModel", data={"name": "missing"})
    assert result.returncode != 0
    shown = json.loads(result.stderr)
    assert (shown["code"], shown["message"]) == ("not_found", "Model 'missing' not found")
    assert any("ErrorInfo" in detail["type"] for detail in shown["details"])


def test_a_field_that_does_not_exist_is_refused_by_the_schema_alone(curl: Curl) -> None:
    result = curl("/mlxgui.v1.ModelService/GetModel", data={"nome": "demo"})
    assert result.returncode != 0 and "nome" in result.stderr
