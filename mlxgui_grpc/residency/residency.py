"""Who is in memory: holds models for requests, loads them when needed, and says what is there."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

from mlxgui_grpc import memory
from mlxgui_grpc.catalog import Catalog, InstalledModel
from mlxgui_grpc.engine.supervisor import WorkerConfig, WorkerProcess
from mlxgui_grpc.errors import (
    ModelInUseError,
    ModelNotFoundError,
    ModelNotLoadedError,
    ModelServerError,
    OperationCancelledError,
    QueueFullError,
    ServerDrainingError,
)
from mlxgui_grpc.operations import LoadProgress
from mlxgui_grpc.residency.budget import Budget, DeviceInfo
from mlxgui_grpc.residency.loader import Loader
from mlxgui_grpc.residency.residents import Lease, Limits, LoadWish, Resident
from mlxgui_grpc.residency.roster import Roster
from mlxgui_grpc.residency.snapshot import ModelStatus, QueuedLoad, Snapshot, status_of
from mlxgui_grpc.residency.standby import Standby
from mlxgui_grpc.residency.tokenizers import LightWorker
from mlxgui_grpc.residency.upkeep import Upkeep

log = logging.getLogger(__name__)


class Residency:
    """The models in memory. Use on the event loop only."""

    def __init__(
        self,
        catalog: Catalog,
        workers: WorkerConfig,
        view_directory: Path,
        limits: Limits,
        on_change: Callable[[str, str], None] = lambda name, state: None,
    ) -> None:
        """`on_change` hears the name and new state (loaded, unloaded) of models."""
        self._catalog = catalog
        self._roster = Roster(on_change)
        self.budget = Budget(self._roster, limits)
        """Memory: what there is, and what a load would take."""
        self._workers = replace(workers, memory_limit_bytes=lambda: self.budget.room().budget_bytes)
        self._standby = Standby(
            self._workers,
            limits.standby_count,
            self.budget.has_room_for_standby,
            self.budget.learn,
            self.budget.learn_failure,
        )
        self.budget.standby_bytes = lambda: self._standby.footprint_bytes
        self._upkeep = Upkeep(catalog, self._roster, self.budget, self._standby, self._reload)
        self._loader = Loader(
            catalog, self._roster, self.budget, self._standby, view_directory, self._upkeep.note_exit
        )
        self._light = LightWorker(
            self._standby, self._loader.prepared, lambda: self.budget.limits.context_limit
        )
        self._priorities: dict[int, int] = {}
        self._removing: set[int] = set()
        self._is_closed = False
        self.changes = self._roster.changes
        """Rings when a model, a load or a number of requests has changed."""

    def start(self) -> None:
        """Begin to warm the standbys and to look after the models."""
        self._standby.fill()
        self._upkeep.arm()

    async def close(self) -> None:
        """End every worker; requests that still run end with ServerDrainingError."""
        self._is_closed = True
        self._upkeep.close()
        self._light.close()
        cause = ServerDrainingError("The server stopped before the request was done")
        discards = [self._roster.discard(resident, cause) for resident in self.residents()]
        await asyncio.gather(self._standby.close(), *discards)
        self._roster.cancel_background()

    def configure(self, limits: Limits) -> None:
        """Apply other limits at once: running requests finish, idle models beyond a limit leave."""
        if limits.use_gpu != self.budget.limits.use_gpu:
            self.budget.device = None  # The next worker tells.
        self.budget.limits = limits
        self._workers = replace(
            self._workers,
            max_rows=limits.max_rows,
            max_waiting_rows=limits.max_waiting_rows,
            use_gpu=limits.use_gpu,
        )
        self._standby.configure(self._workers, limits.standby_count)
        self._upkeep.enforce_limits()
        self.budget.share_out()
        self._upkeep.arm()
        self.changes.notify()

    # What is where.

    def find(self, name: str) -> Resident | None:
        """The resident of an installed name, in whatever state."""
        return self._roster.find(name)

    def residents(self) -> list[Resident]:
        """All residents, the oldest first."""
        return self._roster.residents()

    def is_loaded(self, name: str) -> bool:
        """Ready to serve, and staying."""
        resident = self._roster.find(name)
        return resident is not None and resident.is_loaded and not resident.is_leaving

    def loaded_names(self) -> list[str]:
        """Models that are in memory or on their way there, the least recently used first."""
        residents = [one for one in self.residents() if one.state != "unloading"]
        return [one.name for one in sorted(residents, key=lambda one: one.idle_since)]

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the engine's packages, as a worker reported them."""
        return self.budget.versions

    @property
    def device(self) -> DeviceInfo | None:
        """What MLX runs on; None until a worker has told."""
        return self.budget.device

    @property
    def hardware_error(self) -> str:
        """Why no worker can run MLX on this machine; empty: one could, or none has tried."""
        return self.budget.hardware_error

    def snapshot(self) -> Snapshot:
        """Everything, at this moment."""
        limits = self.budget.limits
        return Snapshot(
            models=tuple(
                self.status(one.model) for one in sorted(self.residents(), key=lambda one: one.name)
            ),
            queue=tuple(
                QueuedLoad(ticket.model, ticket.priority, ticket.queue_time)
                for ticket in self._loader.queue.tickets()
            ),
            budget_bytes=self.budget.room().budget_bytes,
            machine_bytes=memory.read_machine_memory().total_bytes,
            max_models=limits.max_models,
            auto_unload=limits.auto_unload,
            idle_seconds=limits.idle_seconds,
            standby_count=self._standby.ready_count,
        )

    def status(self, model: InstalledModel) -> ModelStatus:
        """One installed model, in memory or not."""
        model = self._catalog.find(model.name) or model
        resident = self._roster.find(model.name)
        if resident is None or resident.model.id != model.id:
            return ModelStatus(
                name=model.name,
                state="failed" if model.error_message else "unloaded",
                type=model.type,
                last_use_time=model.last_use_time,
                estimated_memory_bytes=self.budget.estimate(model).required_bytes,
                is_pinned=model.pinned,
            )
        position = self._loader.queue.position(resident.ticket)
        expires_at = resident.expires_at(self.budget.limits)
        held_count = self._roster.held[model.name]
        return status_of(resident, model.last_use_time, position, held_count, expires_at)

    async def probe(self) -> None:
        """Find out what MLX runs on, if no worker has told yet: blocks for the seconds that one takes to start."""
        if self.budget.device is None and not self.budget.hardware_error and not self._is_closed:
            await self._standby.probe()

    # Use.

    @contextlib.asynccontextmanager
    async def use(
        self,
        model: InstalledModel,
        *,
        require_loaded: bool = False,
        priority: int = 0,
        keep_alive_seconds: float | None = None,
    ) -> AsyncIterator[Lease]:
        """Hold a model for a request, loading it first if need be; one load serves all who wait for it.

        `keep_alive_seconds` says how long it stays afterwards (infinity: for good; None: as LoadModel or the settings
        say). Leaving the wait withdraws a load that has not begun and that nobody else waits for. Raises what the load
        raises, or ModelNotLoadedError.
        """
        started = time.monotonic()
        was_loaded = self.is_loaded(model.name)
        if require_loaded and not was_loaded:
            raise ModelNotLoadedError.of(model.name)
        resident = await self._load(model, LoadWish(priority), for_request=True)
        assert resident.worker is not None
        with self._held(resident):
            try:
                yield Lease(resident, resident.worker, 0.0 if was_loaded else time.monotonic() - started)
            finally:
                resident.idle_since = time.monotonic()
                resident.request_keep_alive_seconds = keep_alive_seconds
                self._catalog.note_use(model.name)

    def refuse_early(self, model: InstalledModel, row_count: int, *, require_loaded: bool = False) -> None:
        """Raise what `use` or the worker would refuse a request for: ModelNotLoadedError or QueueFullError.

        For those who have costly work to do before; both check again.
        """
        resident = self._roster.find(model.name)
        if self.is_loaded(model.name):
            assert resident is not None and resident.worker is not None
            resident.worker.refuse_crowd(row_count)
        elif require_loaded:
            raise ModelNotLoadedError.of(model.name)
        else:
            waiting_count = resident.waiting_count if resident else 0
            self._refuse_crowd(model.name, self._roster.held[model.name] + waiting_count)

    @contextlib.asynccontextmanager
    async def use_tokenizer(self, model: InstalledModel) -> AsyncIterator[tuple[WorkerProcess, int]]:
        """Hold a worker that can count tokens, and the context length: the loaded model's, else a light one."""
        resident = self._roster.find(model.name)
        if resident is not None and resident.worker is not None and self.is_loaded(model.name):
            assert resident.loaded is not None
            with self._held(resident):  # No use of the model: nothing is generated.
                yield resident.worker, resident.loaded.context_length
        else:
            async with self._light.use(model) as light:
                yield light

    # Load and unload.

    async def load(
        self,
        model: InstalledModel,
        wish: LoadWish | None = None,
        report: Callable[[LoadProgress], None] | None = None,
    ) -> Resident:
        """Load a model because somebody asked for just that, or wait for the load that is under way.

        `report` hears how far it is. Counts as a use for the idle timeout. Raises what kept it from being loaded;
        OperationCancelledError when somebody cancelled it.
        """
        wish = wish or LoadWish()
        resident = await self._load(model, wish, for_request=False, report=report)
        resident.idle_since = time.monotonic()
        self._keep(resident, wish)
        return resident

    def amend_load(self, model: InstalledModel, wish: LoadWish) -> None:
        """The wish of a load that is under way has changed."""
        resident = self._roster.find(model.name)
        if resident is not None:
            self._hurry(resident, wish.priority)
            self._keep(resident, wish)

    async def unload(self, name: str, *, force: bool) -> bool:
        """Take a model out of memory; False when it was not there.

        Raises ModelInUseError when requests hold it, unless `force` ends them.
        """
        resident = self._roster.find(name)
        if resident is None:
            return False
        if (count := resident.use_count + resident.waiting_count) and not force:
            raise ModelInUseError(
                f"Model '{name}' has {count} requests running; wait for them, or force", model=name
            )
        cause = OperationCancelledError(f"Model '{name}' was unloaded while the request ran", model=name)
        await self._roster.discard(resident, cause)
        self.budget.share_out()
        return True

    def preload(self, names: list[str]) -> None:
        """Load models in the background, in this order; what fails is logged."""
        for name in names:
            self._roster.run_in_background(self._preload(name))

    def set_priority(self, model: InstalledModel, priority: int) -> int:
        """Set the priority of a model's loads, also of one that waits; its place then, 0: it does not wait."""
        self._priorities[model.id] = priority
        resident = self._roster.find(model.name)
        if resident is None or not self._loader.queue.position(resident.ticket):
            return 0
        self._loader.queue.move(resident.ticket, priority)
        return self._loader.queue.position(resident.ticket)

    async def pin(self, model: InstalledModel, *, pinned: bool) -> InstalledModel:
        """Keep a model in memory once it is there, or undo that; durable when it returns."""
        changed = await self._catalog.update(model.name, pinned=pinned)
        resident = self._roster.find(model.name)
        if resident is not None and resident.model.id == model.id:
            resident.model = changed
        self._upkeep.enforce_limits()
        self._upkeep.arm()
        self.changes.notify()
        return changed

    @contextlib.contextmanager
    def removing(self, model: InstalledModel) -> Iterator[None]:
        """While the block runs nobody loads the model: it is on its way out."""
        self._removing.add(model.id)
        try:
            yield
        finally:
            self._removing.discard(model.id)
            if self._catalog.find(model.name) is None:
                self._priorities.pop(model.id, None)
                self._upkeep.forget(model.id)

    # Inside.

    @contextlib.contextmanager
    def _held(self, resident: Resident) -> Iterator[None]:
        """Keep a loaded model where it is while the block runs."""
        resident.use_count += 1
        self.changes.notify()
        try:
            yield
        finally:
            resident.use_count -= 1
            self._standby.fill()
            self._upkeep.enforce_limits()
            self._upkeep.arm()
            self.changes.notify()

    async def _load(
        self,
        model: InstalledModel,
        wish: LoadWish,
        *,
        for_request: bool,
        report: Callable[[LoadProgress], None] | None = None,
        is_explicit: bool | None = None,
    ) -> Resident:
        resident = await self._settled(model, for_request=for_request)
        priority = wish.priority or self._priorities.get(model.id, 0)
        if resident is None:
            resident = self._loader.begin(model, priority)
        else:
            self._hurry(resident, priority)
        resident.is_explicit |= not for_request if is_explicit is None else is_explicit
        try:
            await self._loader.follow(resident, for_request=for_request, report=report)
        except OperationCancelledError:
            if self._is_closed:
                raise ServerDrainingError("The server is stopping") from None
            raise
        self._upkeep.enforce_limits()
        return resident

    async def _settled(self, model: InstalledModel, *, for_request: bool) -> Resident | None:
        """The resident of a model that is in memory or on its way, None when there is none; waits while it leaves."""
        held, name = self._roster.held, model.name
        while True:
            if self._is_closed:
                raise ServerDrainingError("The server is stopping")
            current = self._catalog.find(name)
            if current is None or current.id != model.id or model.id in self._removing:
                raise ModelNotFoundError.of(name)
            resident = self._roster.find(name)
            if resident is not None and resident.model.id != model.id:
                await self._roster.discard(resident)  # Of a model that had the name before.
                continue
            if for_request:
                self._refuse_crowd(name, held[name] + (resident.waiting_count if resident else 0))
            if resident is None or not _is_going(resident):
                return resident
            held[name] += for_request
            try:
                await self.changes.wait()
            finally:
                held[name] -= for_request

    def _refuse_crowd(self, name: str, waiting_count: int) -> None:
        limits = self.budget.limits
        if waiting_count >= (most := limits.max_rows + limits.max_waiting_rows):
            raise QueueFullError(
                f"{waiting_count} requests wait until model '{name}' is loaded, {most} at most; try again in a moment",
                retry_after_seconds=1.0,
                model=name,
            )

    def _keep(self, resident: Resident, wish: LoadWish) -> None:
        if wish.keep_alive_seconds is not None:
            # Said later than whatever a request said.
            resident.keep_alive_seconds, resident.request_keep_alive_seconds = wish.keep_alive_seconds, None
        self._upkeep.arm()

    def _hurry(self, resident: Resident, priority: int) -> None:
        if priority > resident.ticket.priority and self._loader.queue.position(resident.ticket):
            self._loader.queue.move(resident.ticket, priority)

    async def _reload(self, before: Resident) -> None:
        resident = await self._load(before.model, LoadWish(), for_request=False, is_explicit=False)
        if resident.keep_alive_seconds is None:
            resident.keep_alive_seconds = before.keep_alive_seconds
        if resident.request_keep_alive_seconds is None:
            resident.request_keep_alive_seconds = before.request_keep_alive_seconds
        self._upkeep.arm()

    async def _preload(self, name: str) -> None:
        try:
            await self.load(self._catalog.get(name))
        except ServerDrainingError:
            pass
        except ModelServerError as error:
            log.warning("'%s' was not preloaded: %s", name, error.message)


def _is_going(resident: Resident) -> bool:
    """On its way out, or dead: a new load has to wait until it is gone."""
    if resident.state == "unloading" or resident.is_leaving:
        return True
    return resident.is_loaded and (resident.worker is None or not resident.worker.is_alive)
