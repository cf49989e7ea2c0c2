"""The grammar of the commands about models. What they do is imported when they run."""

from pathlib import Path
from typing import Annotated

import typer

from mlxgui_grpc.cli.connection import Connection
from mlxgui_grpc.cli.options import Json, Name, connected

# The hub.


@connected
def search(
    connection: Connection,
    query: Annotated[str, typer.Argument(help="Words to look for [default: everything]")] = "",
    sort: Annotated[str, typer.Option(help="downloads, likes, created or updated.")] = "downloads",
    kind: Annotated[str, typer.Option(help="any or embedding.")] = "any",
    embeddings: Annotated[bool, typer.Option("--embeddings", help="The same as --kind embedding.")] = False,
    fits: Annotated[
        bool, typer.Option("--fits", help="Only what fits the memory that this machine has available.")
    ] = False,
    memory_gb: Annotated[
        float | None, typer.Option("--memory", metavar="GB", help="Only what fits so much memory.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", help="Most models to list, 1 to 1000.")] = 20,
    categories: Annotated[
        bool, typer.Option("--categories", help="Groups of models worth trying, in place of a search.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Search the hub for models that MLX can run.

    `mlxgui show OWNER/NAME` says more of one, `mlxgui pull OWNER/NAME` installs it.
    """
    from mlxgui_grpc.cli import catalog

    if categories:
        catalog.categories(connection, as_json)
    else:
        wish = catalog.Wish(query, sort, "embedding" if embeddings else kind, fits, memory_gb, limit)
        catalog.search(connection, wish, as_json)


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


@connected
def update(
    connection: Connection,
    name: Name,
    revision: Annotated[
        str, typer.Option(help="Branch, tag or commit to go to [default: what was installed, as it is now]")
    ] = "",
) -> None:
    """Install a newer revision of a model from the hub.

    The old one serves until the new one is complete; a loaded model has it when it is next loaded.
    """
    from mlxgui_grpc.cli import models

    models.update(connection, name, revision)


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


@connected
def show(
    connection: Connection,
    name: Annotated[
        str,
        typer.Argument(help="Installed name, or hub id of any model.", metavar="NAME", show_default=False),
    ],
    as_json: Json = False,
) -> None:
    """Say everything about one model, installed or on the hub."""
    from mlxgui_grpc.cli import models

    models.show(connection, name, as_json)


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


# Memory.


@connected
def ps(connection: Connection, as_json: Json = False) -> None:
    """List the models that are in memory."""
    from mlxgui_grpc.cli import residents

    residents.ps(connection, as_json)


@connected
def estimate(
    connection: Connection,
    name: Name,
    request_count: Annotated[
        int | None,
        typer.Option("--requests", help="Requests that run at once [default: the server's setting]"),
    ] = None,
    token_count: Annotated[
        int | None, typer.Option("--tokens", help="Tokens of each, prompt and answer [default: 2048]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what loading a model would take, and what it would evict.

    Exits with 1 when the load would be refused.
    """
    from mlxgui_grpc.cli import residents

    raise typer.Exit(residents.estimate(connection, name, request_count, token_count, as_json))


@connected
def load(
    connection: Connection,
    name: Name,
    priority: Annotated[
        int, typer.Option(help="Place among the loads that wait, larger goes first, -100 to 100.")
    ] = 0,
    keep_alive: Annotated[
        str | None,
        typer.Option(
            metavar="SPAN",
            help="How long it stays after its last use: seconds, 90s, 5m or 2h; 0 ends with the last request, "
            "-1 is for ever [default: the server's]",
        ),
    ] = None,
) -> None:
    """Load a model into memory."""
    from mlxgui_grpc.cli import residents

    residents.load(connection, name, priority, keep_alive)


@connected
def unload(
    connection: Connection,
    name: Name,
    force: Annotated[bool, typer.Option("--force", help="Even if requests run; they end.")] = False,
) -> None:
    """Remove a model from memory."""
    from mlxgui_grpc.cli import residents

    residents.unload(connection, name, force)


@connected
def priority(
    connection: Connection,
    name: Name,
    value: Annotated[
        int, typer.Argument(metavar="N", help="Larger goes first, -100 to 100.", show_default=False)
    ],
) -> None:
    """Move a model's load in the queue, and set the priority of its later ones."""
    from mlxgui_grpc.cli import residents

    residents.priority(connection, name, value)


@connected
def pin(connection: Connection, name: Name) -> None:
    """Keep a model in memory once it is loaded: never evicted, never unloaded for being idle."""
    from mlxgui_grpc.cli import residents

    residents.pin(connection, name)


@connected
def unpin(connection: Connection, name: Name) -> None:
    """Undo pin."""
    from mlxgui_grpc.cli import residents

    residents.unpin(connection, name)


# Text.


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
