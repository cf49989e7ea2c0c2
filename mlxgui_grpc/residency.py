"""Who is in memory: loads models into workers, shares a load among all who wait for it, keeps standbys warm."""

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from mlxgui_grpc import checkpoint
from mlxgui_grpc.catalog import Catalog, InstalledModel
from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.supervisor import WorkerConfig, WorkerProcess
from mlxgui_grpc.errors import (
    EngineDeadError,
    ModelInUseError,
    ModelLoadFailedError,
    ModelNotLoadedError,
    ModelServerError,
    OperationCancelledError,
    ServerDrainingError,
)

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Resident:
    """A model in memory, or on its way there."""

    model: InstalledModel
    state: str = "loading"  # loading, loaded, unloading
    worker: WorkerProcess | None = None
    loaded: frames.Loaded | None = None
    use_count: int = 0
    """Requests that hold it now."""
    waiting_count: int = 0
    """Requests that wait for its load."""
    load: asyncio.Task[None] | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """A loaded model, held for one request."""

    resident: Resident
    worker: WorkerProcess
    load_seconds: float
    """What this request waited for the load; 0 when the model was there."""


class Residency:
    """The models in memory. Use on the event loop only."""

    def __init__(
        self,
        catalog: Catalog,
        workers: WorkerConfig,
        view_directory: Path,
        standby_count: int,
        on_change: Callable[[str, str], None] = lambda name, state: None,
    ) -> None:
        """`on_change` hears the name and new state (loaded, unloaded) of models."""
        self._catalog = catalog
        self._workers = workers
        self._view_directory = view_directory
        self._residents: dict[str, Resident] = {}
        self._standby = _Standby(workers, standby_count)
        self._on_change = on_change
        self._is_closed = False
        self._view_numbers = itertools.count()
        self.versions: dict[str, str] = {}
        """Versions of the engine's packages, as the first worker reported them."""

    def start(self) -> None:
        """Begin to warm the standbys."""
        self._standby.fill()

    async def close(self) -> None:
        """End every worker; requests that still run end with ServerDrainingError."""
        self._is_closed = True
        residents = list(self._residents.values())
        cause = ServerDrainingError("The server stopped before the request was done")
        await asyncio.gather(
            self._standby.close(), *(self._discard(resident, cause) for resident in residents)
        )

    # What is where.

    def find(self, name: str) -> Resident | None:
        """The resident of an installed name, in whatever state."""
        return self._residents.get(name)

    def list(self) -> list[Resident]:
        """All residents, the oldest first."""
        return list(self._residents.values())

    def is_loaded(self, name: str) -> bool:
        """Ready to serve."""
        resident = self._residents.get(name)
        return resident is not None and resident.state == "loaded"

    # Use.

    @contextlib.asynccontextmanager
    async def use(self, model: InstalledModel, *, require_loaded: bool = False) -> AsyncIterator[Lease]:
        """Hold a model for a request, loading it first if need be; one load serves all who wait for it.

        Leaving the wait does not stop the load. Raises what the load raises, or ModelNotLoadedError.
        """
        started = time.monotonic()
        if require_loaded and not self.is_loaded(model.name):
            raise ModelNotLoadedError.of(model.name)
        was_loaded = self.is_loaded(model.name)
        resident = await self.load(model, for_request=True)
        assert resident.worker is not None
        resident.use_count += 1
        try:
            yield Lease(resident, resident.worker, 0.0 if was_loaded else time.monotonic() - started)
        finally:
            resident.use_count -= 1
            self._catalog.note_use(model.name)
            self._standby.fill()

    @contextlib.asynccontextmanager
    async def use_tokenizer(self, model: InstalledModel) -> AsyncIterator[tuple[WorkerProcess, int]]:
        """Hold a worker that can count tokens, and the context length: the loaded model's, else a light one.

        A light worker loads the tokenizer only and ends with the block.
        """
        resident = self._residents.get(model.name)
        if resident is not None and resident.state == "loaded":
            async with self.use(model) as lease:
                assert lease.resident.loaded is not None
                yield lease.worker, lease.resident.loaded.context_length
            return
        view = self._view_directory / f"{model.id}-tokens-{next(self._view_numbers)}"
        await asyncio.to_thread(self._prepare, model, view)
        worker = await self._standby.take()
        try:
            loaded = await worker.load(model.name, view, tokenizer_only=True)
            yield worker, loaded.context_length
        finally:
            await worker.stop()
            checkpoint.remove_view(view)
            self._standby.fill()

    async def load(self, model: InstalledModel, *, for_request: bool = False) -> Resident:
        """Load a model, or wait for the load that is under way; raises OperationCancelledError when that is
        cancelled. A wait `for_request` counts as a use of the model."""
        while True:
            if self._is_closed:
                raise ServerDrainingError("The server is stopping")
            resident = self._residents.get(model.name)
            if (
                resident is not None
                and resident.worker is not None
                and (
                    resident.state == "unloading"
                    or (resident.state == "loaded" and not resident.worker.is_alive)
                )
            ):
                await resident.worker.exited.wait()
                self._forget(resident)
                continue
            if resident is None:
                resident = Resident(model)
                self._residents[model.name] = resident
                resident.load = asyncio.get_running_loop().create_task(self._load(resident))
                resident.load.add_done_callback(_consume)
            assert resident.load is not None
            resident.waiting_count += for_request
            try:
                await asyncio.shield(resident.load)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                if self._is_closed:
                    raise ServerDrainingError("The server is stopping") from None
                raise OperationCancelledError(
                    f"The load of '{model.name}' was cancelled", model=model.name
                ) from None
            finally:
                resident.waiting_count -= for_request
            return resident

    async def unload(self, name: str, *, force: bool) -> bool:
        """Take a model out of memory; False when it was not there.

        Raises ModelInUseError when requests hold it, unless `force` ends them.
        """
        resident = self._residents.get(name)
        if resident is None:
            return False
        if (count := resident.use_count + resident.waiting_count) and not force:
            raise ModelInUseError(
                f"Model '{name}' has {count} requests running; wait for them, or force", model=name
            )
        cause = OperationCancelledError(f"Model '{name}' was unloaded while the request ran", model=name)
        await self._discard(resident, cause)
        return True

    # Inside.

    async def _load(self, resident: Resident) -> None:
        model = resident.model
        worker: WorkerProcess | None = None
        try:
            view = self._view_directory / str(model.id)
            await asyncio.to_thread(self._prepare, model, view)
            worker = resident.worker = await self._standby.take()
            ready = await worker.ready()
            self.versions = ready.versions
            resident.loaded = await worker.load(model.name, view)
            resident.state = "loaded"
            worker.on_exit = lambda: self._forget(resident)
            if not worker.is_alive:
                raise ModelLoadFailedError(f"Model '{model.name}' could not be loaded: its worker ended")
        except asyncio.CancelledError:
            self._forget(resident)
            if worker is not None:
                await worker.stop()
            raise
        except ModelServerError as error:
            self._forget(resident)
            if worker is not None:
                await worker.stop()
            await self._catalog.update(model.name, error_message=error.message)
            if isinstance(error, EngineDeadError):
                raise ModelLoadFailedError(error.message, model=model.name) from error
            if isinstance(error, ModelLoadFailedError):
                raise ModelLoadFailedError(
                    f"Model '{model.name}' could not be loaded: {error.message}", model=model.name
                ) from error
            raise
        if model.error_message:
            await self._catalog.update(model.name, error_message="")
        self._on_change(model.name, "loaded")
        self._standby.fill()
        log.info("loaded %s in %.2f s", model.name, resident.loaded.load_seconds)

    def _prepare(self, model: InstalledModel, view: Path) -> None:
        """Check the directory, now and before every load, and build the view the loader will see. Blocks."""
        checkpoint.require_loadable(checkpoint.inspect(model.path))
        checkpoint.make_view(model.path, view)

    async def _discard(self, resident: Resident, cause: ModelServerError | None = None) -> None:
        if resident.load is not None and not resident.load.done():
            resident.load.cancel()
            await asyncio.wait([resident.load])
        if resident.worker is not None:
            resident.state = "unloading"
            self._on_change(resident.model.name, "unloaded")
            await resident.worker.stop(cause)
        self._forget(resident)

    def _forget(self, resident: Resident) -> None:
        name = resident.model.name
        if self._residents.get(name) is resident:
            del self._residents[name]
            if resident.state == "loaded":
                self._on_change(name, "unloaded")


