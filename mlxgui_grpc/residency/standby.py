"""Workers that have done their imports and wait for a model."""

import asyncio
import logging
import os
from collections.abc import Callable

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.supervisor import WorkerConfig, WorkerProcess
from mlxgui_grpc.errors import ModelServerError

log = logging.getLogger(__name__)


class Standby:
    """A pool of warm workers, refilled in the background. Use on the event loop only."""

    def __init__(
        self,
        config: WorkerConfig,
        count: int,
        has_room: Callable[[], bool],
        learn: Callable[[WorkerProcess, frames.Ready], None],
        learn_failure: Callable[[Exception], None],
    ) -> None:
        """`has_room` says whether there is memory for one more; the others hear what a worker found out as it began."""
        self._config = config
        self._count = count
        self._has_room = has_room
        self._learn = learn
        self._learn_failure = learn_failure
        self._workers: list[WorkerProcess] = []
        self._leaving: set[WorkerProcess] = set()
        """Those that are asked something or end, and wait for no model."""
        self._filling: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def ready_count(self) -> int:
        """Workers that wait."""
        return sum(worker.is_alive and worker.is_ready for worker in self._workers)

    @property
    def footprint_bytes(self) -> int:
        """Memory of the workers that wait."""
        return sum(worker.footprint_bytes for worker in self._workers if worker.is_alive)

    def configure(self, config: WorkerConfig, count: int) -> None:
        """Use other options from now on; workers started under the old ones are ended."""
        surplus = self._workers[count:] if config == self._config else list(self._workers)
        self._config, self._count = config, count
        for worker in surplus:
            self._end(worker)
        self.fill()

    def fill(self) -> None:
        """Start what is missing, in the background and below everything else in priority."""
        self._workers = [worker for worker in self._workers if worker.is_alive]
        missing = len(self._workers) < self._count
        if missing and not self._is_closed and (self._filling is None or self._filling.done()):
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

    async def probe(self) -> None:
        """Let a worker find out what MLX runs on; blocks for the seconds that one takes to start."""
        worker = await self.take()
        self._leaving.add(worker)
        try:
            self._learn(worker, await worker.ready())
        except ModelServerError as error:
            self._learn_failure(error)
        finally:
            self._leaving.discard(worker)
        if worker.is_alive and len(self._workers) < self._count:
            self._workers.append(worker)
        else:
            await worker.stop()

    async def close(self) -> None:
        """End them all."""
        self._is_closed = True
        if self._filling is not None:
            self._filling.cancel()
            await asyncio.wait([self._filling])
        workers = [*self._workers, *self._leaving]
        for worker in workers:
            worker.kill()  # It may be deep in its imports, where it does not hear that it should end.
        await asyncio.gather(*(worker.stop() for worker in workers))

    def _end(self, worker: WorkerProcess) -> None:
        """Kill a worker; until its death is known it looks alive, so nobody may find it."""
        self._workers.remove(worker)
        self._leaving.add(worker)
        worker.on_exit = lambda: self._leaving.discard(worker)
        worker.kill()

    async def _fill(self) -> None:
        while len(self._workers) < self._count and self._has_room():
            config = self._config
            worker = await WorkerProcess.spawn(config, os.environ, idle=True)
            self._workers.append(worker)
            if config != self._config:  # The options changed meanwhile.
                self._end(worker)
                continue
            try:
                self._learn(worker, await worker.ready())
            except ModelServerError as error:
                if worker not in self._workers:  # Ended under changed options, or taken and somebody else's.
                    continue
                self._learn_failure(error)
                raise


def _consume(task: "asyncio.Task[None]") -> None:
    """Log a failure that nobody waits for."""
    if not task.cancelled() and (error := task.exception()):
        known = isinstance(error, ModelServerError)
        log.warning("no standby worker: %s", error, exc_info=None if known else error)
