"""Where a server is: said by the caller, or read from its state folder."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlxgui_grpc.client.failures import ServerUnreachableError

ADDRESS_FILE = Path("run", "address.json")
"""Below the state folder; the server writes it when it serves and removes it when it ends."""


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """A gRPC target, and the words in which errors speak of it."""

    target: str
    """`unix:/path` or `host:port`."""
    place: str
    """For sentences: `in /home/me/.mlxgui` or `at 127.0.0.1:50051`."""

    @classmethod
    def of(cls, target: str) -> "ServerAddress":
        """The address that a user wrote; a bare path is a unix socket."""
        if target.startswith(("/", "./", "~")):
            target = f"unix:{Path(target).expanduser().absolute()}"
        return cls(target, f"at {target}")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can be there."""
        return self.target.startswith(("unix:", "127.0.0.1:", "localhost:", "[::1]:"))


def home_directory(home: Path | str | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """The state folder: the one given, else MLX_GUI_HOME, else `~/.mlxgui`."""
    return Path(home or environ.get("MLX_GUI_HOME") or "~/.mlxgui").expanduser().absolute()


def discover(home: Path | str | None = None, environ: Mapping[str, str] = os.environ) -> ServerAddress:
    """Find the server that runs in a state folder; raises ServerUnreachableError when none wrote its address.

    The unix socket is preferred: the file system guards it, and only there may any directory be installed.
    """
    folder = home_directory(home, environ)
    try:
        addresses = json.loads((folder / ADDRESS_FILE).read_text())
        unix, tcp = addresses.get("unix"), addresses.get("grpc")
    except (OSError, ValueError, AttributeError):
        raise ServerUnreachableError.not_running(f"in {folder}") from None
    if unix:
        return ServerAddress(unix if unix.startswith("unix:") else f"unix:{unix}", f"in {folder}")
    if tcp:
        return ServerAddress(str(tcp), f"in {folder}")
    raise ServerUnreachableError.not_running(f"in {folder}")
