"""The commands about the server: status, settings, stop and restart."""

import fcntl
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mlxgui_grpc.cli import lifetime
from mlxgui_grpc.cli.connection import read_connection
from mlxgui_grpc.cli.failures import CommandError
from mlxgui_grpc.cli.lifetime import lock_holder
from mlxgui_grpc.cli.settings import FIELDS
from tests.support_commands import CommandLine
from tests.support_server import RunningServer


def test_status_has_everything_on_one_screen(commands: CommandLine, server: RunningServer) -> None:
    """Server, machine, memory, models; where they are and how they do."""
    commands.succeed("load", "demo")
    screen = commands.succeed("status")
    assert len(screen.splitlines()) <= 24
    for words in (f"process {server.process.pid}", server.rest_url, server.grpc_address, str(server.home)):
        assert words in screen
    assert re.search(r"^server +running, mlxgui \d", screen, re.MULTILINE)
    assert re.search(r"^memory +[\d.]+ [GM]B of [\d.]+ GB in use \(\d+ %\)", screen, re.MULTILINE)
    assert re.search(r"^demo +loaded", screen, re.MULTILINE)


def test_status_is_json_for_programs(commands: CommandLine, server: RunningServer) -> None:
    """The contract's own fields."""
    commands.succeed("load", "demo")
    told = json.loads(commands.succeed("status", "--json"))
    assert set(told) == {"server", "system", "manager", "settings_pending_restart"}
    assert told["server"]["process_id"] == server.process.pid and told["server"]["state"] == "running"
    assert told["system"]["memory"]["total_bytes"] > told["system"]["memory"]["available_bytes"] > 0
    assert "demo" in {model["name"] for model in told["manager"]["loaded_models"]}


def test_settings_are_listed_with_their_source_and_note(commands: CommandLine) -> None:
    """In the order of the contract, as a table and as JSON; `get` is the value alone."""
    listed = json.loads(commands.succeed("settings", "--json"))["settings"]
    assert [each["key"] for each in listed] == list(FIELDS)
    header, *rows = commands.succeed("settings").splitlines()
    assert header.split() == ["KEY", "VALUE", "SOURCE", "PENDING", "NOTE"]
    assert [row.split()[0] for row in rows] == list(FIELDS)
    by_key = {each["key"]: each for each in listed}
    assert (by_key["server_port"]["value"], by_key["server_port"]["source"]) == (0, "config_file")
    assert re.search(r"^server_port +0 +config file", "\n".join(rows), re.MULTILINE)
    assert "Without effect" in by_key["enable_system_tray"]["note"]
    assert commands.succeed("settings", "get", "max_concurrent_models") == "3\n"
    noted = commands.run("settings", "get", "enable_system_tray")
    assert noted.stdout == "true\n" and "Without effect" in noted.stderr
    assert json.loads(commands.succeed("settings", "get", "log_level", "--json")) == by_key["log_level"]


def test_a_setting_is_changed_at_once_and_reset(commands: CommandLine) -> None:
    """Each in words of its own type."""
    try:
        said = commands.succeed("settings", "set", "model_inactivity_timeout_minutes", "45")
        assert said == "model_inactivity_timeout_minutes is now 45\n"
        assert "45 min idle" in commands.succeed("status")
        assert commands.succeed("settings", "set", "auto_unload_inactive_models", "off").endswith(
            "is now false\n"
        )
        assert json.loads(commands.succeed("settings", "set", "default_model", "demo", "--json")) == {
            "key": "default_model",
            "value": "demo",
            "source": "stored",
            "pending_restart": False,
            "note": "",
        }
    finally:
        for key in ("model_inactivity_timeout_minutes", "auto_unload_inactive_models", "default_model"):
            commands.succeed("settings", "reset", key)
    assert commands.succeed("settings", "get", "model_inactivity_timeout_minutes") == "30\n"
    assert commands.succeed("settings", "reset", "log_level").startswith("log_level is again ")


