"""The server as a service: what launchd and systemd are told, and how they are called."""

import configparser
import json
import os
import plistlib
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxgui_grpc.cli import service
from mlxgui_grpc.cli.failures import CommandError
from mlxgui_grpc.cli.service_files import (
    LABEL,
    Definition,
    launch_agent,
    secrets_left_out,
    service_environment,
    systemd_unit,
)

SECRETS = {
    "HF_TOKEN": "hf_secret",
    "HUGGINGFACE_HUB_TOKEN": "hf_secret",
    "HUGGING_FACE_HUB_TOKEN": "hf_secret",
    "MLX_GUI_API_KEY": "sk-secret",
}
AWKWARD = '/home/me/my models/50% "new" \\ $HOME'
DEFINITION = Definition(
    command=("/opt/my python/bin/python", "-m", "mlxgui_grpc", "serve"),
    environment={"HF_HOME": AWKWARD, "MLX_GUI_HOME": "/home/me/.mlxgui"},
    log_file=Path("/home/me/.mlxgui/logs/service.log"),
)


def test_the_environment_has_what_the_server_reads_and_no_secret(tmp_path: Path) -> None:
    """Those of commands that talk to a server are not the server's."""
    environ = {
        **SECRETS,
        "HF_HOME": "/models",
        "HF_ENDPOINT": "http://127.0.0.1:1",
        "HF_TOKEN_PATH": "/home/me/token",
        "MLX_GUI_PORT": "9000",
        "MLX_GUI_HOME": "/elsewhere",
        "MLX_GUI_TARGET": "somewhere:1",
        "MLX_GUI_DEBUG": "1",
        "MLX_GUI_FAILPOINT": "catalog.before-write:kill",
        "MLX_GUI_HANDOVER": "{}",
        "HF_HUB_CACHE": "",
        "HF_XET_CACHE": "two\nlines",
        "PATH": "/bin",
    }
    assert service_environment(tmp_path, environ) == {
        "HF_ENDPOINT": "http://127.0.0.1:1",
        "HF_HOME": "/models",
        "HF_TOKEN_PATH": "/home/me/token",
        "MLX_GUI_HOME": str(tmp_path),
        "MLX_GUI_PORT": "9000",
    }
    assert secrets_left_out(environ) == sorted(SECRETS)
    assert secrets_left_out({"HF_TOKEN": ""}) == []


