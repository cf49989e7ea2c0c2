"""A light worker that only counts tokens, for models that are not in memory."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from mlxgui_grpc.catalog import InstalledModel
from mlxgui_grpc.engine.supervisor import WorkerProcess
from mlxgui_grpc.residency.loader import load_kind
from mlxgui_grpc.residency.standby import Standby

LIGHT_WORKER_SECONDS = 10.0
"""How long a worker that only counts tokens stays after its last use."""


@dataclass(eq=False, slots=True)
class _Light:
    """A worker that has a tokenizer only."""

    model_id: int
    path: Path
    worker: WorkerProcess
    context_length: int
    use_count: int = 0
    timer: asyncio.TimerHandle | None = None


class LightWorker:
    """At most one worker with a tokenizer and no weights, shared, which ends some seconds after its last use."""

    def __init__(
        self,
        standby: Standby,
        prepared: Callable[[InstalledModel], AbstractAsyncContextManager[Path]],
        context_limit: Callable[[], int],
    ) -> None:
        """`prepared` makes the view of a model that its loader reads; `context_limit` is the setting, 0: none."""
        self._standby = standby
        self._prepared = prepared
        self._context_limit = context_limit
        self._light: _Light | None = None
        self._loading: WorkerProcess | None = None
        self._lock = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def use(self, model: InstalledModel) -> AsyncIterator[tuple[WorkerProcess, int]]:
        """Hold the worker, and the model's context length."""
        light = await self._get(model)
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
                    light.timer = loop.call_later(LIGHT_WORKER_SECONDS, self._retire)

    def close(self) -> None:
        """End it."""
        if self._light is not None:
            self._light.worker.kill()
        if self._loading is not None:
            self._loading.kill()

    async def _get(self, model: InstalledModel) -> _Light:
        async with self._lock:
            light = self._light
            if light is not None and light.timer is not None:
                light.timer.cancel()
                light.timer = None
            # An update of the model changes its path.
            is_same = light is not None and (light.model_id, light.path) == (model.id, model.path)
            if light is not None and is_same and light.worker.is_alive:
                return light
            if light is not None:
                self._light = None
                if light.use_count == 0:
                    await light.worker.stop()
            worker = self._loading = await self._standby.take()
            try:
                async with self._prepared(model) as view:
                    loaded = await worker.load(
                        model.name,
                        view,
                        kind=load_kind(model.type),
                        tokenizer_only=True,
                        context_limit=self._context_limit(),
                    )
            except BaseException:
                worker.kill()
                raise
            finally:
                self._loading = None
            self._light = _Light(model.id, model.path, worker, loaded.context_length)
            self._standby.fill()
            return self._light

    def _retire(self) -> None:
        if self._light is not None and self._light.use_count == 0:
            self._light.worker.kill()
            self._light = None
