"""Revisions that updates have replaced: their files go as soon as nobody uses them.

A mark in the cache says which they are, so that a crash, or the end of a server whose workers still use one, loses
none: the next start goes on with them.
"""

import asyncio
import logging
from collections.abc import Callable, Collection
from pathlib import Path

from mlxgui_grpc.catalog import Catalog
from mlxgui_grpc.errors import ModelServerError
from mlxgui_grpc.file_claims import FileClaims
from mlxgui_grpc.hub import Hub
from mlxgui_grpc.hub_cache import RepositoryFolder, cache_dir_of, model_id_of, superseded_snapshots

log = logging.getLogger(__name__)

SWEEP_SECONDS = 60.0
"""How often it is looked whether a revision that was in use is so still."""


class SupersededRevisions:
    """The replaced revisions that are still on the disk. Use on the event loop only."""

    def __init__(
        self, catalog: Catalog, hub: Hub, claims: FileClaims, is_in_memory: Callable[[Path], bool]
    ) -> None:
        """`is_in_memory`: whether a worker has, or is about to read, the files of this folder."""
        self._catalog = catalog
        self._hub = hub
        self._claims = claims
        self._is_in_memory = is_in_memory
        self._waiting: set[Path] = set()
        self._lock = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._sweeping: asyncio.Task[None] | None = None

    async def recover(self, caches: Collection[Path]) -> None:
        """Take over what an earlier server left in these caches, and remove it; failures are logged."""
        for cache in caches:
            try:
                self._waiting |= set(await asyncio.to_thread(superseded_snapshots, cache))
            except OSError as error:
                log.warning("replaced revisions in %s stay for now: %s", cache, error)
        await self.sweep()

    async def add(self, path: Path) -> None:
        """Mark a revision's folder, which we downloaded, so that `sweep` removes it."""
        await asyncio.to_thread(_mark, path)
        self._waiting.add(path)

    async def sweep(self) -> None:
        """Remove what nobody uses. What is used is looked at again after a while; failures are logged."""
        async with self._lock:
            for path in sorted(self._waiting):
                try:
                    async with self._claims.removing:
                        await self._look_at(path)
                except OSError as error:
                    log.warning("revision %s stays for now: %s", path, error)
        if self._waiting and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep_again)

    async def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.wait([self._sweeping])

    async def _look_at(self, path: Path) -> None:
        if any(model.path == path for model in self._catalog.models()):
            # An update back, or the crash of one: it replaces nothing.
            await asyncio.to_thread(_unmark, path)
            self._waiting.discard(path)
        elif not self._claims.names(path) and not self._is_in_memory(path):
            await self._remove(path)

    async def _remove(self, path: Path) -> None:
        model_id = model_id_of(path)
        try:
            freed_bytes = await asyncio.to_thread(self._hub.delete_revision, model_id, path.name, path)
        except ModelServerError as error:
            log.warning("revision %s of %s stays for now: %s", path.name[:12], model_id, error.message)
            return
        await asyncio.to_thread(_unmark, path)
        self._waiting.discard(path)
        log.info("removed revision %s of %s, %d bytes", path.name[:12], model_id, freed_bytes)

    def _sweep_again(self) -> None:
        self._timer = None
        self._sweeping = asyncio.get_running_loop().create_task(self.sweep())


def _mark(path: Path) -> None:
    mark = _mark_of(path)
    mark.parent.mkdir(exist_ok=True)
    mark.touch()


def _unmark(path: Path) -> None:
    _mark_of(path).unlink(missing_ok=True)


def _mark_of(path: Path) -> Path:
    cache = cache_dir_of(path)
    assert cache is not None, path
    return RepositoryFolder(cache, model_id_of(path)).mark_of_superseded(path.name)
