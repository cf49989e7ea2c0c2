"""The grammar of the command line: what it takes, what it refuses, what it exits with."""

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from mlxgui_grpc.cli import app as grammar
from mlxgui_grpc.cli.connection import read_connection
from mlxgui_grpc.config import ServerConfig
from tests.support_commands import CommandLine, mlxgui

COMMANDS = {
    *("serve", "status", "top", "stop", "restart", "bridge", "logs", "doctor", "completion", "version"),
    *(
        "search",
        "pull",
        "update",
        "ls",
        "ps",
        "show",
        "estimate",
        "load",
        "unload",
        "priority",
        "pin",
        "unpin",
    ),
    *("rm", "run", "chat", "settings", "service"),
}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    """Commands where no server runs."""
    return CommandLine(tmp_path, monkeypatch, capfd)


def test_every_option_of_the_server_is_a_flag() -> None:
    """`serve` mirrors ServerConfig: an option without a flag could only be set by file."""
    flags = set(inspect.signature(grammar.serve).parameters) - {"context"}
    assert flags == {field.name for field in dataclasses.fields(ServerConfig)}


def test_help_lists_every_command_and_the_exit_codes(tmp_path: Path) -> None:
    """`mlxgui --help` is the whole table of contents."""
    result = mlxgui(tmp_path, "--help", COLUMNS="200")

    assert result.returncode == 0
    listed = {
        line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ") and line.split()
    }
    assert listed >= COMMANDS
    for code in ("0 ", "1 ", "2 ", "3 ", "4 ", "130 "):
        assert f"\n    {code}" in result.stdout


def test_help_imports_neither_grpc_nor_rich() -> None:
    """Help has to be there at once: what takes long to import comes with the command that needs it."""
    heavy = ("grpc", "rich", "google.protobuf")
    script = f"import sys, mlxgui_grpc.cli.app; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ("ls",),
        ("ps", "--json"),
        ("show", "demo"),
        ("load", "demo"),
        ("unload", "demo"),
        ("rm", "demo"),
        ("pull", "owner/name"),
        ("run", "demo", "hello"),
        ("chat", "demo", "-m", "hello"),
        ("bridge",),
        ("status",),
        ("status", "--json"),
        ("top",),
        ("top", "--once"),
        ("stop",),
        ("restart", "--grace", "5m"),
        ("search", "qwen"),
        ("search", "--categories"),
        ("update", "demo"),
        ("estimate", "demo"),
        ("priority", "demo", "-5"),
        ("pin", "demo"),
        ("unpin", "demo"),
        ("settings",),
        ("settings", "get", "log_level"),
        ("settings", "set", "max_model_memory_gb", "-1"),
        ("settings", "reset", "log_level"),
    ],
    ids=" ".join,
)
def test_without_a_server_each_command_says_how_to_start_one(
    arguments: tuple[str, ...], here: CommandLine, tmp_path: Path
) -> None:
    """One sentence on stderr, exit code 3, no traceback."""
    result = here.run(*arguments)

    assert result.returncode == 3
    assert result.stdout == ""
    assert result.stderr == f"mlxgui: No server is running in {tmp_path}: start it with `mlxgui serve`\n"


def test_connection_flags_count_before_and_after_the_command(here: CommandLine, tmp_path: Path) -> None:
    """`mlxgui --home X ls` is `mlxgui ls --home X`; the flag wins over the environment."""
    other = tmp_path / "other"
    for arguments in (("--home", str(other), "ls"), ("ls", "--home", str(other))):
        assert f"No server is running in {other}:" in here.run(*arguments).stderr


