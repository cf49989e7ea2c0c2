"""Starts the real server as a user does, in a process of its own, and finds what it consists of."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil

READY_LINE = "Ctrl-C stops the server"
START_SECONDS = 120.0
STOP_SECONDS = 60.0


class ServerDidNotStartError(Exception):
    """The server ended instead: `status` is its exit code, `words` what it said on stderr."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"exit status {status}: {words}")
        self.status = status
        self.words = words


@dataclass
class RunningServer:
    """A server that has come up."""

    process: "subprocess.Popen[str]"
    home: Path
    rest_url: str
    grpc_address: str
    unix_path: Path
    _channels: list[grpc.Channel] = field(default_factory=list)

    @property
    def unix_address(self) -> str:
        return f"unix:{self.unix_path}"

    def channel(self, *, unix: bool = False) -> grpc.Channel:
        """A connection of its own, over TCP or the unix socket; closed with the server."""
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        channel = grpc.insecure_channel(self.unix_address if unix else self.grpc_address, options=options)
        self._channels.append(channel)
        return channel

    def log(self) -> str:
        """What the server logged so far."""
        return (self.home / "logs" / "mlxgui.log").read_text(encoding="utf-8")

    def descendants(self) -> list[psutil.Process]:
        """Every process that the control process started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> list[psutil.Process]:
        """The worker processes, standbys included."""
        return [child for child in self.descendants() if "mlxgui_grpc.engine.worker" in _command(child)]

    def worker(self) -> psutil.Process:
        """The one worker process of a server without standbys and with one model in memory."""
        (worker,) = self.workers()
        return worker

    def stop(self) -> int:
        """SIGTERM, then the exit status."""
        self._close_channels()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)

    def kill(self) -> None:
        """SIGKILL, of the control process alone."""
        self.process.kill()
        self.process.wait(STOP_SECONDS)
        self._close_channels()

    def _close_channels(self) -> None:
        for channel in self._channels:
            channel.close()
        self._channels.clear()


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def start(home: Path, environment: Mapping[str, str], **options: Any) -> RunningServer:
    """Run `mlxgui serve` on `home` with these options of ServerConfig; returns when it serves.

    Raises ServerDidNotStartError when it ends instead. Ports are free ones unless the options say otherwise.
    """
    home.mkdir(parents=True, exist_ok=True)
    _share_compiled(home)
    options = {"port": 0, "grpc_port": 0, **options}
    # JSON of text, numbers, truths and lists of them is TOML.
    lines = [f"{name} = {json.dumps(value, default=str)}" for name, value in options.items()]
    (home / "config.toml").write_text("\n".join(lines))
    errors = (home / "stderr.txt").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxgui_grpc", "serve"],
        env={**clean_environment(), **environment, "MLX_GUI_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    ready = _read_until_ready(process)
    if not ready.wait(START_SECONDS):
        process.kill()
    if process.poll() is not None or not (home / "run" / "address.json").exists():
        status = process.wait(STOP_SECONDS)
        errors.seek(0)
        raise ServerDidNotStartError(status, errors.read())
    address = json.loads((home / "run" / "address.json").read_text())
    return RunningServer(process, home, address["rest"], address["grpc"], Path(address["unix"]))


_homes: list[Path] = []


def _share_compiled(home: Path) -> None:
    """What MLX has compiled (by g++, on Linux) for the workers of another server, it need not compile again."""
    target = home / "tmp" / "mlx"
    for folder in (other / "tmp" / "mlx" for other in _homes if not target.exists()):
        libraries = list(folder.rglob("lib*.so"))
        for library in libraries:
            copy = target / library.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(library, copy)
        if libraries:
            break
    _homes.append(home)


def clean_environment() -> dict[str, str]:
    """The environment without anything that configures us, the hub's library or the BLAS of a worker."""
    ours = ("MLX_GUI_", "HF_", "HUGGING", "LD_PRELOAD", "PYTEST_")
    return {key: value for key, value in os.environ.items() if not key.startswith(ours)}


def _read_until_ready(process: "subprocess.Popen[str]") -> threading.Event:
    """Set when the banner is complete, or the process has nothing more to say; reads on for ever after."""
    ready = threading.Event()
    assert process.stdout is not None

    def read(lines: Callable[[], str]) -> None:
        while line := lines():
            if READY_LINE in line:
                ready.set()
        process.wait()
        ready.set()

    threading.Thread(target=read, args=(process.stdout.readline,), daemon=True).start()
    return ready