def test_an_address_with_a_password_is_a_secret(
    tools: "RecordedCalls", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user alone may be a token."""
    for url in ("https://u:hunter2@mirror", "https://hunter2@mirror/x"):
        environ = {"HF_ENDPOINT": url, "HF_HOME": "/a@b", "HOME": str(tmp_path)}
        assert service_environment(tmp_path, environ) == {"HF_HOME": "/a@b", "MLX_GUI_HOME": str(tmp_path)}
        assert secrets_left_out(environ) == ["HF_ENDPOINT"]
    service.install(tmp_path / "state", False, environ, "linux")
    output = capsys.readouterr()
    assert "HF_ENDPOINT" in output.err and "hub_endpoint" in output.err
    assert "hunter2" not in output.out + output.err
    assert all(b"hunter2" not in path.read_bytes() for path in tmp_path.rglob("*mlxgui*") if path.is_file())


def test_the_property_list_runs_it_at_login_and_after_a_failure() -> None:
    """And not after `mlxgui stop`, which ends it with 0. Read back by the library, as launchd reads it."""
    agent = plistlib.loads(launch_agent(DEFINITION))
    assert agent["Label"] == LABEL
    assert agent["ProgramArguments"] == list(DEFINITION.command)
    assert agent["EnvironmentVariables"] == dict(DEFINITION.environment)
    assert agent["RunAtLoad"] is True
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert agent["StandardErrorPath"] == str(DEFINITION.log_file)


def test_the_unit_runs_it_at_login_and_after_a_failure() -> None:
    """The server is told to end alone: its workers have requests to finish."""
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(systemd_unit(DEFINITION).decode())
    unit = parser["Service"]
    assert unit["ExecStart"] == '"/opt/my python/bin/python" "-m" "mlxgui_grpc" "serve"'
    assert (unit["Restart"], unit["KillMode"]) == ("on-failure", "mixed")
    assert parser["Install"]["WantedBy"] == "default.target"
    assert (
        r'Environment="HF_HOME=/home/me/my models/50%% \"new\" \\ $HOME"' in systemd_unit(DEFINITION).decode()
    )


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_finds_nothing_to_say_of_the_unit(tmp_path: Path) -> None:
    """Not a warning: it passes over what it does not know."""
    unit = tmp_path / "mlxgui.service"
    definition = Definition(
        (sys.executable, "-m", "mlxgui_grpc"), DEFINITION.environment, DEFINITION.log_file
    )
    unit.write_bytes(systemd_unit(definition))
    result = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", str(unit)],
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


RecordedCalls = Callable[[], list[str]]


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordedCalls:
    """`systemctl` and `launchctl` that write down how they are called, as programs on the PATH.

    `show` and `print` answer what the files of that name say; `print` fails without one. A file `broken` makes
    every other call fail.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    script = f"""#!/bin/sh
    echo "$(basename "$0") $*" >> {folder}/calls
    case "$*" in
      *show*) test -e {folder}/no-bus || {{ cat {folder}/show; exit 0; }};;
      print*) cat {folder}/print 2>/dev/null; exit;;
    esac
    test -e {folder}/broken || test -e {folder}/no-bus || exit 0
    echo "Failed to connect to bus" >&2; exit 1
    """
    (folder / "show").write_text("ActiveState=inactive\nSubState=dead\nMainPID=0\nResult=success\n")
    for name in ("systemctl", "launchctl"):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def calls() -> list[str]:
        record = folder / "calls"
        said = record.read_text().splitlines() if record.exists() else []
        record.unlink(missing_ok=True)
        return said

    return calls


@pytest.mark.parametrize(
    ("platform", "file", "asked", "started", "ended"),
    [
        (
            "linux",
            ".config/systemd/user/mlxgui.service",
            ["systemctl --user show mlxgui.service --property=ActiveState,SubState,MainPID,Result"],
            [
                "systemctl --user daemon-reload",
                "systemctl --user enable mlxgui.service",
                "systemctl --user restart mlxgui.service",
            ],
            ["systemctl --user disable --now mlxgui.service", "systemctl --user daemon-reload"],
        ),
        (
            "darwin",
            f"Library/LaunchAgents/{LABEL}.plist",
            [f"launchctl print gui/{os.getuid()}/{LABEL}"],
            [
                f"launchctl bootout gui/{os.getuid()}/{LABEL}",
                f"launchctl print gui/{os.getuid()}/{LABEL}",
                f"launchctl enable gui/{os.getuid()}/{LABEL}",
                f"launchctl bootstrap gui/{os.getuid()} HOME/Library/LaunchAgents/{LABEL}.plist",
            ],
            [f"launchctl bootout gui/{os.getuid()}/{LABEL}", f"launchctl print gui/{os.getuid()}/{LABEL}"],
        ),
    ],
)
def test_it_is_installed_for_its_owner_alone_and_removed(
    tools: RecordedCalls,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    platform: str,
    file: str,
    asked: list[str],
    started: list[str],
    ended: list[str],
) -> None:
    """The file is 0600 and has no secret; the user hears which were left out, and where else to put them."""
    home = tmp_path / "state"
    environ = {**SECRETS, "HOME": str(tmp_path)}
    path = tmp_path / file

    service.install(home, False, environ, platform)
    assert tools() == [*asked, *(call.replace("HOME", str(tmp_path)) for call in started)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "logs").stat().st_mode) == 0o700
    assert str(home) in path.read_text() and "secret" not in path.read_text()
    output = capsys.readouterr()
    assert str(path) in output.out and "secret" not in output.out + output.err
    assert all(name in output.err for name in SECRETS)
    assert "config.toml" in output.err and "hf auth login" in output.err

    service.install(home, False, environ, platform)
    service.uninstall(home, environ, platform)
    assert tools()[-len(ended) :] == ended
    assert not path.exists() and home.exists()
    with pytest.raises(CommandError, match="not installed"):
        service.uninstall(home, environ, platform)
    assert sorted(each.name for each in path.parent.iterdir()) == []


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_an_installation_that_fails_leaves_nothing_behind(
    tools: RecordedCalls, tmp_path: Path, platform: str
) -> None:
    """Its error has the words of the program that refused; an earlier file is as it was."""
    environ = {"HOME": str(tmp_path)}
    (tmp_path / "bin" / "broken").touch()
    with pytest.raises(CommandError, match="failed: Failed to connect to bus"):
        service.install(tmp_path / "state", False, environ, platform)
    assert not [path for path in tmp_path.rglob("*mlxgui*") if path.is_file()]

    (tmp_path / "bin" / "broken").unlink()
    service.install(tmp_path / "state", False, environ, platform)
    (file,) = (path for path in tmp_path.rglob("mlxgui*") if path.is_file())
    before = file.read_bytes()
    (tmp_path / "bin" / "broken").touch()
    with pytest.raises(CommandError):
        service.install(tmp_path / "other", False, environ, platform)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("platform", "file", "answer", "running", "process_id", "words"),
    [
        (
            "linux",
            "show",
            "ActiveState=active\nSubState=running\nMainPID=42\nResult=success\n",
            True,
            42,
            "active (running)",
        ),
        (
            "linux",
            "show",
            "ActiveState=activating\nSubState=auto-restart\nMainPID=0\nResult=exit-code\n",
            False,
            None,
            "activating (auto-restart), exit-code",
        ),
        (
            "darwin",
            "print",
            "gui/501/mlxgui.server = {\n\tstate = running\n\tpid = 42\n}\n",
            True,
            42,
            "running",
        ),
        ("darwin", "print", "gui/501/mlxgui.server = {\n\tstate = waiting\n}\n", False, None, "waiting"),
    ],
)
def test_its_state_is_told_in_the_words_of_its_host(
    tools: RecordedCalls,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    platform: str,
    file: str,
    answer: str,
    running: bool,
    process_id: int | None,
    words: str,
) -> None:
    """0 when it runs, else 1."""
    environ = {"HOME": str(tmp_path)}
    assert service.status(tmp_path, True, environ, platform) == 1
    assert json.loads(capsys.readouterr().out)["installed"] is False
    service.install(tmp_path, False, environ, platform)
    (tmp_path / "bin" / file).write_text(answer)
    capsys.readouterr()
    assert service.status(tmp_path, True, environ, platform) == (0 if running else 1)
    told = json.loads(capsys.readouterr().out)
    assert (told["installed"], told["running"], told["process_id"]) == (True, running, process_id)
    assert told["state"] == words
    service.status(tmp_path, False, environ, platform)
    assert words in capsys.readouterr().out


def test_without_a_session_the_ways_out_are_told(tools: RecordedCalls, tmp_path: Path) -> None:
    """As over `su` or in a container that has systemctl."""
    (tmp_path / "bin" / "no-bus").touch()
    with pytest.raises(CommandError, match=r"connect to bus: log in with a session, or use .*--print"):
        service.install(tmp_path, False, {"HOME": str(tmp_path)}, "linux")


def test_print_changes_nothing(
    tools: RecordedCalls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it writes is the file, and only that."""
    for platform in ("linux", "darwin"):
        service.install(tmp_path, True, {**SECRETS, "HOME": str(tmp_path)}, platform)
        output = capsys.readouterr()
        assert "mlxgui_grpc" in output.out and "secret" not in output.out and output.err == ""
    assert tools() == [] and [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_without_a_service_manager_the_way_out_is_to_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in most containers."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for platform in ("linux", "darwin"):
        with pytest.raises(CommandError, match="install --print"):
            service.install(tmp_path, False, {"HOME": str(tmp_path)}, platform)
    with pytest.raises(CommandError, match="macOS and Linux"):
        service.install(tmp_path, False, {"HOME": str(tmp_path)}, "win32")
