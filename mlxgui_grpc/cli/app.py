"""The grammar of the command line: commands, flags and help. What a command does is imported when it runs."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mlxgui_grpc import __version__
from mlxgui_grpc.cli import model_commands, server_commands
from mlxgui_grpc.cli.connection import read_connection
from mlxgui_grpc.cli.options import (
    TAKES_NEGATIVE_NUMBERS,
    ApiKey,
    Home,
    Json,
    RootCertificate,
    Target,
)

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


def serve(
    context: typer.Context,
    host: Annotated[
        str | None, typer.Option(help="Address of the REST API [env: MLX_GUI_HOST; default: 127.0.0.1]")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Its port, 0 takes a free one [env: MLX_GUI_PORT; default: 8000]")
    ] = None,
    bind_to_all_interfaces: Annotated[
        bool | None,
        typer.Option(
            help="The REST API on all addresses of this machine; needs a key [env: MLX_GUI_BIND_TO_ALL_INTERFACES]"
        ),
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
        int | None,
        typer.Option(
            help="Sequences that decode at once, per model [env: MLX_GUI_MAX_CONCURRENT_REQUESTS; default: 32]"
        ),
    ] = None,
    max_waiting_requests: Annotated[
        int | None, typer.Option(help="Sequences that may wait beyond them, per model [default: 128]")
    ] = None,
    max_concurrent_models: Annotated[
        int | None,
        typer.Option(help="Models in memory at once [env: MLX_GUI_MAX_CONCURRENT_MODELS; default: 3]"),
    ] = None,
    auto_unload_inactive_models: Annotated[
        bool | None,
        typer.Option(
            help="Unload models that are idle [env: MLX_GUI_AUTO_UNLOAD_INACTIVE_MODELS; default: yes]"
        ),
    ] = None,
    model_inactivity_timeout_minutes: Annotated[
        int | None,
        typer.Option(
            help="How long one is idle before that [env: MLX_GUI_MODEL_INACTIVITY_TIMEOUT_MINUTES; default: 30]"
        ),
    ] = None,
    max_model_memory_gb: Annotated[
        float | None,
        typer.Option(
            help="GiB that all models may take together [env: MLX_GUI_MAX_MODEL_MEMORY_GB; default: what there is]"
        ),
    ] = None,
    max_context_length: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of prompt and completion [env: MLX_GUI_MAX_CONTEXT_LENGTH; default: the model's]"
        ),
    ] = None,
    enable_gpu_acceleration: Annotated[
        bool | None,
        typer.Option(
            help="Use the GPU, if there is one [env: MLX_GUI_ENABLE_GPU_ACCELERATION; default: yes]"
        ),
    ] = None,
    enable_system_tray: Annotated[
        bool | None,
        typer.Option(help="Without effect: there is no icon in the tray [env: MLX_GUI_ENABLE_SYSTEM_TRAY]"),
    ] = None,
    default_model: Annotated[
        str | None,
        typer.Option(help="Model of requests that name none [env: MLX_GUI_DEFAULT_MODEL; default: none]"),
    ] = None,
    image_url_fetch: Annotated[
        str | None,
        typer.Option(
            help="Fetch images: on, off, or the hosts to fetch from [env: MLX_GUI_IMAGE_URL_FETCH; default: on]"
        ),
    ] = None,
    image_url_ports: Annotated[
        list[int] | None,
        typer.Option(
            "--image-url-port", help="A port to fetch images from; repeatable [default: 80 and 443]"
        ),
    ] = None,
    image_url_trusted_addresses: Annotated[
        list[str] | None,
        typer.Option(
            "--image-url-trusted-address",
            help="An address to fetch images from though it is not public; repeatable.",
        ),
    ] = None,
    preload_models: Annotated[
        list[str] | None,
        typer.Option(
            "--preload", help="A model to load at the start; repeatable [env: MLX_GUI_PRELOAD_MODELS]"
        ),
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
        typer.Option(help="Folder of downloads [env: MLX_GUI_HUB_CACHE; default: the Hugging Face cache]"),
    ] = None,
    bridge: Annotated[
        bool | None, typer.Option("--bridge/--no-bridge", help="With or without the REST API.")
    ] = None,
    register_demo: Annotated[
        bool | None, typer.Option("--demo/--no-demo", help="With or without the built-in demo model.")
    ] = None,
) -> None:
    """Start the server here; Ctrl-C stops it.

    The environment counts where a flag is not given, then `mlxgui settings`, then config.toml in the state folder.
    """
    flags = dict(locals())
    inherited = flags.pop("context").obj
    flags["home"] = home or inherited["home"]
    flags["api_key"] = api_key or inherited["api_key"]
    from mlxgui_grpc.cli import serve as command

    # A repeatable flag that was never given is an empty list, which is not the same as an empty setting.
    raise typer.Exit(command.serve({name: None if value == [] else value for name, value in flags.items()}))


def bridge(context: typer.Context) -> None:
    """Run only the REST API, in front of a server that runs.

    That is the one of --home unless --target names another: a server's unix socket, or a plaintext gRPC
    address without a key. All flags go on to the bridge.
    """
    from mlxgui_grpc.cli import serve as command

    command.bridge(read_connection(context.obj), context.args)


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


_PASSES_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

# In the order of the help.
app.command()(serve)
app.command()(server_commands.status)
app.command()(server_commands.top)
app.command()(server_commands.stop)
app.command()(server_commands.restart)
app.command(context_settings=_PASSES_ON)(bridge)
app.command()(model_commands.search)
app.command()(model_commands.pull)
app.command()(model_commands.update)
app.command()(model_commands.ls)
app.command()(model_commands.ps)
app.command()(model_commands.show)
app.command()(model_commands.estimate)
app.command()(model_commands.load)
app.command()(model_commands.unload)
app.command(context_settings=TAKES_NEGATIVE_NUMBERS)(model_commands.priority)
app.command()(model_commands.pin)
app.command()(model_commands.unpin)
app.command()(model_commands.rm)
app.command(name="run")(model_commands.run)
app.command(name="chat", help="The same as run.")(model_commands.run)
app.add_typer(server_commands.settings_app)
app.add_typer(server_commands.service_app)
app.command()(server_commands.logs)
app.command()(server_commands.doctor)
app.command()(completion)
app.command()(version)
