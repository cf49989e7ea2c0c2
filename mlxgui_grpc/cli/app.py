"""The grammar of the command line: commands, flags and help. What a command does is imported when it runs."""

import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec

import typer

from mlxgui_grpc import __version__
from mlxgui_grpc.cli.connection import Connection, read_connection

P = ParamSpec("P")

EPILOG = """\b
Exit codes:
  0    done
  1    the server refused or failed, or this machine did
  2    the command was not understood
  3    no server answers
  4    no such model, log or repository
  130  interrupted
"""

app = typer.Typer(
    name="mlxgui",
    help="A local model server for MLX: gRPC inside, REST and OpenAI's API outside.",
    epilog=EPILOG,
    no_args_is_help=True,
    # Plain text: help has to be there at once, and importing rich takes longer than everything else in it.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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
        own = {"target": target, "home": home, "api_key": api_key, "root_certificate": root_certificate}
        flags = {name: value or context.obj[name] for name, value in own.items()}
        command(read_connection(flags), **arguments)  # type: ignore[call-arg]

    first, *shared, _ = inspect.signature(run).parameters.values()
    own_parameters = list(inspect.signature(command).parameters.values())[1:]
    parameters = [first, *own_parameters, *shared]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def _say_version(is_asked: bool) -> None:
    if is_asked:
        print(f"mlxgui {__version__}")
        raise typer.Exit


@app.callback()
def mlxgui(
    context: typer.Context,
    target: Target = None,
    home: Home = None,
    api_key: ApiKey = None,
    root_certificate: RootCertificate = None,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where errors come from [env: MLX_GUI_DEBUG]")
    ] = False,
    version: Annotated[
        bool,
        # Eager: it has to be seen before the command is missed.
        typer.Option("--version", help="Say the version and exit.", callback=_say_version, is_eager=True),
    ] = False,
) -> None:
    context.obj = {"target": target, "home": home, "api_key": api_key, "root_certificate": root_certificate}
    if debug:
        os.environ["MLX_GUI_DEBUG"] = "1"


