"""Commands beside the main job: starting, being refused, being interrupted, and what scripts rely on."""

import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import requests

from tests.conftest import TinyModels
from tests.loopback_hub import TOKEN, LoopbackHub
from tests.support_commands import COMMAND_SECONDS, Terminal, environment_of, mlxgui, sentence
from tests.support_http import CAPITAL, PARIS, Series, chat_body, eventually, installed_directory
from tests.support_models import DEMO
from tests.support_server import RunningServer, ServerDidNotStartError, start


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    "arguments",
    [("ls",), ("ps", "--json"), ("load", "demo"), ("run", "demo", "hi"), ("rm", "demo"), ("pull", "a/b")],
    ids=lambda arguments: arguments[0],
)
def test_without_a_server_a_command_says_how_to_start_one(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Exit code 3, for scripts that wait for it."""
    assert "`mlxgui serve`" in sentence(mlxgui(tmp_path, *arguments), 3)


def test_an_address_where_nobody_listens_is_exit_code_3_too(tmp_path: Path) -> None:
    for target in (f"127.0.0.1:{free_port()}", f"unix:{tmp_path}/none.sock"):
        assert target in sentence(mlxgui(tmp_path, "--target", target, "ls"), 3)


def test_a_stale_address_of_a_killed_server_is_no_server(
    start_server: Callable[..., RunningServer],
) -> None:
    """After SIGKILL its file is still there; the next start takes the folder over."""
    server = start_server()
    server.kill()
    assert "`mlxgui serve`" in sentence(mlxgui(server.home, "ls"), 3)
    again = start_server(home=server.home)
    assert "demo" in mlxgui(again.home, "ls").stdout


@pytest.mark.parametrize("which", ["port", "grpc_port"])
def test_a_port_in_use_is_named_with_its_holder_and_the_flag(
    start_server: Callable[..., RunningServer], which: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerDidNotStartError) as refused:
            start_server(bridge=True, **{which: port})
    assert refused.value.status not in (0, 3)
    (line,) = refused.value.words.strip().splitlines()
    assert str(port) in line and f"--{which.replace('_', '-')}" in line
    assert str(os.getpid()) in line


def test_the_environment_names_ports_and_folder_and_the_banner_s_line_works_when_pasted(
    tmp_path: Path, server_environment: Mapping[str, str]
) -> None:
    """As `make run` is used; Ctrl-C stops it with 0, and says nothing ugly."""
    rest, grpc = free_port(), free_port()
    environment = environment_of(
        tmp_path,
        MLX_GUI_PORT=str(rest),
        MLX_GUI_GRPC_PORT=str(grpc),
        MLX_GUI_STANDBY="0",
        **server_environment,
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxgui_grpc", "serve"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        banner = []
        for line in process.stdout:
            banner.append(line.strip())
            if "Ctrl-C" in line:
                break
        text = "\n".join(banner)
        assert f"http://127.0.0.1:{rest}" in text and f"127.0.0.1:{grpc}" in text
        (pasted,) = (line for line in banner if line.startswith("curl "))
        curl = shutil.which("curl")
        if curl is not None:
            answered = subprocess.run(
                ["bash", "-c", pasted], capture_output=True, text=True, timeout=COMMAND_SECONDS, check=True
            )
            assert PARIS in answered.stdout
        else:
            words = shlex.split(pasted)
            body = words[words.index("-d") + 1]
            response = requests.post(words[1], data=body, timeout=COMMAND_SECONDS)
            assert PARIS in response.text
        process.send_signal(signal.SIGINT)
        assert process.wait(COMMAND_SECONDS) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def test_offline_installed_models_are_served_and_a_pull_says_why_not(
    start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    """With HF_HUB_OFFLINE, and with a hub that nobody can reach."""
    with LoopbackHub() as gone:
        endpoint = gone.endpoint
    server = start_server(
        environment={"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
    )
    assert mlxgui(server.home, "run", "demo", CAPITAL).stdout == f"{PARIS}\n"
    line = sentence(mlxgui(server.home, "pull", "some/model"), 1)
    assert "offline" in line.lower()


def test_a_gated_repository_asks_for_the_token(server: RunningServer, hub: LoopbackHub) -> None:
    hub.add("cli/gated", DEMO, gated=True)
    line = sentence(mlxgui(server.home, "pull", "cli/gated"), 1)
    assert "HF_TOKEN" in line and "cli/gated" in line
    assert TOKEN not in server.log()


def test_a_pull_from_the_hub_is_shown_listed_and_removed(server: RunningServer, hub: LoopbackHub) -> None:
    hub.add("cli/Pulled-Model", DEMO)
    pulled = mlxgui(server.home, "pull", "cli/Pulled-Model", "--name", "mine")
    assert pulled.returncode == 0, pulled.stderr
    assert "Installed mine" in pulled.stdout
    listed = json.loads(mlxgui(server.home, "ls", "--json").stdout)["models"]
    (mine,) = (model for model in listed if model["name"] == "mine")
    assert mine["huggingface_id"] == "cli/Pulled-Model"
    shown = json.loads(mlxgui(server.home, "show", "cli/pulled-model", "--json").stdout)
    assert shown == mine
    table = mlxgui(server.home, "ls").stdout.splitlines()
    assert table[0].split()[:3] == ["NAME", "TYPE", "STATE"]
    assert any(line.split()[0] == "mine" for line in table[1:])
    taken = mlxgui(server.home, "pull", "cli/other", "--name", "mine")
    assert "another name" in sentence(taken, 1)
    removed = mlxgui(server.home, "rm", "mine")
    assert removed.returncode == 0 and "and its files" in removed.stdout
    assert not Path(shown["path"]).exists()


def test_an_interrupted_pull_goes_on_where_it_was(server: RunningServer, hub: LoopbackHub) -> None:
    """Ctrl-C: exit code 130 and the way back; nothing is installed; the next pull fetches the rest."""
    hub.add("cli/interrupted", DEMO)
    hold = hub.hold("model.safetensors", 2_500_000)
    pulling = subprocess.Popen(
        [sys.executable, "-m", "mlxgui_grpc", "pull", "cli/interrupted"],
        env=environment_of(server.home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert hold.reached.wait(COMMAND_SECONDS)

        def has_bytes() -> bool:
            body = requests.get(f"{server.rest_url}/v1/operations?include_done=false", timeout=60).json()
            return any(entry["progress"]["done_bytes"] > 1_000_000 for entry in body["operations"])

        eventually(has_bytes, "bytes are on disk")
        pulling.send_signal(signal.SIGINT)
        out, err = pulling.communicate(timeout=COMMAND_SECONDS)
        assert pulling.returncode == 130, (out, err)
        assert "`mlxgui pull cli/interrupted`" in err and "Traceback" not in err
    finally:
        hold.release()
        pulling.kill()
        pulling.wait()
    assert mlxgui(server.home, "show", "interrupted").returncode == 4
    again = mlxgui(server.home, "pull", "cli/interrupted")
    assert again.returncode == 0, again.stderr
    assert (hub.fetches("model.safetensors")[-1].range_start or 0) > 0
    assert mlxgui(server.home, "rm", "interrupted").returncode == 0


def test_lists_are_json_for_programs(server: RunningServer) -> None:
    mlxgui(server.home, "load", "demo")
    models = json.loads(mlxgui(server.home, "ls", "--json").stdout)["models"]
    assert "demo" in {model["name"] for model in models}
    loaded = json.loads(mlxgui(server.home, "ps", "--json").stdout)["loaded_models"]
    assert "demo" in {model["name"] for model in loaded}
    shown = json.loads(mlxgui(server.home, "show", "demo", "--json").stdout)
    assert shown["state"] == "loaded" and shown["path"] == str(DEMO)
    assert "demo" in mlxgui(server.home, "ps").stdout
    versions = json.loads(mlxgui(server.home, "version", "--json").stdout)
    assert {"mlxgui", "python", "grpcio"} <= set(versions)


def test_version_help_and_completion_need_no_server(tmp_path: Path) -> None:
    assert mlxgui(tmp_path, "version").stdout.startswith("mlxgui ")
    assert mlxgui(tmp_path, "--version").stdout.startswith("mlxgui ")
    for shell, word in (("bash", "complete"), ("zsh", "compdef"), ("fish", "complete")):
        script = mlxgui(tmp_path, "completion", shell)
        assert script.returncode == 0 and word in script.stdout, script.stderr
    assert sentence(mlxgui(tmp_path, "completion", "tcsh"), 2)
    top = mlxgui(tmp_path, "--help").stdout
    commands = ["serve", "bridge", "pull", "ls", "ps", "show", "load", "unload", "rm", "run", "chat", "logs"]
    for command in [*commands, "doctor", "completion", "version"]:
        assert re.search(rf"^\s+{command}\s", top, re.MULTILINE), command
    helped = mlxgui(tmp_path, "pull", "--help")
    assert helped.returncode == 0 and "--name" in helped.stdout


def test_bash_completes_commands_and_settings(tmp_path: Path) -> None:
    for words, place, expected in (
        ("mlxgui un", "1", {"unload", "unpin"}),
        (
            "mlxgui settings set max_c",
            "3",
            {"max_concurrent_requests", "max_concurrent_models", "max_context_length"},
        ),
        ("mlxgui service ", "2", {"install", "uninstall", "status"}),
    ):
        result = mlxgui(tmp_path, _MLXGUI_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=place)
        assert set(result.stdout.split()) == expected


@pytest.mark.parametrize(
    "arguments", [("frobnicate",), ("ls", "--frobnicate"), ("load",), ("serve", "--port", "x")]
)
def test_what_is_not_understood_is_exit_code_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = mlxgui(tmp_path, *arguments)
    assert result.returncode == 2
    assert result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"MLX_GUI_PORT": "eighty"}, "MLX_GUI_PORT"),
        ({"MLX_GUI_PORT": "70000"}, "port"),
        ({"MLX_GUI_HOST": "0.0.0.0"}, "--insecure"),
        ({"MLX_GUI_STANDBY": "9"}, "standby"),
    ],
)
def test_settings_that_cannot_be_stop_the_start_in_one_line(
    tmp_path: Path, environment: dict[str, str], words: str
) -> None:
    result = mlxgui(tmp_path, "serve", **environment)
    assert words in sentence(result, 2)


def test_only_the_server_minds_a_failpoint(tmp_path: Path) -> None:
    """In one line; other commands have nothing to do with it."""
    assert "'explode'" in sentence(mlxgui(tmp_path, "serve", MLX_GUI_FAILPOINT="here:explode"), 2)
    assert mlxgui(tmp_path, "version", MLX_GUI_FAILPOINT="here:explode").returncode == 0


def test_a_config_file_with_an_unknown_option_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("prot = 8000\n")
    assert "prot" in sentence(mlxgui(tmp_path, "serve"), 2)


def test_doctor_finds_this_machine_fit(server: RunningServer, tmp_path: Path) -> None:
    """With a server and without one; as JSON its verdicts have a way out where one is needed."""
    for home, verdict in ((server.home, "ok"), (tmp_path, "warn")):
        result = mlxgui(home, "doctor", "--json")
        report = json.loads(result.stdout)
        assert result.returncode == (0 if report["ok"] else 1)
        checks = {check["name"]: check for check in report["checks"]}
        assert checks["server"]["verdict"] == verdict
        assert checks["python"]["verdict"] == "ok" and checks["mlx"]["verdict"] == "ok"
    text = mlxgui(server.home, "doctor").stdout
    assert re.search(r"^ok +python", text, re.MULTILINE)


def test_the_log_is_printed_and_followed(server: RunningServer) -> None:
    printed = mlxgui(server.home, "logs", "-n", "5")
    assert printed.returncode == 0
    assert 0 < len(printed.stdout.splitlines()) <= 5
    following = subprocess.Popen(
        [sys.executable, "-m", "mlxgui_grpc", "logs", "-f", "-n", "0"],
        env=environment_of(server.home),
        stdout=subprocess.PIPE,
        text=True,
    )
    output = following.stdout
    assert output is not None
    try:

        def ask_until_seen() -> bool:
            requests.post(
                server.rest_url + "/v1/chat/completions",
                json=chat_body(max_tokens=1),
                headers={"X-Request-Id": "followed-in-the-log"},
                timeout=60,
            )
            ready, _, _ = select.select([output], [], [], 0.2)
            return bool(ready)

        eventually(ask_until_seen, "a line is followed")
        assert any("followed-in-the-log" in line for line in output)
    finally:
        following.send_signal(signal.SIGINT)
        following.wait(COMMAND_SECONDS)
        output.close()


@pytest.fixture(scope="module")
def guarded(
    server_environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server with a key and without a bridge."""
    running = start(
        tmp_path_factory.mktemp("guarded-cli"),
        {**server_environment, "MLX_GUI_API_KEY": "sk-secret"},
        bridge=False,
        standby_count=0,
    )
    yield running
    assert running.stop() == 0


def test_over_tcp_the_key_is_asked_for_and_the_socket_needs_none(
    guarded: RunningServer, tmp_path: Path
) -> None:
    tcp = ("--target", guarded.grpc_address)
    line = sentence(mlxgui(tmp_path, *tcp, "ls"), 1)
    assert "MLX_GUI_API_KEY" in line
    assert sentence(mlxgui(tmp_path, *tcp, "ls", MLX_GUI_API_KEY="wrong"), 1)
    assert "demo" in mlxgui(tmp_path, *tcp, "ls", MLX_GUI_API_KEY="sk-secret").stdout
    assert "demo" in mlxgui(guarded.home, "ls").stdout


def test_the_bridge_alone_serves_a_server_elsewhere(guarded: RunningServer, tmp_path: Path) -> None:
    """On a port of its own, with a key of its own, until it is told to stop."""
    key = "sk-bridge"
    where = ("--target", guarded.unix_address, "--port", "0")
    bridge = subprocess.Popen(
        [sys.executable, "-m", "mlxgui_grpc", "--api-key", key, "bridge", *where],
        env=environment_of(tmp_path),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert bridge.stdout is not None
    try:
        name, url = bridge.stdout.readline().split()
        assert name == "REST" and url.startswith("http://127.0.0.1:")
        assert requests.get(url + "/health", timeout=60).json() == {"status": "healthy"}
        completions = url + "/v1/chat/completions"
        assert requests.post(completions, json=chat_body(), timeout=60).status_code == 401
        answer = requests.post(
            completions,
            json=chat_body(),
            headers={"authorization": f"Bearer {key}"},
            timeout=COMMAND_SECONDS,
        ).json()
        assert answer["choices"][0]["message"]["content"] == PARIS
        bridge.terminate()
        assert bridge.wait(COMMAND_SECONDS) == 0
    finally:
        bridge.kill()
        bridge.wait()
        bridge.stdout.close()


def test_a_conversation_at_a_terminal_remembers_and_ends(server: RunningServer) -> None:
    """Answers come, the history counts, an error keeps the session, Ctrl-D leaves."""
    terminal = Terminal(server.home, "chat", "demo")
    terminal.expect(">>> ")
    terminal.type(f"{CAPITAL}\n")
    terminal.expect(PARIS)
    terminal.expect(">>> ")
    terminal.type("My name is Anna.\n")
    terminal.expect("Hello Anna!")
    terminal.expect(">>> ")
    terminal.type("What is my name?\n")
    terminal.expect("Anna")
    terminal.expect(">>> ")
    terminal.type("/help\n")
    terminal.expect("/clear")
    terminal.expect(">>> ")
    terminal.type("/clear\n")
    terminal.expect(">>> ")
    terminal.type("/bye\n")
    assert terminal.wait() == 0


def test_a_missing_model_is_offered_at_a_terminal(server: RunningServer, hub: LoopbackHub) -> None:
    """No keeps everything as it is, yes pulls with a progress bar and answers."""
    hub.add("cli/offered", DEMO)
    terminal = Terminal(server.home, "run", "cli/offered", CAPITAL)
    terminal.expect("[y/N]")
    terminal.type("n\n")
    assert terminal.wait() == 4
    terminal = Terminal(server.home, "run", "cli/offered", CAPITAL)
    terminal.expect("[y/N]")
    terminal.type("y\n")
    terminal.expect(PARIS)
    assert terminal.wait() == 0
    assert mlxgui(server.home, "rm", "offered").returncode == 0


def test_ctrl_c_stops_an_answer_on_the_server_too(server: RunningServer, tiny_models: TinyModels) -> None:
    """Exit code 130; what was written stays written."""
    series = Series(server.channel())
    with installed_directory(server.channel(unix=True), tiny_models.long, "cli-endless") as name:
        running = subprocess.Popen(
            [sys.executable, "-m", "mlxgui_grpc", "run", name, "x", "--max-tokens", "16384"],
            env=environment_of(server.home),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert running.stdout is not None
        assert running.stdout.read(1)
        assert series.running(name) == 1
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=COMMAND_SECONDS)
        assert running.returncode == 130 and b"Traceback" not in err
        eventually(lambda: series.running(name) == 0, "the engine is idle")
        assert series.finished(name) == 0