def test_a_setting_that_waits_for_a_restart_says_how(commands: CommandLine) -> None:
    """In the answer, in the list, and in status."""
    try:
        said = commands.run("settings", "set", "preload_models", "demo", "no-such-model")
        assert "`mlxgui restart`" in said.stdout and "no-such-model" in said.stderr
        listed = commands.run("settings")
        assert re.search(r"^preload_models .*after restart", listed.stdout, re.MULTILINE)
        assert "`mlxgui restart`" in listed.stderr
        assert "preload_models after a restart" in commands.succeed("status")
        assert json.loads(commands.succeed("status", "--json"))["settings_pending_restart"] == [
            "preload_models"
        ]
    finally:
        commands.succeed("settings", "reset", "preload_models")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("max_concurrent_models", "0"), "max_concurrent_models must be between 1 and 64"),
        (("max_concurrent_models", "-1"), "max_concurrent_models must be between 1 and 64"),
        (("server_port", "70000"), "server_port must be between 0 and 65535"),
        (("server_port", "9" * 20), "server_port cannot be"),
        (("max_model_memory_gb", "nan"), "max_model_memory_gb"),
        (("log_level", "loud"), "log_level must be one of DEBUG"),
        (("huggingface_cache_dir", "not/absolute"), "absolute path"),
        (("bind_to_all_interfaces", "yes"), "MLX_GUI_API_KEY"),
        (("preload_models", *["demo"] * 17), "preload_models has more than 16"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_value_that_cannot_be_changes_nothing(
    commands: CommandLine, arguments: tuple[str, ...], words: str
) -> None:
    """One sentence that says what can be; exit code 2."""
    before = commands.succeed("settings", "--json")
    assert words in commands.refuse(2, "settings", "set", *arguments)
    assert commands.succeed("settings", "--json") == before


def test_a_port_that_is_taken_is_refused_with_its_holder(commands: CommandLine) -> None:
    """The next start would fail with it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert str(os.getpid()) in commands.refuse(2, "settings", "set", "server_port", port)


def test_a_server_is_restarted_in_place_and_stopped(
    start_server: Callable[..., RunningServer],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The same process, its models and the new settings; after stop there is no process."""
    server = start_server()
    commands = CommandLine(server.home, monkeypatch, capfd)
    pid = server.process.pid
    commands.succeed("load", "demo")
    commands.succeed("settings", "set", "preload_models", "demo")
    outcome = commands.run("restart", "--grace", "5s")
    assert outcome.returncode == 0, outcome.stderr
    assert (
        f"Restarted the server (process {pid}) in " in outcome.stdout
        and server.grpc_address in outcome.stdout
    )
    assert "demo" in outcome.stderr
    assert commands.succeed("settings", "get", "preload_models") == "demo\n"
    assert psutil.Process(pid).is_running() and lock_holder(server.home) == pid

    outcome = commands.run("stop", "--grace", "1m")
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout == f"Stopped the server (process {pid})\n"
    assert server.process.wait(10) == 0
    assert "`mlxgui serve`" in commands.refuse(3, "stop")
    assert "`mlxgui serve`" in commands.refuse(3, "restart")


def test_a_server_that_has_no_address_yet_is_named_by_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whoever holds it; a number that is left over in the file holds nothing."""
    commands = CommandLine(tmp_path, monkeypatch, capfd)
    (tmp_path / "run").mkdir()
    lock = tmp_path / "run" / "server.lock"
    lock.write_text(str(os.getpid()))
    assert "No server is running" in commands.refuse(3, "stop")
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for command in ("stop", "restart"):
            line = commands.refuse(1, command)
            assert f"Process {os.getpid()} holds {tmp_path}" in line and "`kill " in line
    for text in ("", "no number", "999999999"):
        lock.write_text(text)
        assert lock_holder(tmp_path) is None


def test_a_server_that_hangs_is_named_with_what_to_do(tmp_path: Path) -> None:
    """It takes connections, as the kernel does that for it, and says nothing."""
    run = tmp_path / "run"
    run.mkdir()
    lock = run / "server.lock"
    lock.write_text(str(os.getpid()))
    with socket.socket(socket.AF_UNIX) as silent, lock.open():
        silent.bind(str(run / "grpc.sock"))
        silent.listen()
        (run / "address.json").write_text(json.dumps({"pid": os.getpid(), "unix": str(run / "grpc.sock")}))
        for command in (lifetime.stop, lifetime.restart):
            with pytest.raises(CommandError, match=f"`kill -9 {os.getpid()}`"):
                command(read_connection({"home": tmp_path}, {}), None, answer_seconds=0.3)
