"""What lies in the hub's cache and could be installed without a download."""

import asyncio
import contextlib
from dataclasses import replace

from mlxgui_grpc import checkpoint, naming
from mlxgui_grpc.catalog import Catalog, InstalledModel, Origin
from mlxgui_grpc.errors import ModelServerError
from mlxgui_grpc.hub import Hub
from mlxgui_grpc.model_facts import described


async def available_models(catalog: Catalog, hub: Hub) -> list[InstalledModel]:
    """Models in the cache that are not installed, by hub id, under the names they would get; their id is 0.

    Reads the disk, off the event loop.
    """
    taken = {model.name.casefold() for model in catalog.models()}
    installed = {model.huggingface_id.casefold() for model in catalog.models()}
    models = []
    for model in await asyncio.to_thread(_read_cache, hub, installed):
        name = model.name
        if name.casefold() in taken:
            name = naming.suggested_name(name, model.author)
        taken.add(name.casefold())
        models.append(replace(model, name=name))
    return models


def _read_cache(hub: Hub, installed: set[str]) -> list[InstalledModel]:
    models = []
    for snapshot in hub.cached_models():
        if snapshot.model_id.casefold() in installed:
            continue
        with contextlib.suppress(ModelServerError, OSError):  # What could not be installed is not available.
            models.append(
                InstalledModel(
                    name=naming.default_name(snapshot.model_id),
                    origin=Origin.HUB,
                    path=snapshot.path,
                    huggingface_id=snapshot.model_id,
                    revision=snapshot.revision,
                    **described(checkpoint.inspect(snapshot.path)),
                )
            )
    return models
