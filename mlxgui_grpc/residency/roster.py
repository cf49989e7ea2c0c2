"""The models that are in memory or on their way, and how they leave."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from mlxgui_grpc.errors import ModelServerError
from mlxgui_grpc.residency.changes import Changes
from mlxgui_grpc.residency.residents import Resident

log = logging.getLogger(__name__)


class Roster:
    """Residents by installed name. Use on the event loop only."""

    def __init__(self, on_change: Callable[[str, str], None]) -> None:
        """`on_change` hears the name and new state (loaded, unloaded) of models."""
        self.on_change = on_change
        self.changes = Changes()
        """Rings when a model, a load or a number of requests has changed."""
        self.held: Counter[str] = Counter()
        """Requests, by model, that wait until the model has left memory, to load it again."""
        self._residents: dict[str, Resident] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def find(self, name: str) -> Resident | None:
        """The resident of an installed name, in whatever state."""
        return self._residents.get(name)

    def residents(self) -> list[Resident]:
        """All residents, the oldest first."""
        return list(self._residents.values())

    def idle(self) -> list[Resident]:
        """Loaded models that may leave now, the least recently used first."""
        idle = [one for one in self.residents() if one.is_loaded and not one.is_busy and not one.model.pinned]
        return sorted(idle, key=lambda one: one.idle_since)

    def add(self, resident: Resident) -> None:
        """Enter a model that is on its way."""
        self._residents[resident.name] = resident
        self.changes.notify()

    def forget(self, resident: Resident) -> None:
        """Strike a model whose worker is gone, or that never had one."""
        if self._residents.get(resident.name) is resident:
            del self._residents[resident.name]
            if resident.is_loaded:
                self.on_change(resident.name, "unloaded")
            self.changes.notify()

    async def discard(self, resident: Resident, cause: ModelServerError | None = None) -> None:
        """Take a model out of memory; its requests end with `cause`. Returns when its memory is free.

        Goes on when the caller is cancelled.
        """
        is_loading = resident.load is not None and not resident.load.done()
        if resident.worker is not None and not is_loading:
            self._retire(resident)  # At once: nobody gets hold of it any more.
        await asyncio.shield(self.run_in_background(self._discard(resident, cause)))

    def dismiss(self, resident: Resident, reason: str) -> None:
        """Take an idle model out of memory in the background."""
        log.info("unloading %s: %s", resident.name, reason)
        self._retire(resident)
        self.run_in_background(self._discard(resident, None))

    def run_in_background(self, action: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run what must not stop with its caller; what it raises is logged."""
        task = asyncio.get_running_loop().create_task(action)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(log_failure)
        return task

    def cancel_background(self) -> None:
        """The server ends."""
        for task in self._tasks:
            task.cancel()

    async def _discard(self, resident: Resident, cause: ModelServerError | None) -> None:
        if resident.load is not None and not resident.load.done():
            resident.load.cancel()
            await asyncio.wait([resident.load])
        if resident.worker is not None:
            self._retire(resident)
            await resident.worker.stop(cause)
        self.forget(resident)

    def _retire(self, resident: Resident) -> None:
        if resident.state != "unloading":
            resident.state = "unloading"
            self.on_change(resident.name, "unloaded")
            self.changes.notify()


def log_failure(task: "asyncio.Task[Any]") -> None:
    """Log an unforeseen failure of a task that nobody may be waiting for."""
    if not task.cancelled() and (error := task.exception()) and not isinstance(error, ModelServerError):
        log.error("background task failed", exc_info=error)
