"""Installs models, from the hub or from a directory, updates and removes them."""

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxgui_grpc import checkpoint, naming
from mlxgui_grpc.available_models import available_models
from mlxgui_grpc.catalog import Catalog, InstalledModel, Origin
from mlxgui_grpc.errors import (
    InvalidRequestError,
    ModelExistsError,
    ModelIncompatibleError,
    ModelInUseError,
    ModelServerError,
    ModelUnsafeError,
    PermissionDeniedError,
)
from mlxgui_grpc.file_claims import FileClaims
from mlxgui_grpc.hub import DownloadProgress, Hub, Snapshot, check_model_id, check_revision
from mlxgui_grpc.hub_cache import cache_dir_of, sweep_partials
from mlxgui_grpc.joining import joinable
from mlxgui_grpc.model_facts import MAIN, branch_of, described
from mlxgui_grpc.operations import InstallProgress, Operation, Operations
from mlxgui_grpc.residency import Residency
from mlxgui_grpc.superseded import SupersededRevisions

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Removal:
    """What deleting a model did to its files."""

    name: str
    removed_files: bool
    freed_bytes: int
    kept_reason: str


class Installer:
    """Everything that adds or removes models."""

    def __init__(
        self,
        catalog: Catalog,
        operations: Operations,
        residency: Residency,
        hub: Hub,
        model_roots: tuple[Path, ...],
        on_change: Callable[[str, str], None] = lambda name, state: None,
    ) -> None:
        """`model_roots` are the folders that clients who are not on the unix socket may install from; `on_change`
        hears the name and new state (unloaded: it is installed; deleted) of models."""
        self._on_change = on_change
        self._catalog = catalog
        self._operations = operations
        self._residency = residency
        self._hub = hub
        self._model_roots = model_roots
        self._registering = asyncio.Lock()
        self._claims = FileClaims()
        self._superseded = SupersededRevisions(catalog, hub, self._claims, self._is_in_memory)
        self._recovery: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Remove, in the background, what an earlier server has left: revisions that updates have replaced, and in
        caches other than the present one leftovers of downloads."""
        self._recovery = asyncio.get_running_loop().create_task(self._recover())

    async def close(self) -> None:
        """End what runs in the background."""
        await self._superseded.close()
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.wait([self._recovery])

    async def install_from_hub(
        self, model_id: str, name: str, revision: str, *, force: bool = False, request_id: str = ""
    ) -> Operation:
        """Start an install, or join the one that runs for the same name and source."""
        check_model_id(model_id)
        if revision:
            check_revision(revision)
        name = naming.check_name(name) if name else naming.default_name(model_id)
        request = {"model_id": model_id, "revision": revision, "force": force, "request_id": request_id}
        if joined := joinable(self._operations, "install", name, request):
            return joined
        self._refuse_foreign(name, model_id, force=force)

        async def action(operation: Operation) -> InstalledModel:
            return await self._install_from_hub(operation, model_id, name, revision, force=force)

        return await self._operations.start("install", name, InstallProgress(), action, request)

    async def install_directory(
        self, directory: str, name: str, *, trusted: bool, force: bool = False, request_id: str = ""
    ) -> Operation:
        """Register a directory in place. `trusted` callers (the unix socket) may name any."""
        path = Path(directory)
        if not path.is_absolute():
            raise InvalidRequestError("local_directory must be an absolute path", field="local_directory")
        try:
            is_allowed, is_directory = await asyncio.to_thread(self._look_at, path)
        except (OSError, ValueError, RuntimeError) as error:  # Too long, a NUL in it, links in a circle.
            raise InvalidRequestError(
                f"local_directory cannot be read: {error}", field="local_directory"
            ) from error
        if not trusted and not is_allowed:
            raise PermissionDeniedError(
                "Local directories can be installed with the CLI, over the unix socket, or below a folder named by "
                "the option model_roots",
                field="local_directory",
            )
        if not is_directory:
            raise InvalidRequestError(f"{directory} is not a directory", field="local_directory")
        name = naming.check_name(name) if name else naming.default_name(str(path))
        request = {"local_directory": str(path), "force": force, "request_id": request_id}
        if joined := joinable(self._operations, "install", name, request):
            return joined
        existing = self._catalog.find(name)
        if existing is not None and existing.path != path and not force:
            raise self._taken(existing, "")

        async def action(operation: Operation) -> InstalledModel:
            self._progress(operation).phase = "verifying"
            operation.changed()
            return await self._register(path, name, Origin.DIRECTORY, operation.warnings)

        return await self._operations.start("install", name, InstallProgress(), action, request)

    async def update(self, name: str, revision: str, *, request_id: str = "") -> Operation:
        """Start to install a newer revision (default: the branch that was installed, as it is now), or join.

        Raises ModelIncompatibleError for a model that is not from the hub, ModelInUseError while it is being
        installed or updated to another revision.
        """
        model = self._catalog.get(name)
        if model.origin is not Origin.HUB:
            raise ModelIncompatibleError(
                f"Model '{model.name}' does not come from the hub: install it again from where its newer files are",
                model=model.name,
            )
        if revision:
            check_revision(revision)
        if running := self._operations.running("install", model.name):
            raise ModelInUseError(
                f"Model '{model.name}' is being installed; wait for operation {running.id}", model=model.name
            )
        request = {"model_id": model.huggingface_id, "revision": revision, "request_id": request_id}
        if joined := joinable(self._operations, "update", model.name, request):
            return joined

        async def action(operation: Operation) -> InstalledModel:
            return await self._update(operation, model, revision or branch_of(model))

        return await self._operations.start("update", model.name, InstallProgress(), action, request)

    async def available(self) -> list[InstalledModel]:
        """Models in the hub's cache that are not installed; see `available_models`."""
        return await available_models(self._catalog, self._hub)

    async def register_demo(self, path: Path, name: str) -> None:
        """Register the built-in model; follows a program that moved."""
        existing = self._catalog.find(name)
        if existing is None or (existing.origin is Origin.DEMO and existing.path != path):
            await self._register(path, name, Origin.DEMO, [])

    async def remove(self, name: str, *, remove_files: bool, force: bool) -> Removal:
        """Unload a model, forget it, and remove its files where they are ours to remove.

        With `force` an install or update of it that runs is cancelled. Raises ModelInUseError when one runs, or
        requests do, and `force` is not set; ModelNotFoundError.
        """
        for running in self._changes_of(name):
            if not force:
                words = "installed" if running.kind == "install" else "updated"
                raise ModelInUseError(
                    f"Model '{running.model}' is being {words}; cancel operation {running.id} first",
                    model=running.model,
                    operation=running.id,
                )
            await self._operations.cancel(running)
            if self._catalog.find(name) is None:
                return Removal(
                    running.model,
                    removed_files=False,
                    freed_bytes=0,
                    kept_reason="its installation was cancelled; what it had downloaded stays for a week, for a repeat",
                )
        model = self._catalog.get(name)
        with self._residency.removing(model):  # A request that comes now must not load it again.
            await self._residency.unload(model.name, force=force)
            async with self._claims.removing:
                kept_reason = self._kept_reason(model) if remove_files else ""
                # The entry first: a crash between the two leaves files that a repeated install finds, never an entry
                # without files.
                await self._catalog.remove(model.name)
                self._on_change(model.name, "deleted")
                removes_files = remove_files and not kept_reason
                freed = 0
                if removes_files:
                    try:
                        freed = await asyncio.to_thread(
                            self._hub.delete_revision, model.huggingface_id, model.revision, model.path
                        )
                    except ModelServerError as error:  # The model is gone all the same.
                        removes_files, kept_reason = False, error.message
        await self._superseded.sweep()
        log.info("deleted %s (%s)", model.name, kept_reason or f"{freed} bytes freed")
        return Removal(model.name, removes_files, freed, kept_reason)

    # Inside.

    async def _recover(self) -> None:
        paths = [model.path for model in self._catalog.models() if model.origin is Origin.HUB]
        earlier = {cache for path in paths if (cache := cache_dir_of(path))} - {self._hub.cache_dir}
        await self._superseded.recover([self._hub.cache_dir, *earlier])
        for cache in earlier:
            try:
                await asyncio.to_thread(sweep_partials, cache)
            except OSError as error:
                log.warning("leftovers in %s stay: %s", cache, error)

    def _look_at(self, path: Path) -> tuple[bool, bool]:
        """(below an allowed root, a directory)."""
        real = path.resolve()
        return any(real.is_relative_to(root.resolve()) for root in self._model_roots), path.is_dir()

    def _changes_of(self, name: str) -> list[Operation]:
        """The installs and updates that run on the model of this name or hub id, which need not be installed yet."""
        model = self._catalog.find(name)
        key = (model.name if model else name).casefold()
        return [
            operation
            for operation in self._operations.list(include_done=False)
            if operation.kind in ("install", "update")
            and (
                operation.model.casefold() == key
                or (model is None and str(operation.request.get("model_id")).casefold() == key)
            )
        ]

    def _kept_reason(self, model: InstalledModel) -> str:
        """Why the files stay although they were to go; empty when they go."""
        if model.origin is not Origin.HUB:
            return "the files were not downloaded by this server"
        if not model.is_download:
            return "the files were in the Hugging Face cache before; remove them with `hf cache rm`"
        sharing = [
            other.name
            for other in self._catalog.models()
            if other.id != model.id and other.path == model.path
        ]
        sharing += self._claims.names(model.path)
        return f"model '{sharing[0]}' uses the same files" if sharing else ""

    def _refuse_foreign(self, name: str, model_id: str, *, force: bool) -> None:
        existing = self._catalog.find(name)
        if existing is not None and existing.huggingface_id.lower() != model_id.lower() and not force:
            raise self._taken(existing, model_id.partition("/")[0])

    def _taken(self, existing: InstalledModel, author: str) -> ModelExistsError:
        suggestion = naming.suggested_name(existing.name, author)
        source = existing.huggingface_id or str(existing.path)
        return ModelExistsError(
            f"A model named '{existing.name}' is installed from {source}; choose another name, such as "
            f"'{suggestion}'",
            field="name",
            model=existing.name,
            suggestion=suggestion,
        )

    async def _install_from_hub(
        self, operation: Operation, model_id: str, name: str, revision: str, *, force: bool
    ) -> InstalledModel:
        existing = self._catalog.find(name)
        is_there = existing is not None and existing.huggingface_id.lower() == model_id.lower()
        cache_dir = await asyncio.to_thread(_cache_dir, existing) if existing and is_there else None

        async def find() -> Snapshot:
            # What is in the cache already needs no hub: an installed program works offline.
            if not force:
                cached = await asyncio.to_thread(self._hub.find_cached, model_id, revision or None, cache_dir)
                if cached is not None:
                    return cached
            return await self._hub.download(
                model_id, revision or None, self._reporter(operation), force=force, cache_dir=cache_dir
            )

        async with self._claims.found(name, find) as snapshot:
            model = await self._register_snapshot(operation, snapshot, name, revision or MAIN)
        await self._superseded.sweep()
        return model

    async def _update(self, operation: Operation, model: InstalledModel, branch: str) -> InstalledModel:
        cache_dir = await asyncio.to_thread(_cache_dir, model)

        async def find() -> Snapshot:
            return await self._hub.download(
                model.huggingface_id, branch, self._reporter(operation), cache_dir=cache_dir
            )

        try:
            async with self._claims.found(model.name, find) as snapshot:
                # It may have been deleted meanwhile, and must not come back.
                current = self._catalog.get(model.name)
                if snapshot.path == current.path:
                    operation.warnings.append(
                        f"'{current.name}' is up to date: {branch} is revision {snapshot.revision[:12]}, as installed"
                    )
                    return await self._remember_branch(current, branch)
                try:
                    return await self._register_snapshot(operation, snapshot, current.name, branch)
                except (ModelIncompatibleError, ModelUnsafeError):
                    if snapshot.is_ours:  # Nobody will use these files.
                        await self._superseded.add(snapshot.path)
                    raise
        finally:
            await self._superseded.sweep()

    async def _remember_branch(self, model: InstalledModel, branch: str) -> InstalledModel:
        """Later updates follow the branch that was asked for last."""
        if branch_of(model) == branch:
            return model
        metadata = json.dumps({**json.loads(model.metadata), "branch": branch})
        return await self._catalog.update(model.name, metadata=metadata)

    def _reporter(self, operation: Operation) -> Callable[[DownloadProgress], None]:
        """What a download tells, as the operation's progress."""
        progress = self._progress(operation)

        def report(now: DownloadProgress) -> None:
            progress.phase = now.phase
            progress.done_bytes, progress.total_bytes = now.done_bytes, now.total_bytes
            progress.done_file_count, progress.total_file_count = now.done_file_count, now.total_file_count
            progress.current_file = now.current_file
            progress.bytes_per_second, progress.remaining_seconds = now.bytes_per_second, now.eta_seconds
            operation.changed()

        return report

    async def _register_snapshot(
        self, operation: Operation, snapshot: Snapshot, name: str, branch: str
    ) -> InstalledModel:
        self._progress(operation).phase = "registering"
        operation.changed()
        model = await self._register(
            snapshot.path,
            name,
            Origin.HUB,
            operation.warnings,
            huggingface_id=snapshot.model_id,
            revision=snapshot.revision,
            is_download=snapshot.is_ours,
            branch=branch,
        )
        for resident in self._residency.residents():
            if resident.model.id == model.id and resident.model.path != model.path:
                operation.warnings.append(
                    f"'{model.name}' is in memory and goes on with revision {resident.model.revision[:12]} until it "
                    "is next loaded"
                )
        return model

    def _is_in_memory(self, path: Path) -> bool:
        return any(resident.model.path == path for resident in self._residency.residents())

    async def _register(
        self,
        path: Path,
        name: str,
        origin: Origin,
        warnings: list[str],
        *,
        huggingface_id: str = "",
        revision: str = "",
        is_download: bool = False,
        branch: str = "",
    ) -> InstalledModel:
        """Enter a model into the registry, or give the entry of that name these files; `warnings` is told why it
        cannot be loaded, if so."""
        found = await asyncio.to_thread(checkpoint.inspect, path)
        try:
            checkpoint.require_loadable(found)
        except ModelIncompatibleError as error:
            warnings.append(f"'{name}' is installed, but cannot be loaded: {error.message}")
        values: dict[str, Any] = {
            "origin": origin,
            "path": path,
            "huggingface_id": huggingface_id,
            "revision": revision,
            "is_download": is_download,
            "error_message": "",
            **described(found, branch),
        }
        # Nobody sweeps between the mark on the old files and the entry that leaves them.
        async with self._registering, self._claims.removing:
            if existing := self._catalog.find(name):
                if existing.path != path:
                    if existing.huggingface_id.lower() == huggingface_id.lower() != "":
                        # The mark first: a crash in between leaves a mark on files that are in use, which the next
                        # start takes away, and never files that nobody knows.
                        if existing.is_download and cache_dir_of(existing.path):
                            await self._superseded.add(existing.path)
                    else:
                        await self._residency.unload(existing.name, force=True)
                return await self._catalog.update(existing.name, **values)
            model = await self._catalog.add(InstalledModel(name=name, **values))
        self._on_change(model.name, "unloaded")
        return model

    @staticmethod
    def _progress(operation: Operation) -> InstallProgress:
        assert isinstance(operation.progress, InstallProgress)
        return operation.progress


def _cache_dir(model: InstalledModel) -> Path | None:
    """The cache that an installed model is in, where it stays when new ones go elsewhere; None: it is not there."""
    return cache_dir_of(model.path) if model.path.is_dir() else None
