"""Brings a model into memory: its turn, room for it, a worker, and up to three attempts."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from mlxgui_grpc import checkpoint, model_view
from mlxgui_grpc.catalog import Catalog, InstalledModel
from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.supervisor import EXIT_GRACE_SECONDS, WorkerProcess
from mlxgui_grpc.errors import (
    EngineDeadError,
    HardwareIncompatibleError,
    ModelIncompatibleError,
    ModelLoadFailedError,
    ModelNotFoundError,
    ModelServerError,
    OperationCancelledError,
    OutOfMemoryError,
)
from mlxgui_grpc.operations import LoadProgress
from mlxgui_grpc.residency.budget import Budget
from mlxgui_grpc.residency.load_queue import LoadQueue, Ticket
from mlxgui_grpc.residency.residents import Resident
from mlxgui_grpc.residency.roster import Roster, log_failure
from mlxgui_grpc.residency.standby import Standby

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Tries of one load (documented)."""
MIN_RESIDENCY_SECONDS = 1.0
MIN_RESIDENCY_LOADS = 3.0
"""A model stays for so many times the duration of its load before a request for another may evict it: when two models
alternate, three quarters of the time goes into serving."""
PROGRESS_SECONDS = 0.25
RECOVERABLE = frozenset({"memory", "stall", "crash"})
"""Deaths of a worker that loading again may mend."""