def test_an_address_that_a_dead_server_left_is_no_server(here: CommandLine, tmp_path: Path) -> None:
    """A killed server leaves its address file; its socket refuses."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "address.json").write_text(f'{{"pid": 1, "unix": "{tmp_path}/run/grpc.sock"}}')

    result = here.run("ls")

    assert result.returncode == 3
    assert result.stderr == f"mlxgui: No server is running in {tmp_path}: start it with `mlxgui serve`\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve", "--port", "99999"), "port must be between 0 and 65535"),
        (("serve", "--port", "many"), "--port"),
        (("serve", "--host", "0.0.0.0"), "MLX_GUI_API_KEY"),
        (("serve", "--require-key"), "MLX_GUI_API_KEY"),
        (("--target", "unix:/nowhere", "load", "demo", "--keep-alive", "nan"), "keep_alive"),
        (("--target", "unix:/nowhere", "load", "demo", "--keep-alive", "1e30"), "keep_alive"),
        (("--target", "unix:/nowhere", "load", "demo", "--keep-alive", "soon"), "--keep-alive"),
        (("load", "demo", "--priority", "high"), "--priority"),
        (("priority", "demo"), "N"),
        (("priority", "demo", "first"), "valid integer"),
        (("stop", "--grace", "soon"), "--grace 'soon'"),
        (("restart", "--grace", "-5"), "--grace must be 0 or more"),
        (("stop", "--grace", "nan"), "--grace must be 0 or more"),
        (("search", "--memory", "-1"), "--memory"),
        (("search", "--memory", "nan"), "--memory"),
        (("--target", "unix:/nowhere", "search", "--sort", "size"), "downloads, likes, created, updated"),
        (("--target", "unix:/nowhere", "search", "--limit", "0"), "between 1 and 1000"),
        (("settings", "set", "server_port", "many"), "server_port must be a whole number"),
        (("settings", "set", "server_port"), "VALUE"),
        (("settings", "--json", "get", "server_port"), "settings get KEY --json"),
        (("settings", "frobnicate"), "frobnicate"),
        (("service",), "install"),
        (("service", "frobnicate"), "frobnicate"),
        (("pull", "name-without-owner"), "OWNER/NAME"),
        (("pull", "./no-such-directory"), "./no-such-directory is not a directory"),
        (("run", "demo", "--image", "no-such.png", "look"), "no-such.png"),
        (("run", "demo"), "PROMPT"),
        (("run",), "name"),
        (("no-such-command",), "no-such-command"),
        (("completion", "tcsh"), "tcsh"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_was_not_understood_exits_with_2_and_names_it(
    arguments: tuple[str, ...], words: str, here: CommandLine
) -> None:
    """Mistakes of the user are found before any server is asked."""
    result = here.run(*arguments)

    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("verb", [("get",), ("set", "5"), ("reset",)], ids=lambda verb: verb[0])
def test_a_setting_that_there_is_not_exits_with_4(here: CommandLine, verb: tuple[str, ...]) -> None:
    """It names the one that was perhaps meant, without asking any server."""
    result = here.run("settings", verb[0], "server_prot", *verb[1:])
    assert (result.returncode, result.stdout) == (4, "")
    assert result.stderr == "mlxgui: There is no setting 'server_prot': did you mean server_port?\n"


def test_every_command_argument_and_flag_has_help() -> None:
    """Also those of the groups."""
    silent: list[str] = []

    def walk(command: Any, path: str) -> None:
        silent.extend(f"{path} {parameter.name}" for parameter in command.params if not parameter.help)
        for name, child in getattr(command, "commands", {}).items():
            if not child.help:
                silent.append(f"{path} {name}")
            walk(child, f"{path} {name}")

    walk(typer.main.get_command(grammar.app), "mlxgui")
    assert silent == []


def test_lists_and_answers_can_be_json() -> None:
    """Whatever shows something to people, shows it to programs."""
    commands = typer.main.get_command(grammar.app).commands  # type: ignore[attr-defined]
    names = ("status", "top", "search", "ls", "ps", "show", "estimate", "settings", "doctor", "version")
    showing = [commands[name] for name in names]
    showing += [*commands["settings"].commands.values(), commands["service"].commands["status"]]
    for command in showing:
        assert any("--json" in parameter.opts for parameter in command.params), command.name


def test_logs_without_a_log_exits_with_4(here: CommandLine, tmp_path: Path) -> None:
    """There is none before the first start."""
    result = here.run("logs")
    assert result.returncode == 4
    assert "`mlxgui serve` writes it" in result.stderr


def test_logs_prints_the_last_lines(here: CommandLine, tmp_path: Path) -> None:
    """-n counts from the end."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "mlxgui.log").write_text("one\ntwo\nthree\n")
    assert here.run("logs", "-n", "2").stdout == "two\nthree\n"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    """Only on request, by flag or by environment."""
    assert "Traceback" in mlxgui(tmp_path, "--debug", "ls").stderr
    assert "Traceback" in mlxgui(tmp_path, "ls", MLX_GUI_DEBUG="1").stderr


def test_completion_prints_a_script_that_names_the_program(tmp_path: Path) -> None:
    """The script asks the program itself."""
    result = mlxgui(tmp_path, "completion", "bash")
    assert result.returncode == 0
    assert "complete -o default -F _mlxgui_completion mlxgui" in result.stdout


def test_flag_wins_over_environment_over_default(tmp_path: Path) -> None:
    """For each part of the connection."""
    environ = {
        "MLX_GUI_HOME": "/e",
        "MLX_GUI_TARGET": "e:1",
        "MLX_GUI_API_KEY": "e",
        "MLX_GUI_ROOT_CERTIFICATE": "/e.pem",
    }
    by_environment = read_connection({}, environ)
    flags: dict[str, str | Path | None] = {
        "home": tmp_path,
        "target": "unix:/f",
        "api_key": "f",
        "root_certificate": Path("/f.pem"),
    }
    by_flag = read_connection(flags, environ)
    by_default = read_connection({}, {})

    assert (by_environment.home, by_environment.target, by_environment.api_key) == (Path("/e"), "e:1", "e")
    assert by_environment.root_certificate == Path("/e.pem")
    assert (by_flag.home, by_flag.target, by_flag.api_key) == (tmp_path, "unix:/f", "f")
    assert by_flag.root_certificate == Path("/f.pem")
    assert by_default.home == Path("~/.mlxgui").expanduser()
    assert (by_default.target, by_default.api_key, by_default.root_certificate) == (None, None, None)


def test_only_a_server_on_the_unix_socket_shares_our_files() -> None:
    """A path typed here means nothing to a server elsewhere."""
    assert read_connection({}, {}).shares_files
    assert read_connection({"target": "unix:/s"}, {}).shares_files
    assert not read_connection({"target": "host:50051"}, {}).shares_files
