"""The commands about models: pull, ls, ps, show, load, unload, rm."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mlxgui.v1 import model_pb2
from mlxgui_grpc.cli import progress
from mlxgui_grpc.cli.connection import Connection
from mlxgui_grpc.cli.failures import EXIT_INTERRUPTED, EXIT_USAGE, CommandError
from mlxgui_grpc.cli.output import (
    enum_word,
    moment,
    print_json,
    print_pairs,
    print_table,
    size,
    to_json,
)
from mlxgui_grpc.errors import NotImplementedYetError

if TYPE_CHECKING:
    from mlxgui_grpc.client import Client

_IN_MEMORY = (
    model_pb2.MODEL_STATE_QUEUED,
    model_pb2.MODEL_STATE_LOADING,
    model_pb2.MODEL_STATE_LOADED,
    model_pb2.MODEL_STATE_UNLOADING,
)


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
    seen: list[model_pb2.Operation] = []
    try:
        return progress.follow(client.install(source, name, revision=revision, force=force), seen).success
    except KeyboardInterrupt:
        if seen and not seen[0].done:
            client.cancel_operation(seen[0].id)
        raise CommandError(
            f"Cancelled; what was downloaded is kept, and `mlxgui pull {source}` goes on from there",
            EXIT_INTERRUPTED,
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
        columns = ("NAME", "TYPE", "STATE", "SIZE", "CONTEXT", "BITS", "SOURCE", "LAST USED")
        print_table(columns, [_row(model) for model in models])


def _row(model: model_pb2.Model) -> tuple[str, ...]:
    return (
        model.name,
        enum_word(model_pb2.ModelType.DESCRIPTOR, model.type),
        enum_word(model_pb2.ModelState.DESCRIPTOR, model.state),
        size(model.size_bytes),
        str(model.context_length or ""),
        str(model.quantization_bits or ""),
        model.huggingface_id or enum_word(model_pb2.ModelSource.DESCRIPTOR, model.source).replace("_", "-"),
        moment(model, "last_use_time") or "never",
    )


def ps(connection: Connection, as_json: bool) -> None:
    """List the models that are in memory or on their way, and the loads that wait."""
    with connection.open() as client:
        try:
            snapshot = client.manager_status()
        except NotImplementedYetError:
            snapshot = snapshot_of(client.models())
    if as_json:
        print_json(to_json(snapshot))
        return
    if not snapshot.loaded_models and not snapshot.queue:
        print("No model is loaded: the first request loads one, or `mlxgui load NAME`")
        return
    rows = [
        (
            model.name,
            enum_word(model_pb2.ModelState.DESCRIPTOR, model.state),
            size(model.memory_bytes or model.estimated_memory_bytes),
            str(model.running_request_count),
            str(model.waiting_request_count),
            f"{model.tokens_per_second:.0f}",
            "pinned" if model.pinned else moment(model, "expire_time") or "",
            str(model.process_id or ""),
        )
        for model in snapshot.loaded_models
    ]
    rows += [
        (load.model, f"queued, place {load.position}", "", "", "", "", "", "") for load in snapshot.queue
    ]
    print_table(("NAME", "STATE", "MEMORY", "RUNNING", "WAITING", "TOKENS/S", "UNLOADS", "PID"), rows)


def snapshot_of(models: Iterable[model_pb2.Model]) -> model_pb2.ManagerSnapshot:
    """What the list of models says of the manager, for a server that does not answer more."""
    loaded = [
        model_pb2.LoadedModel(
            name=model.name,
            state=model.state,
            type=model.type,
            last_use_time=model.last_use_time if model.HasField("last_use_time") else None,
            estimated_memory_bytes=model.memory_required_bytes,
            pinned=model.pinned,
        )
        for model in models
        if model.state in _IN_MEMORY
    ]
    return model_pb2.ManagerSnapshot(loaded_models=loaded)


def show(connection: Connection, name: str, as_json: bool) -> None:
    """Everything about one model."""
    with connection.open() as client:
        model = client.model(name)
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
            ("memory", size(model.memory_required_bytes)),
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


def load(connection: Connection, name: str, keep_alive_seconds: float | None) -> None:
    """Load, showing how far it is. Interrupted, a load that has begun goes on: others may wait for it."""
    with connection.open() as client:
        model = progress.follow(client.load(name, keep_alive_seconds=keep_alive_seconds), []).success
    print(f"Loaded {model.name}")


def unload(connection: Connection, name: str, force: bool) -> None:
    """Remove from memory."""
    with connection.open() as client:
        model = client.unload(name, force=force)
    print(f"Unloaded {model.name}")


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
