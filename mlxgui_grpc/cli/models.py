"""The commands about installed models: pull, update, ls, show, rm."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mlxgui.v1 import model_pb2
from mlxgui_grpc.cli import catalog, progress
from mlxgui_grpc.cli.connection import Connection
from mlxgui_grpc.cli.failures import EXIT_INTERRUPTED, EXIT_USAGE, CommandError
from mlxgui_grpc.cli.output import (
    enum_word,
    memory,
    moment,
    print_json,
    print_pairs,
    print_table,
    size,
    to_json,
)
from mlxgui_grpc.client import Stream
from mlxgui_grpc.errors import ModelNotFoundError

if TYPE_CHECKING:
    from mlxgui_grpc.client import Client


def pull(connection: Connection, source: str, name: str, revision: str, force: bool) -> None:
    """Install and say under which name."""
    place = parse_source(source, must_exist=connection.shares_files)
    if isinstance(place, Path) and revision:
        raise CommandError("--revision goes with a hub id, and a directory has none", EXIT_USAGE)
    with connection.open() as client:
        model = install(client, place, name, revision, force)
    words = f" ({size(model.size_bytes)})" if model.size_bytes else ""
    print(f"Installed {model.name}{words}: try `mlxgui run {model.name}`")


def install(
    client: "Client", source: str | Path, name: str = "", revision: str = "", force: bool = False
) -> model_pb2.Model:
    """Install with a progress bar. An interruption cancels the operation; what was downloaded stays."""
    stream = client.install(source, name, revision=revision, force=force)
    return _follow(client, stream, f"mlxgui pull {source}")


def update(connection: Connection, name: str, revision: str) -> None:
    """Go to a newer revision, and say whether there was one."""
    with connection.open() as client:
        before = client.model(name)
        model = _follow(client, client.update(name, revision=revision), f"mlxgui update {name}")
    if model.revision == before.revision:
        print(f"{model.name} is up to date ({model.version})")
        return
    print(f"Updated {model.name} from {before.version} to {model.version}")
    if before.state == model_pb2.MODEL_STATE_LOADED:
        print(f"It has them when it is next loaded: `mlxgui unload {model.name}`", file=sys.stderr)


def _follow(client: "Client", stream: Stream[model_pb2.Operation], repeat: str) -> model_pb2.Model:
    """Show a download to its end; interrupted, cancel it and name the command that goes on from there."""
    seen: list[model_pb2.Operation] = []
    try:
        return progress.follow(stream, seen).success
    except KeyboardInterrupt:
        if seen and not seen[0].done:
            client.cancel_operation(seen[0].id)
        raise CommandError(
            f"Cancelled; what was downloaded is kept, and `{repeat}` goes on from there", EXIT_INTERRUPTED
        ) from None


def parse_source(text: str, *, must_exist: bool) -> str | Path:
    """A path for what looks like one or is a directory here, else the hub id; neither is a CommandError."""
    is_path = text.startswith(("/", "./", "../", "~")) or text in (".", "..")
    path = Path(text).expanduser()
    if is_path and must_exist and not path.is_dir():
        raise CommandError(
            f"{text} is not a directory: give the folder that has the model's config.json", EXIT_USAGE
        )
    if is_path or (text and must_exist and path.is_dir()):
        return path.absolute()
    if text.count("/") != 1 or not all(text.split("/")):
        raise CommandError(
            f"'{text}' is neither a directory nor a hub id: write OWNER/NAME, or ./PATH for a directory",
            EXIT_USAGE,
        )
    return text


def ls(connection: Connection, as_json: bool, include_available: bool) -> None:
    """List installed models."""
    with connection.open() as client:
        models = client.models(include_available=include_available)
    if as_json:
        print_json({"models": [to_json(model) for model in models]})
    elif not models:
        print("No model is installed: `mlxgui pull OWNER/NAME` installs one")
    else:
        columns = ("NAME", "TYPE", "STATE", "PINNED", "SIZE", "CONTEXT", "BITS", "SOURCE", "LAST USED")
        print_table(columns, [_row(model) for model in models])


def _row(model: model_pb2.Model) -> tuple[str, ...]:
    return (
        model.name,
        enum_word(model_pb2.ModelType.DESCRIPTOR, model.type),
        enum_word(model_pb2.ModelState.DESCRIPTOR, model.state),
        "pinned" if model.pinned else "",
        size(model.size_bytes),
        str(model.context_length or ""),
        str(model.quantization_bits or ""),
        model.huggingface_id or enum_word(model_pb2.ModelSource.DESCRIPTOR, model.source).replace("_", "-"),
        moment(model, "last_use_time") or "never",
    )


def show(connection: Connection, name: str, as_json: bool) -> None:
    """Everything about one model: an installed one, else one of the hub, if the name can be that."""
    with connection.open() as client:
        try:
            model = client.model(name)
        except ModelNotFoundError:
            if name.count("/") != 1:
                raise
            catalog.show(client.catalog_model(name), as_json)
            return
    if as_json:
        print_json(to_json(model))
        return
    capabilities = [enum_word(model_pb2.Capability.DESCRIPTOR, value) for value in model.capabilities]
    print_pairs(
        [
            ("name", model.name),
            ("aliases", ", ".join(model.aliases)),
            ("type", enum_word(model_pb2.ModelType.DESCRIPTOR, model.type)),
            ("state", enum_word(model_pb2.ModelState.DESCRIPTOR, model.state)),
            ("architecture", model.architecture),
            ("parameters", f"{model.parameter_count:,}" if model.parameter_count else ""),
            ("quantization", f"{model.quantization_bits} bits" if model.quantization_bits else ""),
            ("context", f"{model.context_length:,} tokens" if model.context_length else ""),
            ("dimensions", str(model.embedding_dimensions or "")),
            ("capabilities", ", ".join(capabilities)),
            ("size on disk", size(model.size_bytes)),
            ("memory", memory(model.memory_required_bytes) if model.memory_required_bytes else ""),
            ("source", enum_word(model_pb2.ModelSource.DESCRIPTOR, model.source).replace("_", "-")),
            ("hub id", model.huggingface_id),
            ("revision", model.revision),
            ("path", model.path),
            ("installed", moment(model, "create_time")),
            ("last used", moment(model, "last_use_time") or "never"),
            ("requests", str(model.use_count)),
            ("pinned", "yes" if model.pinned else ""),
            ("last error", model.error_message),
            *(("note", note) for note in model.notes),
        ]
    )


def rm(connection: Connection, name: str, keep_files: bool, force: bool) -> None:
    """Remove from the registry, with the files that the server downloaded."""
    with connection.open() as client:
        deleted = client.delete(name, remove_files=not keep_files, force=force)
    if deleted.removed_files:
        print(f"Removed {deleted.name} and its files ({size(deleted.freed_bytes) or '0 B'} freed)")
    else:
        print(f"Removed {deleted.name}; its files stay")
        if deleted.kept_reason:
            print(deleted.kept_reason, file=sys.stderr)
