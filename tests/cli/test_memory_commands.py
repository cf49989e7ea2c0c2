"""The commands about models in memory: load, ps, pin, priority, estimate, and top as they change."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mlxgui_grpc.client import Client
from tests.conftest import TinyModels
from tests.support_commands import COMMAND_SECONDS, CommandLine, Terminal, environment_of
from tests.support_http import eventually, installed_directory
from tests.support_server import RunningServer


@pytest.fixture(scope="module")
def tiny(server: RunningServer, tiny_models: TinyModels) -> Iterator[str]:
    """A model of these tests' own, not loaded."""
    with installed_directory(server.channel(unix=True), tiny_models.llama, "cli-tiny") as name:
        yield name


def resident(commands: CommandLine, name: str) -> dict[str, object]:
    """What `ps --json` says of one model."""
    loaded = json.loads(commands.succeed("ps", "--json"))["loaded_models"]
    return next(model for model in loaded if model["name"] == name)


def cells(table: str, name: str) -> dict[str, str]:
    """One row of a table, by column; columns are two blanks apart."""
    lines = table.splitlines()
    header = next(line for line in lines if line.startswith("NAME"))
    row = next(line for line in lines if line.split(" ")[0] == name)
    starts = [column.start() for column in re.finditer(r"\S+( \S+)*", header)]
    ends = [*starts[1:], None]
    return {
        header[start:end].strip(): row[start:end].strip() for start, end in zip(starts, ends, strict=True)
    }


def test_a_model_is_loaded_for_as_long_as_was_said(commands: CommandLine, tiny: str) -> None:
    """ps has its memory, its process and when it leaves; without an end it says so."""
    assert commands.succeed("load", tiny, "--keep-alive", "2h", "--priority", "7") == f"Loaded {tiny}\n"
    row = cells(commands.succeed("ps"), tiny)
    assert row["STATE"] == "loaded" and row["MEMORY"].endswith(" MB")
    assert (row["RUNNING"], row["WAITING"], row["TOKENS/S"]) == ("0", "0", "0.0")
    assert row["UNLOADS"].startswith("in 1 h") or row["UNLOADS"] == "in 2 h 0 min"
    assert int(row["PID"]) == resident(commands, tiny)["process_id"]
    commands.succeed("load", tiny, "--keep-alive", "-1")
    assert cells(commands.succeed("ps"), tiny)["UNLOADS"] == "never"
    assert commands.succeed("unload", tiny) == f"Unloaded {tiny}\n"
    assert tiny not in commands.succeed("ps")


def test_a_pin_is_shown_wherever_models_are(commands: CommandLine, tiny: str) -> None:
    """Before the load, in memory, and no more after unpin."""
    assert f"`mlxgui load {tiny}`" in commands.succeed("pin", tiny)
    assert cells(commands.succeed("ls"), tiny)["PINNED"] == "pinned"
    commands.succeed("load", tiny)
    assert cells(commands.succeed("ps"), tiny)["UNLOADS"] == "never, pinned"
    assert "stays in memory\n" in commands.succeed("pin", tiny.upper())
    assert commands.succeed("unpin", tiny) == f"Unpinned {tiny}\n"
    assert commands.succeed("unpin", tiny) == f"Unpinned {tiny}\n"
    assert cells(commands.succeed("ls"), tiny)["PINNED"] == ""
    assert resident(commands, tiny)["pinned"] is False
    commands.succeed("unload", tiny)


def test_an_estimate_says_what_and_why(commands: CommandLine, tiny: str) -> None:
    """The parts add up, more requests take more, and what is loaded is loaded."""
    one, many = (
        json.loads(commands.succeed("estimate", tiny, "--requests", str(count), "--tokens", "64", "--json"))
        for count in (1, 64)
    )
    parts = ("weight_bytes", "kv_bytes", "prefill_bytes", "process_bytes")
    assert one["required_bytes"] == sum(one[part] for part in parts)
    assert many["kv_bytes"] > one["kv_bytes"] > 0
    assert "it can be loaded" in commands.succeed("estimate", tiny)
    commands.succeed("load", tiny)
    assert "loaded already" in commands.succeed("estimate", tiny)
    commands.succeed("unload", tiny)


def test_a_load_that_would_be_refused_is_exit_code_1(commands: CommandLine, tiny: str) -> None:
    """With the sentence of the refusal; with a budget of next to nothing."""
    commands.succeed("settings", "set", "max_model_memory_gb", "0.001")
    try:
        outcome = commands.run("estimate", tiny)
        assert outcome.returncode == 1
        assert "it would be refused: " in outcome.stdout and "Insufficient memory" in outcome.stdout
        assert "Insufficient memory" in commands.refuse(1, "load", tiny)
    finally:
        commands.succeed("settings", "reset", "max_model_memory_gb")


