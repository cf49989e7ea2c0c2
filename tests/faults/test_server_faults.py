"""The server itself is killed, stopped and started wrongly: nothing of it stays behind, and its state is whole."""

import json
import signal
import socket
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from mlxgui.v1 import (
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
)
from tests.conftest import TinyModels
from tests.loopback_hub import LoopbackHub
from tests.support_calls import (
    CALL_SECONDS,
    chat,
    endless,
    fails,
    failure_of,
    last_operation,
    reason_of,
    sampling,
    text_of,
    until_first_delta,
)
from tests.support_metrics import wait_until
from tests.support_server import RunningServer, ServerDidNotStartError

StartServer = Callable[..., RunningServer]
FRANCE = ("What is the capital of France?", "The capital of France is Paris.")


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def integrity(home: Path) -> str:
    with sqlite3.connect(home / "state.db") as database:
        return str(database.execute("PRAGMA integrity_check").fetchone()[0])


def test_killing_the_control_process_leaves_no_process_and_the_next_start_has_its_state(
    start_server: StartServer, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """kill -9 with a stream, a worker, a warming standby and the bridge: all end by themselves; what was
    acknowledged before is there after."""
    home = tmp_path / "home"
    server = start_server(home, bridge=True, standby_count=1)
    models = model_pb2_grpc.ModelServiceStub(server.channel(unix=True))
    request = model_pb2.InstallModelRequest(local_directory=str(tiny_models.llama), name="kept")
    installed = last_operation(models.InstallModel(request))
    stub = inference_pb2_grpc.InferenceServiceStub(server.channel())
    stream = stub.ChatStream(endless(), timeout=CALL_SECONDS)
    until_first_delta(stream)
    wait_until(lambda: len(server.descendants()) >= 3, "worker, standby and bridge run")
    descendants = server.descendants()

    server.process.kill()
    server.process.wait()
    failure = fails(lambda: stream)
    assert failure.code == grpc.StatusCode.UNAVAILABLE
    wait_until(lambda: not any(map(is_running, descendants)), "all that it started is gone")
    server.kill()
    assert integrity(home) == "ok"

    again = start_server(home, bridge=True)
    models = model_pb2_grpc.ModelServiceStub(again.channel())
    found = models.ListModels(model_pb2.ListModelsRequest()).models
    assert [model.name for model in found] == ["demo", "kept"]
    assert found[1].id == installed.success.id and found[1].state == model_pb2.MODEL_STATE_UNLOADED
    kept = models.GetOperation(model_pb2.GetOperationRequest(id=installed.id)).operation
    assert kept.done and kept.success.name == "kept"
    stub = inference_pb2_grpc.InferenceServiceStub(again.channel())
    assert text_of(stub.Chat(chat(FRANCE[0]), timeout=CALL_SECONDS)) == FRANCE[1]
    assert again.stop() == 0
    assert not (home / "run" / "address.json").exists() and not again.unix_path.exists()


def test_killing_the_server_in_an_install_registers_nothing_and_the_repeat_resumes(
    start_server: StartServer, hub: LoopbackHub, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """The download's process ends too; the operation is failed after the restart; the bytes that came are kept."""
    hub.add("acme/big", tiny_models.long)
    size = hub.file("acme/big", "model.safetensors").size_bytes
    hold = hub.hold("model.safetensors", size // 2)
    home, cache = tmp_path / "home", tmp_path / "cache"
    server = start_server(home, hub_cache=str(cache), register_demo=False)
    models = model_pb2_grpc.ModelServiceStub(server.channel())
    install = model_pb2.InstallModelRequest(model_id="acme/big")
    stream = models.InstallModel(install, timeout=CALL_SECONDS)
    operation_id = next(stream).operation.id
    assert hold.reached.wait(CALL_SECONDS)
    partials = cache / "models--acme--big" / ".mlxgui"
    wait_until(
        lambda: any(part.stat().st_size >= size // 4 for part in partials.glob("*.part")),
        "half of it is there",
    )
    descendants = server.descendants()
    assert descendants, "the download has a process of its own"
    server.kill()
    wait_until(lambda: not any(map(is_running, descendants)), "the download's process is gone")
    hold.release()
    assert not list(cache.rglob("snapshots/*/*"))

    again = start_server(home, hub_cache=str(cache), register_demo=False)
    models = model_pb2_grpc.ModelServiceStub(again.channel())
    assert not models.ListModels(model_pb2.ListModelsRequest()).models
    lost = models.GetOperation(model_pb2.GetOperationRequest(id=operation_id)).operation
    assert lost.done and reason_of(lost) == "SERVER_DRAINING" and "start it again" in lost.error.message
    before = len(hub.fetches("model.safetensors"))
    model = last_operation(models.InstallModel(install, timeout=CALL_SECONDS)).success
    assert model.huggingface_id == "acme/big"
    (resumed,) = hub.fetches("model.safetensors")[before:]
    assert resumed.range_start
    content = (Path(model.path) / "model.safetensors").read_bytes()
    assert content == (tiny_models.long / "model.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_running_streams_finish_and_takes_no_new_work(
    start_server: StartServer, number: signal.Signals
) -> None:
    """The stream is complete, a new call is SERVER_DRAINING with a time to retry, the exit status is 0."""
    server = start_server()
    channel = server.channel()
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    stream = stub.ChatStream(endless(max_tokens=700), timeout=CALL_SECONDS)
    text = until_first_delta(stream).delta.text
    descendants = server.descendants()
    server.process.send_signal(number)

    seen: list[Any] = []
    refused = threading.Event()

    def try_until_refused() -> None:
        while not refused.is_set():
            try:
                stub.CountTokens(
                    inference_pb2.CountTokensRequest(model="demo", prompt=inference_pb2.Prompt(text="a"))
                )
            except grpc.RpcError as error:
                seen.append(failure_of(error))
                refused.set()

    trying = threading.Thread(target=try_until_refused)
    trying.start()
    events = list(stream)
    refused.wait(CALL_SECONDS)
    trying.join(CALL_SECONDS)
    text += "".join(event.delta.text for event in events)
    assert events[-1].end.usage.completion_token_count == 700 and text
    assert seen[0].code == grpc.StatusCode.UNAVAILABLE
    assert seen[0].reason == "SERVER_DRAINING" and seen[0].retry_after_seconds
    assert server.process.wait(CALL_SECONDS) == 0
    assert not any(map(is_running, descendants))
    assert "Traceback" not in server.log()


def test_a_stop_ends_what_outlasts_the_drain(start_server: StartServer) -> None:
    """After drain_seconds a request that still runs is SERVER_DRAINING, and the exit status is 0 all the same."""
    server = start_server(drain_seconds=0.5)
    stub = inference_pb2_grpc.InferenceServiceStub(server.channel())
    streams = [stub.ChatStream(endless(), timeout=CALL_SECONDS) for _ in range(3)]
    for stream in streams:
        until_first_delta(stream)
    server.process.send_signal(signal.SIGTERM)
    for stream in streams:
        failure = fails(lambda stream=stream: stream)  # type: ignore[misc]
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING")
    assert server.process.wait(CALL_SECONDS) == 0


def test_a_second_server_on_the_same_folder_is_refused_naming_the_first(start_server: StartServer) -> None:
    """In one line; the first goes on. A port that is taken is refused in one line too."""
    server = start_server(register_demo=False)
    for home, options, words in (
        (server.home, {}, [str(server.process.pid), "--home"]),
        (None, {"grpc_port": int(server.grpc_address.rpartition(":")[2])}, ["--grpc-port"]),
    ):
        with pytest.raises(ServerDidNotStartError) as refused:
            start_server(home, register_demo=False, **options)
        assert refused.value.status == 1
        assert len(refused.value.words.strip().splitlines()) == 1, refused.value.words
        for word in words:
            assert word in refused.value.words
        assert "Traceback" not in refused.value.words
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerDidNotStartError, match=str(port)) as refused:
            start_server(register_demo=False, bridge=True, port=port)
        assert len(refused.value.words.strip().splitlines()) == 1
    system = system_pb2_grpc.SystemServiceStub(server.channel())
    assert system.GetServerInfo(system_pb2.GetServerInfoRequest()).process_id == server.process.pid


def test_a_key_is_asked_of_tcp_callers_and_not_of_the_socket_s(start_server: StartServer) -> None:
    """Bearer or x-api-key; health stays open, reflection does not."""
    server = start_server(environment={"MLX_GUI_API_KEY": "s3cret-ü"}, register_demo=False)
    request = system_pb2.GetServerInfoRequest()
    tcp = system_pb2_grpc.SystemServiceStub(server.channel())
    unix = system_pb2_grpc.SystemServiceStub(server.channel(unix=True))
    assert unix.GetServerInfo(request).process_id == server.process.pid
    for metadata in (
        (),
        (("authorization", "Bearer wrong"),),
        (("x-api-key", ""),),
        (("authorization", "s3cret"),),
    ):
        failure = fails(lambda metadata=metadata: tcp.GetServerInfo(request, metadata=metadata))  # type: ignore[misc]
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
        assert "s3cret" not in failure.message
    assert "s3cret" not in server.log()
    for process in [psutil.Process(server.process.pid), *server.descendants()]:
        assert "s3cret" not in " ".join(process.cmdline())


def test_a_key_opens_tcp(start_server: StartServer) -> None:
    server = start_server(environment={"MLX_GUI_API_KEY": "s3cret"}, register_demo=False)
    tcp = system_pb2_grpc.SystemServiceStub(server.channel())
    for metadata in (
        (("authorization", "Bearer s3cret"),),
        (("authorization", "bearer s3cret"),),
        (("x-api-key", "s3cret"),),
    ):
        assert tcp.GetServerInfo(system_pb2.GetServerInfoRequest(), metadata=metadata).name == "mlxgui-grpc"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"host": "0.0.0.0", "bridge": True}, "--api-key"),
        ({"grpc_host": "0.0.0.0"}, "--tls-certificate"),
        ({"require_key": True}, "MLX_GUI_API_KEY"),
        ({"standby_count": 9}, "standby_count"),
        ({"no_such_option": 1}, "no_such_option"),
        ({"port": "many"}, "port"),
        ({"tls_certificate": "/nonexistent.pem", "tls_key": "/nonexistent.pem"}, "nonexistent"),
    ],
)
def test_a_start_that_would_be_unsafe_or_wrong_is_refused_in_one_line(
    start_server: StartServer, options: dict[str, Any], word: str
) -> None:
    with pytest.raises(ServerDidNotStartError) as refused:
        start_server(**options)
    lines = refused.value.words.strip().splitlines()
    assert refused.value.status != 0 and len(lines) == 1 and word in lines[0], refused.value.words


