"""Who is in memory: loads models into workers, shares a load among all who wait for it, keeps standbys warm."""

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
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
    ModelNotFoundError,
    ModelNotLoadedError,
    ModelServerError,
    OperationCancelledError,
    ServerDrainingError,
)

log = logging.getLogger(__name__)

LIGHT_WORKER_SECONDS = 10.0
"""How long a worker that only counts tokens stays after its last use."""


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


@dataclass(eq=False, slots=True)
class _Light:
    """A worker that has a tokenizer only."""

    model_id: int
    worker: WorkerProcess
    context_length: int
    use_count: int = 0
    timer: asyncio.TimerHandle | None = None


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
        self._removing: set[int] = set()
        self._light: _Light | None = None
        self._light_lock = asyncio.Lock()
        self.versions: dict[str, str] = {}
        """Versions of the engine's packages, as the first worker reported them."""

    def start(self) -> None:
        """Begin to warm the standbys."""
        self._standby.fill()

    async def close(self) -> None:
        """End every worker; requests that still run end with ServerDrainingError."""
        self._is_closed = True
        residents = list(self._residents.values())
        if self._light is not None:
            self._light.worker.kill()
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

        A light worker loads the tokenizer only, is shared, and ends some seconds after its last use.
        """
        resident = self._residents.get(model.name)
        if resident is not None and resident.state == "loaded":
            async with self.use(model) as lease:
                assert lease.resident.loaded is not None
                yield lease.worker, lease.resident.loaded.context_length
            return
        light = await self._light_worker(model)
        light.use_count += 1
        try:
            yield light.worker, light.context_length
        finally:
            light.use_count -= 1
            if light.use_count == 0:
                if light is not self._light:
                    await light.worker.stop()
                else:
                    loop = asyncio.get_running_loop()
                    light.timer = loop.call_later(LIGHT_WORKER_SECONDS, self._retire_light)

    async def _light_worker(self, model: InstalledModel) -> "_Light":
        """The one light worker, for this model: at most one is started at a time."""
        async with self._light_lock:
            light = self._light
            if light is not None and light.timer is not None:
                light.timer.cancel()
                light.timer = None
            if light is not None and light.model_id == model.id and light.worker.is_alive:
                return light
            if light is not None:
                self._light = None
                if light.use_count == 0:
                    await light.worker.stop()
            worker = await self._standby.take()
            try:
                async with self._prepared(model) as view:
                    loaded = await worker.load(model.name, view, tokenizer_only=True)
            except BaseException:
                worker.kill()
                raise
            self._light = _Light(model.id, worker, loaded.context_length)
            self._standby.fill()
            return self._light

    def _retire_light(self) -> None:
        if self._light is not None and self._light.use_count == 0:
            self._light.worker.kill()
            self._light = None

    @contextlib.contextmanager
    def removing(self, model: InstalledModel) -> Iterator[None]:
        """While the block runs nobody loads the model: it is on its way out."""
        self._removing.add(model.id)
        try:
            yield
        finally:
            self._removing.discard(model.id)

    async def load(self, model: InstalledModel, *, for_request: bool = False) -> Resident:
        """Load a model, or wait for the load that is under way; raises OperationCancelledError when that is
        cancelled. A wait `for_request` counts as a use of the model."""
        while True:
            if self._is_closed:
                raise ServerDrainingError("The server is stopping")
            if model.id in self._removing:
                raise ModelNotFoundError.of(model.name)
            resident = self._residents.get(model.name)
            if resident is not None and resident.model.id != model.id:
                await self._discard(resident)  # Of a model that had the name before.
                continue
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
        try:
            async with self._prepared(model) as view:
                await self._load_into_worker(resident, view)
        except asyncio.CancelledError:
            await self._give_up(resident)
            raise
        except Exception as error:
            await self._give_up(resident)
            if not isinstance(error, ModelServerError):
                log.exception("loading %s failed", model.name)
            message = error.message if isinstance(error, ModelServerError) else str(error)
            if self._catalog.find(model.name) is not None:
                await self._catalog.update(model.name, error_message=message)
            if isinstance(error, ModelServerError) and not isinstance(
                error, EngineDeadError | ModelLoadFailedError
            ):
                raise
            raise ModelLoadFailedError(
                f"Model '{model.name}' could not be loaded: {message}", model=model.name
            ) from error
        if model.error_message:
            await self._catalog.update(model.name, error_message="")
        self._on_change(model.name, "loaded")
        self._standby.fill()
        assert resident.loaded is not None
        log.info("loaded %s in %.2f s", model.name, resident.loaded.load_seconds)

    async def _load_into_worker(self, resident: Resident, view: Path) -> None:
        worker = resident.worker = await self._standby.take()
        try:
            ready = await worker.ready()
        except EngineDeadError:  # A standby that died on its way here is nobody's fault.
            worker = resident.worker = await self._standby.take()
            ready = await worker.ready()
        self.versions = ready.versions
        resident.loaded = await worker.load(resident.model.name, view)
        if not worker.is_alive:
            raise ModelLoadFailedError("its worker ended")
        resident.state = "loaded"
        worker.on_exit = lambda: self._forget(resident)

    async def _give_up(self, resident: Resident) -> None:
        self._forget(resident)
        if resident.worker is not None:
            await resident.worker.stop()

    @contextlib.asynccontextmanager
    async def _prepared(self, model: InstalledModel) -> AsyncIterator[Path]:
        """A view of the model, checked now and before every load, that lasts as long as the loader reads it."""
        view = self._view_directory / f"{model.id}-{next(self._view_numbers)}"

        def prepare() -> None:
            checkpoint.require_loadable(checkpoint.inspect(model.path))
            checkpoint.make_view(model.path, view)

        preparation = asyncio.ensure_future(asyncio.to_thread(prepare))
        try:
            await asyncio.shield(preparation)
            yield view
        finally:
            # A thread cannot be cancelled: the view goes when it is done with it.
            preparation.add_done_callback(lambda done: _clean_up(done, view))

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


def _clean_up(preparation: "asyncio.Future[None]", view: Path) -> None:
    preparation.exception()  # seen: whoever waited for it has it
    checkpoint.remove_view(view)


def _consume(task: "asyncio.Task[None]") -> None:
    """Log a failure that nobody may be waiting for."""
    if not task.cancelled() and (error := task.exception()) and not isinstance(error, ModelServerError):
        log.error("background task failed", exc_info=error)