def test_a_priority_is_kept_for_the_next_load(commands: CommandLine, tiny: str) -> None:
    """Negative ones are typed as they are."""
    assert commands.succeed("priority", tiny, "-5").startswith(f"{tiny} has priority -5 for its next loads")
    assert "priority must be between" in commands.refuse(2, "priority", tiny, "101")
    commands.succeed("priority", tiny, "0")


@pytest.mark.parametrize(
    "arguments",
    [("pin",), ("unpin",), ("estimate",), ("priority", "1"), ("update",), ("load",)],
    ids=lambda arguments: arguments[0],
)
def test_a_model_that_is_not_installed_is_exit_code_4(
    commands: CommandLine, arguments: tuple[str, ...]
) -> None:
    """And the way to come by it."""
    command, *rest = arguments
    assert "`mlxgui pull " in commands.refuse(4, command, "no-such-model", *rest)


def test_top_is_drawn_in_place_until_q(server: RunningServer, tiny: str) -> None:
    """On the alternate screen, from its upper left corner each time; changes are seen; the terminal is as it was."""
    terminal = Terminal(server.home, "top")
    terminal.expect("\x1b[?1049h")
    terminal.expect("NAME")
    with Client(home=server.home) as client:
        list(client.load(tiny))
        terminal.expect("\x1b[H")
        terminal.expect(tiny)
        client.unload(tiny)
    terminal.expect("\x1b[H")
    assert not terminal.takes_lines()
    terminal.type("x")
    terminal.type("q")
    terminal.expect("\x1b[?1049l")
    eventually(terminal.takes_lines, "the terminal is as it was")
    assert terminal.wait() == 0
    assert "Traceback" not in terminal.seen


def test_ctrl_c_ends_top_as_q_does(server: RunningServer) -> None:
    """It is how people end what goes on for ever."""
    terminal = Terminal(server.home, "top")
    terminal.expect("TOKENS/S")
    terminal.type("\x03")
    assert terminal.wait() == 0
    assert "\x1b[?1049l" in terminal.seen and "Traceback" not in terminal.seen


def test_top_writes_one_line_of_json_for_each_change(server: RunningServer, tiny: str) -> None:
    """For pipes: each line whole, the model seen coming and going; Ctrl-C ends it with 0."""
    watching = subprocess.Popen(
        [sys.executable, "-m", "mlxgui_grpc", "top", "--json"],
        env=environment_of(server.home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert watching.stdout is not None

        def names() -> set[str]:
            assert watching.stdout is not None
            snapshot = json.loads(watching.stdout.readline())
            assert {"loaded_models", "status", "queue"} == set(snapshot)
            return {model["name"] for model in snapshot["loaded_models"] if model["state"] == "loaded"}

        assert tiny not in names()
        with Client(home=server.home) as client:
            list(client.load(tiny))
            while tiny not in names():
                pass
            client.unload(tiny)
            while tiny in names():
                pass
        watching.send_signal(signal.SIGINT)
        out, err = watching.communicate(timeout=COMMAND_SECONDS)
        assert (watching.returncode, err) == (0, "")
        assert all(json.loads(line) for line in out.splitlines())
    finally:
        watching.kill()
        watching.wait()


def test_top_once_is_one_table_or_one_line(commands: CommandLine) -> None:
    """For scripts that ask from time to time."""
    assert "in memory" in commands.succeed("top", "--once")
    (line,) = commands.succeed("top", "--once", "--json").splitlines()
    assert json.loads(line)["status"]["max_concurrent_models"] >= 1


def test_a_reader_that_leaves_top_leaves_no_traceback(server: RunningServer) -> None:
    """`mlxgui top --json | head -1`."""
    reading, writing = os.pipe()
    watching = subprocess.Popen(
        [sys.executable, "-m", "mlxgui_grpc", "top", "--json"],
        env=environment_of(server.home),
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    with Client(home=server.home) as client:
        # Something to write about.
        client.set_priority("demo", 1)
        client.set_priority("demo", 0)
        list(client.load("demo"))
        client.chat("demo", "Hi", max_tokens=1)
    _, err = watching.communicate(timeout=COMMAND_SECONDS)
    assert "Traceback" not in err and watching.returncode != 0
