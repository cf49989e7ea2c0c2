"""`serve` and `bridge`: run the server here, or only its REST bridge."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mlxgui_grpc import __version__, failpoints
from mlxgui_grpc.cli.connection import Connection
from mlxgui_grpc.cli.failures import EXIT_USAGE, CommandError
from mlxgui_grpc.errors import InvalidRequestError
from mlxgui_grpc.options import load_options

QUESTION = "What is the capital of France?"


class Addresses(Protocol):
    """Where a server that has come up is; the form of `server.Announcement`."""

    @property
    def rest_url(self) -> str:
        """For example `http://127.0.0.1:8000`; empty without a bridge."""

    @property
    def grpc_address(self) -> str:
        """For example `127.0.0.1:50051`."""

    @property
    def unix_address(self) -> str:
        """For example `unix:/home/me/.mlxgui/run/grpc.sock`."""

    @property
    def log_file(self) -> Path:
        """What it logs to."""

    @property
    def demo_model(self) -> str | None:
        """Name of the built-in model; None when it is not registered."""


def serve(flags: Mapping[str, Any]) -> int:
    """Run the server until it is told to stop; returns the exit code."""
    try:
        failpoints.arm(os.environ.get(failpoints.ENVIRONMENT, ""), control_pid=os.getpid())
    except ValueError as error:
        raise CommandError(str(error), EXIT_USAGE) from error
    try:
        options = load_options(flags)
        config = options.config()
    except InvalidRequestError as error:
        raise CommandError(error.message, EXIT_USAGE) from error
    from mlxgui_grpc import server

    def announce(addresses: Addresses) -> None:
        print(banner(addresses, needs_key=bool(config.api_key)), flush=True)

    return server.run(options, announce=announce)


def banner(addresses: Addresses, *, needs_key: bool) -> str:
    """What the user reads when the server is up: where it is, and one line to paste."""
    lines = [f"mlxgui {__version__} is ready.", ""]
    if addresses.rest_url:
        lines.append(f"  REST  {addresses.rest_url}")
    lines += [
        f"  gRPC  {addresses.grpc_address} and {addresses.unix_address}",
        f"  Log   {addresses.log_file}",
        "",
        "Try it:",
        f"  {first_command(addresses, needs_key=needs_key)}",
        "",
        "Ctrl-C stops the server.",
    ]
    return "\n".join(lines)


def first_command(addresses: Addresses, *, needs_key: bool) -> str:
    """One line to paste into another shell."""
    # Expanded by that shell, so that the key is not on the screen.
    key = ' -H "authorization: Bearer $MLX_GUI_API_KEY"' if needs_key else ""
    if not addresses.rest_url:
        return (
            f"mlxgui run {addresses.demo_model} {shlex.quote(QUESTION)}"
            if addresses.demo_model
            else "mlxgui ls"
        )
    if not addresses.demo_model:
        return f"curl {addresses.rest_url}/v1/models{key}"
    body = f'{{"model": "{addresses.demo_model}", "messages": [{{"role": "user", "content": "{QUESTION}"}}]}}'
    url = f"{addresses.rest_url}/v1/chat/completions"
    return f"curl {url}{key} -H 'content-type: application/json' -d {shlex.quote(body)}"


def bridge(connection: Connection, arguments: Sequence[str]) -> None:
    """Become the REST bridge, in front of the server of `connection` unless the arguments name a target."""
    arguments = list(arguments)
    wants_help = any(argument in ("-h", "--help") for argument in arguments)
    if not wants_help and not any(argument.split("=")[0] == "--target" for argument in arguments):
        with connection.open() as client:
            arguments += ["--target", client.address.target]
    if connection.api_key:
        # Where the bridge looks for it; arguments of a process can be read by others.
        os.environ["MLX_GUI_API_KEY"] = connection.api_key
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "rest_bridge", *arguments])