class _Standby:
    """Workers that have done their imports and wait for a model."""

    def __init__(self, config: WorkerConfig, count: int) -> None:
        self._config = config
        self._count = count
        self._workers: list[WorkerProcess] = []
        self._filling: asyncio.Task[None] | None = None

    def fill(self) -> None:
        """Start what is missing, in the background and below everything else in priority."""
        self._workers = [worker for worker in self._workers if worker.is_alive]
        missing = len(self._workers) < self._count
        if missing and (self._filling is None or self._filling.done()):
            self._filling = asyncio.get_running_loop().create_task(self._fill())
            self._filling.add_done_callback(_consume)

    async def take(self) -> WorkerProcess:
        """A warm worker, a warming one, or a new one."""
        while self._workers:
            best = max(self._workers, key=lambda worker: worker.is_ready)
            self._workers.remove(best)
            if best.is_alive:
                return best
        return await WorkerProcess.spawn(self._config, os.environ)

    async def close(self) -> None:
        """End them all."""
        self._count = 0
        if self._filling is not None:
            self._filling.cancel()
            await asyncio.wait([self._filling])
        for worker in self._workers:
            worker.kill()  # It may be deep in its imports, where it does not hear that it should end.
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    async def _fill(self) -> None:
        while len(self._workers) < self._count:
            worker = await WorkerProcess.spawn(self._config, os.environ, idle=True)
            self._workers.append(worker)
            await worker.ready()


def _consume(task: "asyncio.Task[None]") -> None:
    """Log a failure that nobody may be waiting for."""
    if not task.cancelled() and (error := task.exception()) and not isinstance(error, ModelServerError):
        log.error("background task failed", exc_info=error)
