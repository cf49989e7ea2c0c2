"""The programs of the operating system that run a user's services: launchd and systemd."""

import os
import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxgui_grpc.cli.failures import CommandError
from mlxgui_grpc.cli.service_files import LABEL, UNIT, Definition, launch_agent, systemd_unit

TOOL_SECONDS = 120.0
"""Longest call of launchctl or systemctl: stopping waits for the server to end."""
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class ServiceState:
    """What the service's host says of it."""

    installed: bool
    running: bool
    process_id: int | None
    words: str
    """In the host's own words."""


class ServiceHost(ABC):
    """The program that runs a user's services."""

    tool: str
    file: Path
    hint: str
    """What a user of it should know once the service is installed."""

    @abstractmethod
    def text(self, definition: Definition) -> bytes:
        """The content of `file`."""

    @abstractmethod
    def start(self) -> None:
        """Take the file as it is now, and start the service with it, now and at each login."""

    @abstractmethod
    def stop(self) -> None:
        """Stop the service, which is perhaps not running, and start it no more."""

    @abstractmethod
    def forget(self) -> None:
        """Notice that the file is gone."""

    @abstractmethod
    def state(self) -> ServiceState:
        """How the service does."""

    def check_tool(self) -> None:
        """CommandError where the program is not there."""
        if shutil.which(self.tool) is None:
            raise CommandError(
                f"There is no {self.tool} here: `mlxgui service install --print` writes what it would have "
                "been told, for another program of that kind"
            )

    def call(self, *arguments: str, must_succeed: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run the program; CommandError with its own words when it fails."""
        command: Sequence[str] = (self.tool, *arguments)
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, timeout=TOOL_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise CommandError(f"`{' '.join(command)}` takes longer than {TOOL_SECONDS:.0f} s") from None
        if must_succeed and result.returncode != 0:
            words = " ".join((result.stderr or result.stdout).split()) or f"exit status {result.returncode}"
            # There is none where nobody has logged in, as after `su` and in containers.
            is_without_bus = " bus" in words
            way_out = (
                ": log in with a session, or use `mlxgui service install --print`" if is_without_bus else ""
            )
            raise CommandError(f"`{' '.join(command)}` failed: {words}{way_out}")
        return result


class Launchd(ServiceHost):
    """macOS."""

    tool = "launchctl"
    hint = "It ends when you log out."

    def __init__(self, home: Path, user_id: int) -> None:
        self.file = home / "Library" / "LaunchAgents" / f"{LABEL}.plist"
        self._domain = f"gui/{user_id}"
        self._target = f"gui/{user_id}/{LABEL}"

    def text(self, definition: Definition) -> bytes:
        return launch_agent(definition)

    def start(self) -> None:
        self.stop()  # It may run by an earlier version of the file.
        self.call("enable", self._target)
        self.call("bootstrap", self._domain, str(self.file))

    def stop(self) -> None:
        self.call("bootout", self._target, must_succeed=False)
        # It answers before the service has ended, and until then no other can take its place.
        deadline = time.monotonic() + TOOL_SECONDS
        while self.call("print", self._target, must_succeed=False).returncode == 0:
            if time.monotonic() > deadline:
                raise CommandError(f"{LABEL} does not end: `launchctl kill SIGKILL {self._target}` makes it")
            time.sleep(POLL_SECONDS)

    def forget(self) -> None:
        """Its own by `bootout`."""

    def state(self) -> ServiceState:
        result = self.call("print", self._target, must_succeed=False)
        pairs = dict(
            line.strip().split(" = ", 1) for line in result.stdout.splitlines() if line.count(" = ") == 1
        )
        pid = pairs.get("pid", "")
        words = pairs.get("state", "not loaded")
        return ServiceState(
            self.file.exists(), words == "running", int(pid) if pid.isdigit() else None, words
        )


class Systemd(ServiceHost):
    """Linux: the user's own manager."""

    tool = "systemctl"
    hint = "It ends when you log out, unless `loginctl enable-linger` lets your services stay."

    def __init__(self, home: Path, config_home: str) -> None:
        folder = Path(config_home).expanduser() if config_home else home / ".config"
        self.file = folder / "systemd" / "user" / UNIT

    def text(self, definition: Definition) -> bytes:
        return systemd_unit(definition)

    def start(self) -> None:
        self.call("--user", "daemon-reload")
        self.call("--user", "enable", UNIT)
        self.call("--user", "restart", UNIT)

    def stop(self) -> None:
        self.call("--user", "disable", "--now", UNIT)

    def forget(self) -> None:
        self.call("--user", "daemon-reload")

    def state(self) -> ServiceState:
        result = self.call("--user", "show", UNIT, "--property=ActiveState,SubState,MainPID,Result")
        pairs = dict(line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)
        active = pairs.get("ActiveState", "unknown")
        pid = pairs.get("MainPID", "0")
        words = f"{active} ({pairs.get('SubState', 'unknown')})"
        if pairs.get("Result", "success") != "success":
            words += f", {pairs['Result']}"
        return ServiceState(
            self.file.exists(), active == "active", int(pid) if pid.isdigit() and pid != "0" else None, words
        )


def host_of(platform: str, environ: Mapping[str, str]) -> ServiceHost:
    """The one that this platform has."""
    home = Path(environ.get("HOME") or "~").expanduser()
    if platform == "darwin":
        return Launchd(home, os.getuid())
    if platform == "linux":
        return Systemd(home, environ.get("XDG_CONFIG_HOME", ""))
    raise CommandError(f"Services are for macOS and Linux, and this is {platform}")
