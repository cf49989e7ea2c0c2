"""The command line does the main job: install, list, ask, load, unload and remove."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.loopback_hub import LoopbackHub
from tests.support_models import DEMO
from tests.support_server import RunningServer

CAPITAL = "What is the capital of France?"


def mlxgui(server: RunningServer, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run one command against the session's server, as a script would."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MLX_GUI_")}
    return subprocess.run(
        [sys.executable, "-m", "mlxgui_grpc", *arguments],
        env={**environ, "MLX_GUI_HOME": str(server.home)},
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


def succeed(server: RunningServer, *arguments: str, stdin: str = "") -> str:
    """The stdout of a command that must exit with 0."""
    result = mlxgui(server, *arguments, stdin=stdin)
    assert result.returncode == 0, result.stderr
    return result.stdout


def listed(server: RunningServer) -> dict[str, dict[str, Any]]:
    """What `ls --json` says, by name."""
    return {model["name"]: model for model in json.loads(succeed(server, "ls", "--json"))["models"]}


def test_run_prints_the_answer_and_nothing_else(server: RunningServer) -> None:
    """From an argument, from -m, from stdin, and from both together."""
    answer = "The capital of France is Paris.\n"
    assert succeed(server, "run", "demo", CAPITAL) == answer
    assert succeed(server, "chat", "demo", "-m", CAPITAL) == answer
    assert succeed(server, "run", "demo", stdin=CAPITAL) == answer
    assert succeed(server, "run", "demo", "-", stdin=CAPITAL) == answer


def test_an_answer_that_is_cut_off_says_so_on_stderr(server: RunningServer) -> None:
    """stdout stays what the model wrote."""
    result = mlxgui(server, "run", "demo", CAPITAL, "--max-tokens", "2", "--verbose")
    assert result.returncode == 0
    assert "cut off" in result.stderr
    assert "2 completion tokens" in result.stderr
    assert "cut off" not in result.stdout


def test_images_for_a_text_model_are_reported(server: RunningServer, tmp_path: Path) -> None:
    """They are left out, and the user learns it."""
    image = tmp_path / "image.png"
    image.write_bytes(b"\x89PNG\r\n\x1a\n")
    result = mlxgui(server, "run", "demo", CAPITAL, "--image", str(image))
    assert result.returncode == 0
    assert "image" in result.stderr


def test_a_directory_is_installed_used_and_left_alone(server: RunningServer, tmp_path: Path) -> None:
    """pull, ls, show, load, ps, unload, rm."""
    folder = tmp_path / "mine"
    shutil.copytree(DEMO, folder)
    files = sorted(path.name for path in folder.iterdir())

    assert "mlxgui run cli-mine" in succeed(server, "pull", str(folder), "--name", "cli-mine")
    assert listed(server)["cli-mine"]["state"] == "unloaded"
    assert json.loads(succeed(server, "show", "CLI-MINE", "--json"))["source"] == "directory"
    assert succeed(server, "load", "cli-mine") == "Loaded cli-mine\n"
    loaded = json.loads(succeed(server, "ps", "--json"))["loaded_models"]
    assert "cli-mine" in {model["name"] for model in loaded}
    assert succeed(server, "unload", "cli-mine") == "Unloaded cli-mine\n"
    assert "its files stay" in succeed(server, "rm", "cli-mine")
    assert "cli-mine" not in listed(server)
    assert sorted(path.name for path in folder.iterdir()) == files


def test_a_missing_model_is_pulled_when_the_user_says_yes(server: RunningServer, hub: LoopbackHub) -> None:
    """Without --yes, and without a terminal to ask at, the error names the command."""
    hub.add("cli-owner/cli-pulled", DEMO)

    refused = mlxgui(server, "run", "cli-owner/cli-pulled", CAPITAL)
    assert refused.returncode == 4
    assert "`mlxgui pull cli-owner/cli-pulled`" in refused.stderr

    assert (
        succeed(server, "run", "cli-owner/cli-pulled", CAPITAL, "--yes")
        == "The capital of France is Paris.\n"
    )
    assert listed(server)["cli-pulled"]["huggingface_id"] == "cli-owner/cli-pulled"
    assert "and its files" in succeed(server, "rm", "cli-pulled")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (("show", "no-such-model"), 4, "no-such-model"),
        (("rm", "no-such-model"), 4, "no-such-model"),
        (("run", "no-such-model", "hello"), 4, "mlxgui pull"),
        (("pull", "cli-owner/no-such-repository"), 4, "cli-owner/no-such-repository"),
        (("run", "demo", "hello", "--temperature", "7"), 2, "temperature must be between 0 and 2"),
        (("run", "demo", "hello", "--seed", "9" * 20), 2, "seed cannot be"),
        (("pull", "cli-owner/x", "--name", "a/b"), 2, "name must be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_refusal_is_one_sentence_and_an_exit_code(
    server: RunningServer, arguments: tuple[str, ...], exit_code: int, words: str
) -> None:
    """Nothing on stdout, the last line of stderr says what is wrong."""
    result = mlxgui(server, *arguments)

    assert result.returncode == exit_code, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("mlxgui: ")
    assert words in result.stderr.splitlines()[-1]


def test_doctor_asks_the_server(server: RunningServer) -> None:
    """Its findings come with the server's version and addresses."""
    report = json.loads(mlxgui(server, "doctor", "--json").stdout)
    found = {check["name"]: check for check in report["checks"]}
    assert found["server"]["verdict"] == "ok"
    assert server.grpc_address in found["server"]["detail"]
    assert "mlx-lm" in found["mlx"]["detail"]