@app.command()
def serve(
    context: typer.Context,
    host: Annotated[
        str | None, typer.Option(help="Address of the REST API [env: MLX_GUI_HOST; default: 127.0.0.1]")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Its port, 0 takes a free one [env: MLX_GUI_PORT; default: 8000]")
    ] = None,
    grpc_host: Annotated[
        str | None, typer.Option(help="Address of the gRPC API [env: MLX_GUI_GRPC_HOST; default: 127.0.0.1]")
    ] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="Its port, 0 takes a free one [env: MLX_GUI_GRPC_PORT; default: 50051]")
    ] = None,
    home: Home = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="The key that clients must have; seen in the process list, so better [env: MLX_GUI_API_KEY]"
        ),
    ] = None,
    require_key: Annotated[
        bool | None, typer.Option("--require-key", help="Do not start without a key.")
    ] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Serve other machines without key and TLS all the same.")
    ] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file: gRPC over TCP speaks TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its key.")] = None,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option("--allowed-host", help="A name by which browsers may reach the REST API; repeatable."),
    ] = None,
    cors_origins: Annotated[
        list[str] | None,
        typer.Option("--cors-origin", help="An origin whose pages may call the REST API; repeatable."),
    ] = None,
    model_roots: Annotated[
        list[Path] | None,
        typer.Option(
            "--model-root", help="A folder below which models may be installed over TCP and REST; repeatable."
        ),
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="DEBUG, INFO, WARNING or ERROR [env: MLX_GUI_LOG_LEVEL; default: INFO]")
    ] = None,
    standby_count: Annotated[
        int | None,
        typer.Option("--standby", help="Workers kept warm, 0 to 4 [env: MLX_GUI_STANDBY; default: 1]"),
    ] = None,
    max_concurrent_requests: Annotated[
        int | None, typer.Option(help="Sequences that decode at once, per model [default: 32]")
    ] = None,
    max_waiting_requests: Annotated[
        int | None, typer.Option(help="Sequences that may wait beyond them, per model [default: 128]")
    ] = None,
    inference_seconds: Annotated[
        float | None, typer.Option(help="Longest inference call [default: 600]")
    ] = None,
    drain_seconds: Annotated[
        float | None,
        typer.Option(help="How long running calls may go on once it is told to stop [default: 30]"),
    ] = None,
    stall_seconds: Annotated[
        float | None, typer.Option(help="A worker that delivers nothing for so long is killed [default: 120]")
    ] = None,
    hub_endpoint: Annotated[
        str | None, typer.Option(help="Base URL of the model hub [env: HF_ENDPOINT; default: the public one]")
    ] = None,
    hub_cache: Annotated[
        Path | None,
        typer.Option(help="Folder of downloads [env: HF_HUB_CACHE; default: the Hugging Face cache]"),
    ] = None,
    bridge: Annotated[
        bool | None, typer.Option("--bridge/--no-bridge", help="With or without the REST API.")
    ] = None,
    register_demo: Annotated[
        bool | None, typer.Option("--demo/--no-demo", help="With or without the built-in demo model.")
    ] = None,
) -> None:
    """Start the server here; Ctrl-C stops it.

    The environment counts where a flag is not given, then config.toml in the state folder.
    """
    flags = dict(locals())
    inherited = flags.pop("context").obj
    flags["home"] = home or inherited["home"]
    flags["api_key"] = api_key or inherited["api_key"]
    from mlxgui_grpc.cli import serve as command

    # A repeatable flag that was never given is an empty list, which is not the same as an empty setting.
    raise typer.Exit(command.serve({name: None if value == [] else value for name, value in flags.items()}))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def bridge(context: typer.Context) -> None:
    """Run only the REST API, in front of a server that runs.

    That is the one of --home unless --target names another: a server's unix socket, or a plaintext gRPC
    address without a key. All flags go on to the bridge.
    """
    from mlxgui_grpc.cli import serve as command

    command.bridge(read_connection(context.obj), context.args)


@app.command()
@connected
def pull(
    connection: Connection,
    source: Annotated[str, typer.Argument(help="Hub id (OWNER/NAME), or a directory.", show_default=False)],
    name: Annotated[
        str, typer.Option(help="Name to install it under [default: the last part of SOURCE]")
    ] = "",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit [default: the main branch]")] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Take the name from another model, and fetch every file again.")
    ] = False,
) -> None:
    """Install a model from the hub or from a directory.

    An interrupted download goes on from where it was. A directory is used where it is and never deleted.
    """
    from mlxgui_grpc.cli import models

    models.pull(connection, source, name, revision, force)


@app.command()
@connected
def ls(
    connection: Connection,
    as_json: Json = False,
    include_available: Annotated[
        bool,
        typer.Option("--all", help="Also those of the Hugging Face cache, which install without a download."),
    ] = False,
) -> None:
    """List the installed models."""
    from mlxgui_grpc.cli import models

    models.ls(connection, as_json, include_available)


@app.command()
@connected
def ps(connection: Connection, as_json: Json = False) -> None:
    """List the models that are in memory."""
    from mlxgui_grpc.cli import models

    models.ps(connection, as_json)


@app.command()
@connected
def show(connection: Connection, name: Name, as_json: Json = False) -> None:
    """Say everything about one model."""
    from mlxgui_grpc.cli import models

    models.show(connection, name, as_json)


@app.command()
@connected
def load(
    connection: Connection,
    name: Name,
    keep_alive_seconds: Annotated[
        float | None,
        typer.Option(
            "--keep-alive", help="Seconds it stays after its last use, -1 for ever [default: the server's]"
        ),
    ] = None,
) -> None:
    """Load a model into memory."""
    from mlxgui_grpc.cli import models

    models.load(connection, name, keep_alive_seconds)


