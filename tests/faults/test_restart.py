"""Shutdown and Restart: answered at once, drained, in the same process, with nothing left behind and nothing lost."""

import fcntl
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
import requests

from mlxgui.v1 import (
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
)
from tests.conftest import TinyModels
from tests.support_calls import (
    CALL_SECONDS,
    chat,
    endless,
    fails,
    last_operation,
    text_of,
    until_first_delta,
)
from tests.support_metrics import wait_until
from tests.support_server import RunningServer
from tests.support_settings import details, info, restart, shutdown, update, wait_until_restarted

StartServer = Callable[..., RunningServer]
FRANCE = ("What is the capital of France?", "The capital of France is Paris.")
KEY = {"MLX_GUI_API_KEY": "s3cret"}


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def loaded(channel: grpc.Channel) -> set[str]:
    models = model_pb2_grpc.ModelServiceStub(channel)
    snapshot = models.GetManagerStatus(model_pb2.GetManagerStatusRequest()).snapshot
    return {model.name for model in snapshot.loaded_models if model.state == model_pb2.MODEL_STATE_LOADED}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def trying_the_lock(home: Path) -> Iterator[list[int]]:
    """Try all the while to take the lock of the state folder, as a second server would; counts of (held, got)."""
    counts, over = [0, 0], threading.Event()

    def try_it() -> None:
        while not over.wait(0.002):
            descriptor = os.open(home / "run" / "server.lock", os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                counts[1] += 1
            except BlockingIOError:
                counts[0] += 1
            finally:
                os.close(descriptor)

    thread = threading.Thread(target=try_it)
    thread.start()
    try:
        yield counts
    finally:
        over.set()
        thread.join()


def test_a_restart_keeps_the_process_and_its_models_and_takes_the_new_settings(
    start_server: StartServer, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """What runs is finished; the lock is never let go; ports that were free ones stay; the log goes on."""
    home = tmp_path / "home"
    server = start_server(home, bridge=True, environment=KEY)
    pid, rest_port, grpc_address = server.process.pid, server.rest_url.rpartition(":")[2], server.grpc_address
    channel = server.channel(unix=True)
    system = system_pb2_grpc.SystemServiceStub(channel)
    inference = inference_pb2_grpc.InferenceServiceStub(channel)
    models = model_pb2_grpc.ModelServiceStub(channel)
    install = model_pb2.InstallModelRequest(local_directory=str(tiny_models.llama), name="tiny")
    last_operation(models.InstallModel(install))
    pending = update(system, bind_to_all_interfaces=True, preload_models=["tiny"], max_concurrent_models=2)
    assert list(pending.pending_restart.paths) == ["bind_to_all_interfaces", "preload_models"]

    stream = inference.ChatStream(endless(max_tokens=300), timeout=CALL_SECONDS)
    until_first_delta(stream)
    before, children = info(system), server.descendants()
    open_files = psutil.Process(pid).num_fds()
    with trying_the_lock(home) as lock:
        assert restart(system).in_flight_count == 1
        assert restart(system).in_flight_count <= 1  # Asked twice it restarts once.
        refused = fails(lambda: inference.Chat(chat("Hello"), timeout=CALL_SECONDS))
        assert refused.reason == "SERVER_DRAINING" and refused.retry_after_seconds
        assert list(stream)[-1].end.usage.completion_token_count == 300
        after = wait_until_restarted(system, before)
    assert lock[0] > 0 and lock[1] == 0, "another server could have come between"
    assert after.process_id == pid and server.process.poll() is None
    assert not any(map(is_running, children))
    assert psutil.Process(pid).num_fds() <= open_files + 4, "descriptors were left open"

    assert after.grpc_addresses[0] == grpc_address and after.rest_url == f"http://127.0.0.1:{rest_port}"
    listening = {
        connection.laddr.ip
        for process in server.descendants()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == int(rest_port)
    }
    assert listening == {"0.0.0.0"}
    assert requests.get(f"{after.rest_url}/v1/models", timeout=CALL_SECONDS).status_code == 401
    found = details(system)
    assert not any(detail.pending_restart for detail in found.values())
    assert found["bind_to_all_interfaces"].source == system_pb2.SETTING_SOURCE_STORED
    wait_until(lambda: loaded(channel) == {"demo", "tiny"}, "both models are there again")
    assert text_of(inference.Chat(chat(FRANCE[0]), timeout=CALL_SECONDS)) == FRANCE[1]
    log = server.log()
    assert log.count("serving on") == 2 and "restarting: 1 calls run" in log and "Traceback" not in log
    assert server.stop() == 0


def test_a_start_that_its_stored_settings_make_fail_falls_back_and_says_so(start_server: StartServer) -> None:
    """The port is taken when the server comes back: it takes the last good one, tells the log and the console, and
    keeps what is stored. With a config.toml that no server can start with it does not even end."""
    server = start_server(bridge=True)
    system = system_pb2_grpc.SystemServiceStub(server.channel())
    good, bad = free_port(), free_port()
    before = info(system)
    update(system, server_port=good)
    restart(system)
    before = wait_until_restarted(system, before)
    assert before.rest_url == f"http://127.0.0.1:{good}"
    update(system, server_port=bad, max_concurrent_models=2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", bad))
        taken.listen()
        restart(system)
        after = wait_until_restarted(system, before)
    assert after.rest_url == before.rest_url and after.process_id == before.process_id
    assert requests.get(f"{after.rest_url}/health", timeout=CALL_SECONDS).ok
    settings = system.GetSettings(system_pb2.GetSettingsRequest()).settings
    assert (settings.server_port, settings.max_concurrent_models) == (good, 2)
    detail = details(system)["server_port"]
    assert not detail.pending_restart and str(bad) in detail.note and "in use" in detail.note
    for text in (server.log(), (server.home / "stderr.txt").read_text()):
        (line,) = [line for line in text.splitlines() if "started with server_port" in line]
        assert str(bad) in line and str(good) in line
    file = server.home / "config.toml"
    options = file.read_text()
    file.write_text('port = "x"')
    refused = fails(lambda: restart(system))
    assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["port"])
    assert str(file) in refused.message and info(system).state == system_pb2.SERVER_STATE_RUNNING
    file.write_text(options)
    restart(system)  # Now it is free.
    assert wait_until_restarted(system, after).rest_url.endswith(f":{bad}")
    assert not details(system)["server_port"].note


@pytest.fixture(scope="module")
def drained_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drained")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)], ids=["kill", "term"]
)
def test_what_comes_in_the_drain_of_a_restart(
    start_server: StartServer, drained_home: Path, number: signal.Signals, status: int
) -> None:
    """After a kill nothing is left, and the next start knows nothing of the restart; a SIGTERM makes it a stop."""
    server = start_server(drained_home, drain_seconds=0.5)
    channel = server.channel()
    assert not loaded(channel)
    stream = inference_pb2_grpc.InferenceServiceStub(channel).ChatStream(endless(), timeout=CALL_SECONDS)
    until_first_delta(stream)
    system = system_pb2_grpc.SystemServiceStub(channel)
    assert restart(system, grace_seconds=3600).in_flight_count == 1
    wait_until(lambda: info(system).state == system_pb2.SERVER_STATE_DRAINING, "it drains")
    children = server.descendants()
    server.process.send_signal(number)
    fails(lambda: stream)
    assert server.process.wait(CALL_SECONDS) == status
    wait_until(lambda: not any(map(is_running, children)), "nothing of it is left")
    assert (drained_home / "run" / "address.json").exists() == (number == signal.SIGKILL)


def test_a_shutdown_lets_requests_finish_within_its_grace_and_ends_the_rest(
    start_server: StartServer,
) -> None:
    """Answered at once; a later call with less grace cuts the drain short; a restart asked for meanwhile is none."""
    server = start_server()
    channel = server.channel()
    system = system_pb2_grpc.SystemServiceStub(channel)
    inference = inference_pb2_grpc.InferenceServiceStub(channel)
    short = inference.ChatStream(endless(max_tokens=200), timeout=CALL_SECONDS)
    long = inference.ChatStream(endless(), timeout=CALL_SECONDS)
    for stream in (short, long):
        until_first_delta(stream)
    assert shutdown(system, grace_seconds=3600).in_flight_count == 2
    wait_until(lambda: info(system).state == system_pb2.SERVER_STATE_DRAINING, "it drains")
    assert restart(system, grace_seconds=3600).in_flight_count >= 1
    counting = inference_pb2.CountTokensRequest(model="demo", prompt=inference_pb2.Prompt(text="a"))
    assert fails(lambda: inference.CountTokens(counting)).reason == "SERVER_DRAINING"
    assert list(short)[-1].end.usage.completion_token_count == 200
    assert shutdown(system, grace_seconds=0).in_flight_count == 1
    failure = fails(lambda: long)
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING")
    assert server.process.wait(CALL_SECONDS) == 0
    assert "Traceback" not in server.log()