class Loader:
    """Loads models, one at a time, in the order of the queue. Use on the event loop only."""

    def __init__(
        self,
        catalog: Catalog,
        roster: Roster,
        budget: Budget,
        standby: Standby,
        view_directory: Path,
        on_exit: Callable[[Resident], None],
    ) -> None:
        """`on_exit` hears of residents whose worker is gone."""
        self._catalog = catalog
        self._roster = roster
        self._budget = budget
        self._standby = standby
        self._view_directory = view_directory
        self._on_exit = on_exit
        self._view_numbers = itertools.count()
        self.queue = LoadQueue()

    def begin(self, model: InstalledModel, priority: int) -> Resident:
        """Queue a load, of the files that the model has now: an update may have replaced those of the caller."""
        current = self._catalog.find(model.name)
        if current is None or current.id != model.id:
            raise ModelNotFoundError.of(model.name)
        model = current
        resident = Resident(model, self._budget.estimate(model), Ticket(model.name, priority))
        resident.ticket.changed = lambda: self._show(
            resident, queue_position=self.queue.position(resident.ticket)
        )
        self._roster.add(resident)
        resident.load = asyncio.get_running_loop().create_task(self._load(resident))
        resident.load.add_done_callback(log_failure)
        return resident

    async def follow(
        self, resident: Resident, *, for_request: bool, report: Callable[[LoadProgress], None] | None = None
    ) -> None:
        """Wait for a load, `report`ing its progress; raises what it raises, or OperationCancelledError.

        Who leaves last takes a load that has not begun with him.
        """
        load = resident.load
        assert load is not None
        resident.waiting_count += for_request
        resident.follower_count += 1
        try:
            if report is None:
                await asyncio.shield(load)
            while not load.done():
                assert report is not None
                report(resident.progress)
                change = asyncio.ensure_future(self._roster.changes.wait())
                try:
                    await asyncio.wait([load, change], return_when=asyncio.FIRST_COMPLETED)
                finally:
                    change.cancel()
            load.result()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise OperationCancelledError(
                f"The load of '{resident.name}' was cancelled", model=resident.name
            ) from None
        finally:
            resident.waiting_count -= for_request
            resident.follower_count -= 1
            if resident.state == "queued" and resident.follower_count == 0 and not load.done():
                load.cancel()
        if report is not None:
            report(resident.progress)

    @contextlib.asynccontextmanager
    async def prepared(self, model: InstalledModel) -> AsyncIterator[Path]:
        """A view of the model, checked now and before every load, that lasts as long as the loader reads it."""
        view = self._view_directory / f"{model.id}-{next(self._view_numbers)}"

        def prepare() -> None:
            checkpoint.require_loadable(checkpoint.inspect(model.path))
            model_view.make_view(model.path, view)

        preparation = asyncio.ensure_future(asyncio.to_thread(prepare))
        try:
            await asyncio.shield(preparation)
            yield view
        finally:
            # A thread cannot be cancelled: the view goes when it is done with it.
            preparation.add_done_callback(lambda done: _clean_up(done, view))

    # Inside.

    async def _load(self, resident: Resident) -> None:
        model = resident.model
        try:
            while not await self._take_turn(resident):
                self._show(resident, phase="queued")
        except asyncio.CancelledError:
            self._roster.forget(resident)
            raise
        except Exception as error:
            self._roster.forget(resident)
            if not isinstance(error, ModelServerError):
                log.exception("loading %s failed", model.name)
            message = error.message if isinstance(error, ModelServerError) else str(error)
            await self._note(model.name, error_message=message)
            self._budget.learn_failure(error)
            if isinstance(error, ModelServerError) and not isinstance(
                error, EngineDeadError | ModelLoadFailedError | OutOfMemoryError
            ):
                raise
            raise ModelLoadFailedError(
                f"Model '{model.name}' could not be loaded: {message}", model=model.name
            ) from error
        finally:
            self._budget.share_out()
            self._roster.changes.notify()
        self._standby.fill()
        self._roster.on_change(model.name, "loaded")
        assert resident.loaded is not None
        log.info("loaded %s in %.2f s", model.name, resident.loaded.load_seconds)
        self._roster.run_in_background(self._note_loaded(resident))

    async def _take_turn(self, resident: Resident) -> bool:
        """Load the model when it is its turn; False when somebody overtook it while it waited for room."""
        async with self.queue.turn(resident.ticket):
            try:
                async with self.prepared(resident.model) as view:
                    return await self._load_with_retries(resident, view)
            except BaseException:
                # Its memory is free before the next one looks for room.
                await asyncio.shield(self._roster.run_in_background(self._end_worker(resident)))
                raise
            finally:
                self._mark_leaving([])

    async def _load_with_retries(self, resident: Resident, view: Path) -> bool:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            if not await self._make_room(resident):
                return False
            self._show(resident, phase="loading", attempt=attempt)
            try:
                await self._load_into_worker(resident, view)
                break
            except ModelServerError as error:
                worker = resident.worker
                if worker is not None and not worker.is_alive:
                    with contextlib.suppress(TimeoutError):  # A moment later it is known what it died of.
                        await asyncio.wait_for(worker.exited.wait(), EXIT_GRACE_SECONDS)
                kind = worker.death.kind if worker is not None and worker.death is not None else ""
                ran_out = isinstance(error, OutOfMemoryError) or kind == "memory"
                await self._end_worker(resident)
                if isinstance(error, HardwareIncompatibleError) or not (ran_out or kind in RECOVERABLE):
                    raise
                if attempt == MAX_ATTEMPTS:
                    raise ModelLoadFailedError(
                        f"after {MAX_ATTEMPTS} attempts: {error.message}", model=resident.name
                    ) from error
                log.warning("loading %s failed (attempt %d): %s", resident.name, attempt, error.message)
                self._show(resident, phase="evicting", attempt=attempt + 1)
                if ran_out:
                    await self._evict_one(resident)
        return True

    async def _end_worker(self, resident: Resident) -> None:
        worker = resident.worker
        if worker is not None:
            await worker.stop()
            resident.worker = None

    async def _make_room(self, resident: Resident) -> bool:
        """Evict what has to leave, waiting for its requests; raises when the model cannot fit.

        False: somebody goes before it, while it waits.
        """
        ticket = resident.ticket
        while True:
            plan, _ = self._budget.plan(resident.model, resident.estimate.required_bytes)
            if plan.refusal is not None:
                raise plan.refusal
            victims = [victim for name in plan.victims if (victim := self._roster.find(name)) is not None]
            # One that has just come goes on serving until its time is over.
            stale = [victim for victim in victims if not self._is_fresh(victim, resident)]
            self._mark_leaving(stale)
            if not victims:
                break
            self._show(resident, phase="evicting")
            idle = [victim for victim in stale if victim.is_loaded and not victim.is_busy]
            if idle:  # The old model goes before the new one comes.
                await self._evict(idle[0], resident)
                continue
            if resident.state == "queued" and self.queue.is_overtaken(ticket):
                return False
            await self._roster.changes.wait(self._seconds_until_stale(victims, resident))
        ticket.needs_room = False
        self.queue.move(ticket, ticket.priority)  # Those behind it move up.
        resident.state = "loading"
        self._budget.share_out()  # The others have less from now on.
        if plan.memory_warning:
            log.warning("%s", plan.memory_warning)
        self._show(resident, queue_position=0, memory_warning=plan.memory_warning)
        return True

    async def _load_into_worker(self, resident: Resident, view: Path) -> None:
        worker = resident.worker = await self._standby.take()
        try:
            ready = await worker.ready()
        except EngineDeadError:  # A standby that died on its way here is nobody's fault.
            worker = resident.worker = await self._standby.take()
            ready = await worker.ready()
        self._budget.learn(worker, ready)
        worker.on_warming = lambda: self._show(resident, phase="warming")
        progress = asyncio.get_running_loop().create_task(self._show_progress(resident, worker))
        try:
            resident.loaded = await worker.load(
                resident.name,
                view,
                kind=load_kind(resident.model.type),
                kv_budget_bytes=resident.kv_needed_bytes + self._budget.kv_share_bytes(),
                context_limit=self._budget.limits.context_limit,
            )
        finally:
            progress.cancel()
        if not worker.is_alive:
            raise ModelLoadFailedError("its worker ended")
        resident.note_loaded()
        worker.on_exit = lambda: self._on_exit(resident)

    async def _show_progress(self, resident: Resident, worker: WorkerProcess) -> None:
        """Tell, while the weights are read, how much the process has grown by."""
        total, before = resident.estimate.weight_bytes, worker.footprint_bytes
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            done = min(total, max(0, worker.footprint_bytes - before))
            self._show(resident, done_bytes=done, total_bytes=total)

    async def _note_loaded(self, resident: Resident) -> None:
        """Keep what is known of a model once it has been in memory."""
        model = resident.model
        required = resident.used_bytes + resident.estimate.kv_bytes + resident.estimate.prefill_bytes
        is_news = abs(required - model.memory_bytes) > 0.05 * model.memory_bytes
        if model.error_message or is_news:
            await self._note(model.name, error_message="", memory_bytes=required)

    async def _note(self, name: str, **facts: Any) -> None:
        """Write down what a load has shown. A disk that is full changes nothing about the load itself."""
        try:
            await self._catalog.update(name, **facts)
        except ModelNotFoundError:
            pass  # It was deleted meanwhile.
        except ModelServerError as error:
            log.warning("what the load of %s has shown was not written down: %s", name, error.message)

    def _show(self, resident: Resident, **changes: Any) -> None:
        """Tell those who follow a load how far it is."""
        resident.progress = replace(resident.progress, **changes)
        self._roster.changes.notify()

    # Room.

    def _mark_leaving(self, victims: list[Resident]) -> None:
        """These, and no others, take no new requests."""
        for resident in self._roster.residents():
            resident.is_leaving = resident in victims

    def _is_fresh(self, victim: Resident, newcomer: Resident) -> bool:
        """Whether a model has come so lately that a request for another may not evict it yet."""
        return not newcomer.is_explicit and time.monotonic() < _stale_at(victim)

    def _seconds_until_stale(self, victims: list[Resident], newcomer: Resident) -> float | None:
        fresh = [_stale_at(victim) for victim in victims if self._is_fresh(victim, newcomer)]
        return max(0.0, min(fresh) - time.monotonic()) + 0.001 if fresh else None

    async def _evict(self, victim: Resident, newcomer: Resident) -> None:
        log.info("evicting %s for %s", victim.name, newcomer.name)
        self._show(newcomer, evicted_models=(*newcomer.progress.evicted_models, victim.name))
        await self._roster.discard(victim)

    async def _evict_one(self, newcomer: Resident) -> None:
        """Make more room than was reckoned: evict the idle model that was used least recently, if there is one."""
        if idle := self._roster.idle():
            await self._evict(idle[0], newcomer)


def _stale_at(resident: Resident) -> float:
    """When a model may be evicted for a request, on the monotonic clock."""
    seconds = resident.loaded.load_seconds if resident.loaded else 0.0
    return resident.loaded_since + max(MIN_RESIDENCY_SECONDS, MIN_RESIDENCY_LOADS * seconds)


def load_kind(model_type: str) -> frames.ModelKind:
    """What a worker loads a model as; raises ModelIncompatibleError for a type that none loads."""
    try:
        kind: frames.ModelKind = msgspec.convert(model_type, frames.ModelKind)
        return kind
    except msgspec.ValidationError:
        raise ModelIncompatibleError(f"this version does not serve models for {model_type}") from None


def _clean_up(preparation: "asyncio.Future[None]", view: Path) -> None:
    preparation.exception()  # seen: whoever waited for it has it
    model_view.remove_view(view)