@app.command()
@connected
def unload(
    connection: Connection,
    name: Name,
    force: Annotated[bool, typer.Option("--force", help="Even if requests run; they end.")] = False,
) -> None:
    """Remove a model from memory."""
    from mlxgui_grpc.cli import models

    models.unload(connection, name, force)


@app.command()
@connected
def rm(
    connection: Connection,
    name: Name,
    keep_files: Annotated[
        bool, typer.Option("--keep-files", help="Leave downloaded files where they are.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Even if requests run; they end.")] = False,
) -> None:
    """Remove an installed model.

    Files that were downloaded for it are removed, a directory of yours is not.
    """
    from mlxgui_grpc.cli import models

    models.rm(connection, name, keep_files, force)


@connected
def run(
    connection: Connection,
    name: Name,
    prompt: Annotated[
        str | None, typer.Argument(help="What to answer; - is stdin. Without one: stdin, or a conversation.")
    ] = None,
    message: Annotated[
        str | None,
        typer.Option("--message", "-m", help="What to answer, before PROMPT: -m 'Shorten:' - < file"),
    ] = None,
    system: Annotated[str, typer.Option(help="Instructions for the whole conversation.")] = "",
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer, 1 to 16384.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 to 2; 0 always takes the likeliest token.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes a random answer repeatable.")] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option("--image", metavar="FILE", help="An image file to look at, first message; repeatable."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Pull a missing model without asking.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say tokens and speed after each answer.")
    ] = False,
) -> None:
    """Ask a model one thing, or converse with it at the terminal.

    Ctrl-C stops the answer, /bye ends the conversation.
    """
    from mlxgui_grpc.cli import chat
    from mlxgui_grpc.client import Sampling

    sampling = Sampling()
    if max_tokens is not None:
        sampling["max_tokens"] = max_tokens
    if temperature is not None:
        sampling["temperature"] = temperature
    if seed is not None:
        sampling["seed"] = seed
    options = chat.ChatOptions(
        system=system, sampling=sampling, images=images or (), assume_yes=yes, show_statistics=verbose
    )
    raise typer.Exit(
        chat.run(connection, name, [word for word in (message, prompt) if word is not None], options)
    )


app.command(name="run")(run)
app.command(name="chat", help="The same as run.")(run)


@app.command()
@connected
def logs(
    connection: Connection,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is added.")] = False,
    line_count: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last lines.")] = 50,
) -> None:
    """Print the end of the server's log."""
    from mlxgui_grpc.cli import logs as command

    command.logs(connection.home, line_count, follow)


@app.command()
@connected
def doctor(connection: Connection, as_json: Json = False) -> None:
    """Check this machine, and say what to do.

    Exits with 1 when something must be mended before the server can work.
    """
    from mlxgui_grpc.cli import doctor as command

    raise typer.Exit(command.doctor(connection, as_json))


@app.command()
def completion(shell: Annotated[str, typer.Argument(help="bash, zsh, fish or powershell.")] = "") -> None:
    """Print the completion script of a shell.

    In ~/.bashrc, for example: eval "$(mlxgui completion bash)". `mlxgui --install-completion` puts it there.
    """
    shell = shell or Path(os.environ.get("SHELL", "")).name
    if shell not in ("bash", "zsh", "fish", "powershell", "pwsh"):
        print(
            f"mlxgui: No completion for shell '{shell}': say bash, zsh, fish or powershell", file=sys.stderr
        )
        raise typer.Exit(2)
    # The interface between completion scripts and the program; typer answers it.
    os.environ["_MLXGUI_COMPLETE"] = f"source_{shell}"
    app(prog_name="mlxgui")


@app.command()
def version(as_json: Json = False) -> None:
    """Say the versions of this program and its libraries."""
    import importlib.metadata
    import platform

    versions = {"mlxgui": __version__, "python": platform.python_version()}
    for library in ("mlx", "mlx-lm", "grpcio", "protobuf", "huggingface-hub", "transformers"):
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    if as_json:
        import json

        print(json.dumps(versions, indent=2))
    else:
        for name, value in versions.items():
            print(f"{name} {value}")
