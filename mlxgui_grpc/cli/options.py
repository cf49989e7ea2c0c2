"""Flags and arguments that commands share, and the connection that most of them begin with."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec

import typer

from mlxgui_grpc.cli.connection import Connection, read_connection

P = ParamSpec("P")

Target = Annotated[
    str | None,
    typer.Option(
        help="Server to talk to, unix:PATH or HOST:PORT [env: MLX_GUI_TARGET; default: that of --home]"
    ),
]
Home = Annotated[
    Path | None, typer.Option(help="State folder of the server [env: MLX_GUI_HOME; default: ~/.mlxgui]")
]
ApiKey = Annotated[
    str | None, typer.Option(help="Key of the server; better said by the environment [env: MLX_GUI_API_KEY]")
]
RootCertificate = Annotated[
    Path | None,
    typer.Option(help="PEM file that a server over TLS is checked with [env: MLX_GUI_ROOT_CERTIFICATE]"),
]
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
Name = Annotated[str, typer.Argument(help="Installed name or hub id.", show_default=False)]

TAKES_NEGATIVE_NUMBERS = {"ignore_unknown_options": True}
"""Context settings of a command whose arguments may begin with a minus sign."""


def connected(command: Callable[Concatenate[Connection, P], None]) -> Callable[..., None]:
    """Give a command the flags that say which server it talks to; it gets a `Connection` in their place.

    The same flags before the command count too: `mlxgui --home X ls` is `mlxgui ls --home X`.
    """

    def run(
        context: typer.Context,
        target: Target = None,
        home: Home = None,
        api_key: ApiKey = None,
        root_certificate: RootCertificate = None,
        **arguments: Any,
    ) -> None:
        flags = with_inherited(
            context,
            {"target": target, "home": home, "api_key": api_key, "root_certificate": root_certificate},
        )
        command(read_connection(flags), **arguments)  # type: ignore[call-arg]

    first, *shared, _ = inspect.signature(run).parameters.values()
    own_parameters = list(inspect.signature(command).parameters.values())[1:]
    parameters = [first, *own_parameters, *shared]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def with_inherited(context: typer.Context, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Connection flags of a command, those before the command's name in place of what is not given."""
    inherited = context.obj or {}
    return {name: value or inherited.get(name) for name, value in flags.items()}
