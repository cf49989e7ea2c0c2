"""Which server a command talks to, as the user said it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlxgui_grpc.client import Client


@dataclass(frozen=True, slots=True)
class Connection:
    """Read once from flags and environment; frozen after."""

    home: Path
    """State folder, in which the running server is found and where the logs are."""
    target: str | None
    """`unix:/path` or `host:port`; None is the server of `home`."""
    api_key: str | None
    root_certificate: Path | None
    """PEM file; given, the connection is TLS."""

    @property
    def shares_files(self) -> bool:
        """Whether the server sees the file system that the user sees."""
        return self.target is None or self.target.startswith(("unix:", "/", "./", "~"))

    def open(self, timeout_seconds: float = 30.0) -> "Client":
        """Find the server; raises ServerUnreachableError. One that is silent shows at the first call.

        `timeout_seconds` is the deadline of calls that neither run nor move a model.
        """
        from mlxgui_grpc.cli.failures import CommandError
        from mlxgui_grpc.client import Client

        try:
            return Client(
                self.target,
                home=self.home,
                token=self.api_key,
                root_certificate=self.root_certificate,
                timeout_seconds=timeout_seconds,
            )
        except OSError as error:
            raise CommandError(
                f"{self.root_certificate}: {error.strerror} (--root-certificate)", 2
            ) from error


def read_connection(
    flags: Mapping[str, str | Path | None], environ: Mapping[str, str] = os.environ
) -> Connection:
    """Flag over environment over default."""
    home = flags.get("home") or environ.get("MLX_GUI_HOME") or "~/.mlxgui"
    certificate = flags.get("root_certificate") or environ.get("MLX_GUI_ROOT_CERTIFICATE")
    target = flags.get("target") or environ.get("MLX_GUI_TARGET")
    api_key = flags.get("api_key") or environ.get("MLX_GUI_API_KEY")
    return Connection(
        home=Path(home).expanduser().absolute(),
        target=str(target) if target else None,
        api_key=str(api_key) if api_key else None,
        root_certificate=Path(certificate).expanduser() if certificate else None,
    )