def test_a_home_that_cannot_be_written_is_refused_in_one_line(
    start_server: StartServer, tmp_path: Path
) -> None:
    """A file where the folder should be; root may write anywhere, so permissions are no test."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "run").write_text("")
    with pytest.raises(ServerDidNotStartError) as refused:
        start_server(home)
    lines = refused.value.words.strip().splitlines()
    assert len(lines) == 1 and str(home) in lines[0], refused.value.words


def test_a_database_that_is_none_is_refused_and_kept(start_server: StartServer, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "state.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(ServerDidNotStartError) as refused:
        start_server(home)
    lines = refused.value.words.strip().splitlines()
    assert len(lines) == 1 and "state.db" in lines[0], refused.value.words
    assert (home / "state.db").read_bytes().startswith(b"this is no database")


def test_a_database_of_a_newer_version_is_refused_and_kept(start_server: StartServer, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with sqlite3.connect(home / "state.db") as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(ServerDidNotStartError, match="newer version") as refused:
        start_server(home)
    assert len(refused.value.words.strip().splitlines()) == 1


def test_a_long_home_gets_its_socket_elsewhere(start_server: StartServer, tmp_path: Path) -> None:
    """Paths of sockets are short; the folder it goes to is the user's alone."""
    server = start_server(tmp_path / ("h" * 120), register_demo=False)
    assert len(str(server.unix_path)) < 104 and server.unix_path.parent.stat().st_mode & 0o777 == 0o700
    system = system_pb2_grpc.SystemServiceStub(server.channel(unix=True))
    assert system.GetServerInfo(system_pb2.GetServerInfoRequest()).state_directory == str(server.home)
    address = json.loads((server.home / "run" / "address.json").read_text())
    assert address["unix"] == str(server.unix_path)


def test_what_the_server_writes_is_the_user_s_alone(server: RunningServer) -> None:
    for path in (server.home / "run", server.home / "logs", server.home / "views", server.home / "tmp"):
        assert path.stat().st_mode & 0o077 == 0, path
    for path in (server.home / "state.db", server.home / "logs" / "mlxgui.log", server.unix_path):
        assert path.stat().st_mode & 0o077 == 0, path


def test_the_log_has_calls_and_no_prompts(
    server: RunningServer, inference: inference_pb2_grpc.InferenceServiceStub
) -> None:
    request = chat("my-secret-prompt-words")
    request.sampling.CopyFrom(sampling(max_tokens=3))
    inference.Chat(request, metadata=(("x-request-id", "log-test-1"),), timeout=CALL_SECONDS)
    wait_until(lambda: "id=log-test-1 code=OK" in server.log(), "the call is logged")
    assert "my-secret-prompt-words" not in server.log()
