"""Looks after the models in memory: idle ones leave, limits hold, and a model whose worker died comes back."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from mlxgui_grpc.catalog import Catalog, InstalledModel
from mlxgui_grpc.errors import ModelServerError, ServerDrainingError
from mlxgui_grpc.residency.budget import Budget
from mlxgui_grpc.residency.loader import RECOVERABLE
from mlxgui_grpc.residency.residents import Resident
from mlxgui_grpc.residency.roster import Roster
from mlxgui_grpc.residency.standby import Standby

log = logging.getLogger(__name__)

SWEEP_SECONDS = 60.0
"""How often everything is looked at, at least (documented)."""
MAX_DEATHS = 3
DEATH_WINDOW_SECONDS = 300.0
"""A model whose worker dies so often in this time is not loaded again by itself."""


class Upkeep:
    """Use on the event loop only."""

    def __init__(
        self,
        catalog: Catalog,
        roster: Roster,
        budget: Budget,
        standby: Standby,
        reload: Callable[[Resident], Awaitable[object]],
    ) -> None:
        """`reload` loads the model of a resident whose worker died."""
        self._catalog = catalog
        self._roster = roster
        self._budget = budget
        self._standby = standby
        self._reload = reload
        self._deaths: dict[int, list[float]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    def close(self) -> None:
        """Look after nothing any more."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()

    def forget(self, model_id: int) -> None:
        """The model is deleted."""
        self._deaths.pop(model_id, None)

    def arm(self) -> None:
        """Set the clock for the next sweep: when something has changed that an expiry depends on."""
        if self._timer is not None:
            self._timer.cancel()
        if self._is_closed:
            return
        now = time.monotonic()
        expiries = (resident.expires_at(self._budget.limits) for resident in self._roster.residents())
        due = min((now + SWEEP_SECONDS, *expiries))
        self._timer = asyncio.get_running_loop().call_later(max(0.0, due - now), self._sweep)

    def enforce_limits(self) -> None:
        """Let idle models go, the least recently used first, when there are more than the settings allow."""
        loaded = [one for one in self._roster.residents() if one.is_loaded]
        limits = self._budget.limits
        surplus_count = len(loaded) - limits.max_models
        cap = limits.memory_cap_bytes
        surplus_bytes = sum(one.reserved_bytes for one in loaded) - cap if cap else 0
        for resident in self._roster.idle():
            if surplus_count <= 0 and surplus_bytes <= 0:
                return
            surplus_count -= 1
            surplus_bytes -= resident.reserved_bytes
            self._roster.dismiss(resident, "a setting leaves no room for it")

    def note_exit(self, resident: Resident) -> None:
        """A worker is gone: load its model again, unless that was wanted, or happens again and again."""
        was_loaded = resident.is_loaded
        self._roster.forget(resident)
        self._budget.share_out()
        death = resident.worker.death if resident.worker else None
        if self._is_closed or not was_loaded or death is None or death.kind not in RECOVERABLE:
            return
        model, now = resident.model, time.monotonic()
        deaths = [at for at in self._deaths.get(model.id, []) if now - at < DEATH_WINDOW_SECONDS]
        self._deaths[model.id] = deaths = [*deaths, now]
        if len(deaths) < MAX_DEATHS:
            log.warning("loading %s again: %s", model.name, death.message)
            self._roster.run_in_background(self._bring_back(resident))
        else:
            log.error("%s died %d times and stays unloaded: %s", model.name, len(deaths), death.message)
            self._roster.run_in_background(self._note_failure(model, death.message))

    def _sweep(self) -> None:
        now = time.monotonic()
        for resident in self._roster.residents():
            if resident.expires_at(self._budget.limits) <= now:
                self._roster.dismiss(resident, f"idle for {now - resident.idle_since:.0f} s")
        self.enforce_limits()
        self._standby.fill()
        self._budget.share_out()
        self.arm()

    async def _bring_back(self, resident: Resident) -> None:
        try:
            await self._reload(resident)
        except ServerDrainingError:
            pass
        except ModelServerError as error:
            log.warning("%s was not loaded again: %s", resident.name, error.message)

    async def _note_failure(self, model: InstalledModel, message: str) -> None:
        try:
            await self._catalog.update(model.name, error_message=message)
        except ModelServerError as error:
            log.warning("why %s stays unloaded was not written down: %s", model.name, error.message)
