"""The grammar of the commands about the server itself. What they do is imported when they run."""

from pathlib import Path
from typing import Annotated

import typer

from mlxgui_grpc.cli.connection import Connection, read_connection
from mlxgui_grpc.cli.options import (
    TAKES_NEGATIVE_NUMBERS,
    ApiKey,
    Home,
    Json,
    RootCertificate,
    Target,
    connected,
    with_inherited,
)

Grace = Annotated[
    str | None,
    typer.Option(
        metavar="SPAN",
        help="How long running requests may go on: seconds, 90s or 5m; 0 ends them [default: the server's]",
    ),
]


def _complete_key(incomplete: str) -> list[str]:
    from mlxgui_grpc.client.management import SETTING_KEYS

    return [key for key in SETTING_KEYS if key.startswith(incomplete)]


Key = Annotated[
    str,
    typer.Argument(
        help="A setting, as `mlxgui settings` lists them.", show_default=False, autocompletion=_complete_key
    ),
]


@connected
def status(connection: Connection, as_json: Json = False) -> None:
    """Say how the server, this machine and the models do.

    Exits with 3 when no server answers.
    """
    from mlxgui_grpc.cli import status as command

    command.status(connection, as_json)


@connected
def top(
    connection: Connection,
    once: Annotated[bool, typer.Option("--once", help="Say it once and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON each time.")] = False,
) -> None:
    """Watch models, queue, memory and tokens per second as they change; q or Ctrl-C ends it.

    On a terminal it is drawn in place, elsewhere one table is printed after the other.
    """
    from mlxgui_grpc.cli import top as command

    command.top(connection, once, as_json)


@connected
def stop(connection: Connection, grace: Grace = None) -> None:
    """Stop the server, and wait until its process is gone.

    It takes no new requests, lets those that run finish, and ends the rest when the grace is over.
    """
    from mlxgui_grpc.cli import lifetime

    lifetime.stop(connection, grace)


@connected
def restart(connection: Connection, grace: Grace = None) -> None:
    """Restart the server with the settings that are stored, and wait until it answers again.

    Models that were loaded are loaded again. The process stays the same.
    """
    from mlxgui_grpc.cli import lifetime

    lifetime.restart(connection, grace)


@connected
def logs(
    connection: Connection,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is added.")] = False,
    line_count: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last lines.")] = 50,
) -> None:
    """Print the end of the server's log."""
    from mlxgui_grpc.cli import logs as command

    command.logs(connection.home, line_count, follow)


@connected
def doctor(connection: Connection, as_json: Json = False) -> None:
    """Check this machine, and say what to do.

    Exits with 1 when something must be mended before the server can work.
    """
    from mlxgui_grpc.cli import doctor as command

    raise typer.Exit(command.doctor(connection, as_json))


settings_app = typer.Typer(name="settings", rich_markup_mode=None)


@settings_app.callback(invoke_without_command=True)
def settings(
    context: typer.Context,
    as_json: Json = False,
    target: Target = None,
    home: Home = None,
    api_key: ApiKey = None,
    root_certificate: RootCertificate = None,
) -> None:
    """List the server's settings, or get, set and reset one.

    A flag of `mlxgui serve` wins over the environment, that over what is set here, that over config.toml.
    """
    context.obj = with_inherited(
        context, {"target": target, "home": home, "api_key": api_key, "root_certificate": root_certificate}
    )
    if context.invoked_subcommand is None:
        from mlxgui_grpc.cli import settings as command

        command.list_settings(read_connection(context.obj), as_json)
    elif as_json:
        raise typer.BadParameter(
            "say it after the command: mlxgui settings get KEY --json", param_hint="--json"
        )


@settings_app.command(name="get")
@connected
def get_setting(connection: Connection, key: Key, as_json: Json = False) -> None:
    """Print the value of one setting."""
    from mlxgui_grpc.cli import settings as command

    command.get_setting(connection, key, as_json)


@settings_app.command(name="set", context_settings=TAKES_NEGATIVE_NUMBERS)
@connected
def set_setting(
    connection: Connection,
    key: Key,
    values: Annotated[
        list[str],
        typer.Argument(
            metavar="VALUE",
            help="Its new value; several for a list, '' for an empty one.",
            show_default=False,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Change one setting, for good; says when that takes a restart."""
    from mlxgui_grpc.cli import settings as command

    command.set_setting(connection, key, values, as_json)


@settings_app.command(name="reset")
@connected
def reset_setting(connection: Connection, key: Key, as_json: Json = False) -> None:
    """Forget what was set, so that config.toml or the default counts again."""
    from mlxgui_grpc.cli import settings as command

    command.reset_setting(connection, key, as_json)


service_app = typer.Typer(name="service", no_args_is_help=True, rich_markup_mode=None)


@service_app.callback()
def service() -> None:
    """Run the server whenever you are logged in: by launchd on macOS, by systemd on Linux."""


@service_app.command(name="install")
def install_service(
    context: typer.Context,
    print_only: Annotated[
        bool, typer.Option("--print", help="Write the file to stdout and change nothing.")
    ] = False,
    home: Home = None,
) -> None:
    """Install the server as a service of yours, and start it.

    It gets the variables MLX_GUI_... and HF_... that are set now, but no keys and tokens, is started again when
    it fails, and writes its log where `mlxgui logs` finds it. Repeated, it takes over what has changed.
    """
    from mlxgui_grpc.cli import service as command

    command.install(_home(context, home), print_only)


@service_app.command(name="uninstall")
def uninstall_service(context: typer.Context, home: Home = None) -> None:
    """Stop the service and remove it. Models and settings stay."""
    from mlxgui_grpc.cli import service as command

    command.uninstall(_home(context, home))


@service_app.command(name="status")
def service_status(context: typer.Context, home: Home = None, as_json: Json = False) -> None:
    """Say whether the service is installed and runs.

    Exits with 1 when it does not run.
    """
    from mlxgui_grpc.cli import service as command

    raise typer.Exit(command.status(_home(context, home), as_json))


def _home(context: typer.Context, home: Path | None) -> Path:
    return read_connection(with_inherited(context, {"home": home})).home
