"""The commands about the hub's catalogue: search, and show for a model that is not installed."""

from dataclasses import dataclass
from typing import cast

from mlxgui.v1 import model_pb2
from mlxgui_grpc.cli.connection import Connection
from mlxgui_grpc.cli.failures import EXIT_USAGE, CommandError
from mlxgui_grpc.cli.output import memory, moment, print_json, print_pairs, print_table, size, to_json
from mlxgui_grpc.client import CatalogKind, CatalogSort

COLUMNS = ("ID", "TYPE", "SIZE", "MEMORY", "DOWNLOADS", "LIKES", "UPDATED", "INSTALLED")


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user looks for."""

    query: str
    sort: str
    kind: str
    fits: bool
    """Only what fits the memory that the server's machine has available."""
    memory_gb: float | None
    """Only what fits so many GiB."""
    limit: int

    @property
    def max_memory_bytes(self) -> int | None:
        """As the contract says it: 0 is what the machine has available, None whatever the size."""
        if self.memory_gb is None:
            return 0 if self.fits else None
        if not 0 < self.memory_gb <= 2**20:
            raise CommandError(f"--memory must be a number of GB above 0, not {self.memory_gb:g}", EXIT_USAGE)
        return max(1, int(self.memory_gb * 2**30))


def search(connection: Connection, wish: Wish, as_json: bool) -> None:
    """List what the hub has."""
    max_memory_bytes = wish.max_memory_bytes
    with connection.open() as client:
        models = client.search(
            wish.query,
            # Checked by the client, whose sentence names the words there are.
            sort=cast(CatalogSort, wish.sort),
            kind=cast(CatalogKind, wish.kind),
            max_memory_bytes=max_memory_bytes,
            limit=wish.limit,
        )
    if as_json:
        print_json({"models": [to_json(model) for model in models]})
    elif models:
        print_table(COLUMNS, [row(model) for model in models])
    else:
        words = f" of '{wish.query}'" if wish.query else ""
        limit = "" if max_memory_bytes is None else ", within that memory"
        print(f"The hub has nothing{words} that MLX can run{limit}")


def row(model: model_pb2.CatalogModel) -> tuple[str, ...]:
    """The cells of COLUMNS; empty where the hub does not say."""
    return (
        model.id,
        model.model_type,
        size(model.size_bytes),
        memory(model.estimated_memory_bytes) if model.HasField("estimated_memory_bytes") else "",
        f"{model.download_count:,}",
        f"{model.like_count:,}",
        moment(model, "update_time"),
        model.installed_name,
    )


def categories(connection: Connection, as_json: bool) -> None:
    """List groups of models worth trying."""
    with connection.open() as client:
        groups = client.categories()
    if as_json:
        print_json({"categories": [to_json(group) for group in groups]})
        return
    for group in groups:
        print(group.title)
        for model_id in group.model_ids:
            print(f"  {model_id}")


def show(model: model_pb2.CatalogModel, as_json: bool) -> None:
    """Everything about one repository of the hub."""
    if as_json:
        print_json(to_json(model))
        return
    print_pairs(
        [
            ("hub id", model.id),
            ("type", model.model_type),
            ("description", model.description),
            ("task", model.pipeline_tag),
            ("library", model.library_name),
            ("size", size(model.size_bytes)),
            ("memory", memory(model.estimated_memory_bytes) if model.estimated_memory_bytes else ""),
            ("downloads", f"{model.download_count:,} in the last 30 days"),
            ("likes", f"{model.like_count:,}"),
            ("made", moment(model, "create_time")),
            ("changed", moment(model, "update_time")),
            ("tags", ", ".join(model.tags)),
            ("gated", "accept its licence on the hub, and set HF_TOKEN" if model.gated else ""),
            ("here", model.compatibility_message),
            ("for MLX", model.mlx_repo_id),
            ("installed", f"as {model.installed_name}" if model.installed_name else _way(model)),
        ]
    )


def _way(model: model_pb2.CatalogModel) -> str:
    """How to come by it."""
    if model.mlx_compatible:
        return f"no, `mlxgui pull {model.id}` installs it"
    return f"no, `mlxgui pull {model.mlx_repo_id}` installs a form for MLX" if model.mlx_repo_id else "no"
