"""Long actions that outlive their caller: installs and loads, with progress, cancellation and a durable end."""

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from mlxgui_grpc.catalog import (
    KEPT_OPERATION_SECONDS,
    KEPT_OPERATIONS,
    Catalog,
    InstalledModel,
    OperationRecord,
)
from mlxgui_grpc.errors import (
    BY_REASON,
    DiskFullError,
    InternalError,
    ModelServerError,
    OperationCancelledError,
    OperationNotFoundError,
    ServerDrainingError,
)

log = logging.getLogger(__name__)

SNAPSHOTS_PER_SECOND = 4


@dataclass(slots=True)
class InstallProgress:
    """How far an install is."""

    phase: str = "resolving"
    done_bytes: int = 0
    total_bytes: int = 0
    done_file_count: int = 0
    total_file_count: int = 0
    current_file: str = ""
    bytes_per_second: float = 0.0
    remaining_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far a load is."""

    phase: str = "queued"
    """queued, evicting, loading or warming."""
    queue_position: int = 0
    """1 is next; 0: not queued."""
    attempt: int = 1
    evicted_models: tuple[str, ...] = ()
    done_bytes: int = 0
    """Weights that are in memory, by the growth of the process."""
    total_bytes: int = 0
    memory_warning: str = ""


@dataclass(eq=False, slots=True)
class Operation:
    """One long action. `progress` is replaced or changed in place, followed by `Operations.changed`."""

    id: str
    kind: str
    model: str
    progress: InstallProgress | LoadProgress
    request: dict[str, Any] = field(default_factory=dict)
    create_time: float = field(default_factory=time.time)
    update_time: float = field(default_factory=time.time)
    result: InstalledModel | None = None
    error: ModelServerError | None = None
    warnings: list[str] = field(default_factory=list)
    is_recorded: bool = False
    """On the disk: from now on a later server answers for it."""
    is_ending: bool = False
    """It is being cancelled, or has ended and is being written down: nobody joins it any more."""
    is_done: bool = False
    task: asyncio.Task[None] | None = None
    version: int = 0
    waiters: set[asyncio.Future[None]] = field(default_factory=set)

    def changed(self) -> None:
        """Wake those who watch."""
        self.version += 1
        self.update_time = time.time()
        waiters, self.waiters = self.waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class Operations:
    """All long actions of this server. Use on the event loop only."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._operations: OrderedDict[str, Operation] = OrderedDict()

    async def recover(self, records: list[OperationRecord]) -> None:
        """Take over the operations of earlier servers. What they left unfinished has failed, but for an install whose
        model they had registered; an install that is asked for again resumes its download."""
        for record in records:
            operation = Operation(
                id=record.id,
                kind=record.kind,
                model=record.model,
                progress=LoadProgress() if record.kind == "load" else InstallProgress(),
                request=json.loads(record.request),
                create_time=record.create_time,
                update_time=record.update_time,
                is_recorded=True,
                is_done=True,
            )
            if record.state == "failed":
                operation.error = BY_REASON.get(record.error_reason, InternalError)(record.error_message)
            elif record.state == "running":
                operation.result = self._installed_by(operation)
                if operation.result is None:
                    operation.error = ServerDrainingError(
                        f"The server ended before the {record.kind} of '{record.model}' was done; start it again"
                    )
                try:
                    await self._save(operation)
                except (
                    DiskFullError
                ) as error:  # No reason not to serve: the next start finds it unfinished again.
                    log.warning("operation %s: %s", operation.id, error.message)
            else:
                operation.result = self._catalog.find(record.model)
            self._operations[operation.id] = operation

    async def start(
        self,
        kind: str,
        model: str,
        progress: InstallProgress | LoadProgress,
        action: Callable[[Operation], Awaitable[InstalledModel]],
        request: dict[str, Any] | None = None,
    ) -> Operation:
        """Begin an action in a task of its own; it goes on when the caller leaves.

        Returns when the operation is on the disk, or has ended because it could not be written there.
        """
        operation = Operation(f"op-{uuid.uuid4().hex[:16]}", kind, model, progress, request or {})
        self._operations[operation.id] = operation
        self._forget_old()
        operation.task = asyncio.get_running_loop().create_task(self._run(operation, action))
        await self._recorded(operation)
        return operation

    def get(self, operation_id: str) -> Operation:
        """The operation, or OperationNotFoundError."""
        try:
            return self._operations[operation_id]
        except KeyError:
            raise OperationNotFoundError(
                f"Operation '{operation_id}' not found", operation=operation_id
            ) from None

    def list(self, *, include_done: bool) -> list[Operation]:
        """Operations, newest first."""
        newest_first = reversed(self._operations.values())
        return [operation for operation in newest_first if include_done or not operation.is_done]

    def running(self, kind: str, model: str) -> Operation | None:
        """The running operation of this kind on this model."""
        return next(
            (
                operation
                for operation in self._operations.values()
                if not (operation.is_done or operation.is_ending)
                and operation.kind == kind
                and operation.model.casefold() == model.casefold()
            ),
            None,
        )

    async def watch(self, operation: Operation) -> AsyncIterator[Operation]:
        """Yield the operation at once, on changes `SNAPSHOTS_PER_SECOND` times a second at most, and, at once
        again, when it is done."""
        loop = asyncio.get_running_loop()
        while True:
            seen, is_done = operation.version, operation.is_done
            yield operation
            if is_done:
                return
            due = loop.time() + 1 / SNAPSHOTS_PER_SECOND
            while operation.version == seen:
                await self._change(operation)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    while not operation.is_done:
                        await self._change(operation)

    async def wait(self, operation: Operation) -> InstalledModel:
        """The result, or the error it ended with."""
        while not operation.is_done:
            await self._change(operation)
        if operation.error is not None:
            raise operation.error
        assert operation.result is not None
        return operation.result

    async def cancel(self, operation: Operation) -> None:
        """Stop an action and wait until it has; one that is done stays as it is."""
        await self._recorded(
            operation
        )  # A task that is cancelled before it began would never say that it is done.
        if operation.task is not None and not operation.is_done:
            operation.is_ending = True
            operation.task.cancel()
            await asyncio.wait([operation.task])

    async def close(self) -> None:
        """Stop everything; what is stopped is marked so, and can be started again."""
        for operation in list(self._operations.values()):
            await self.cancel(operation)

    async def tidy(self) -> None:
        """Forget what ended more than a week ago, and the oldest of too many; to be called now and then."""
        self._forget_old(time.time() - KEPT_OPERATION_SECONDS)
        await self._catalog.forget_operations()

    async def _recorded(self, operation: Operation) -> None:
        """Return when it is on the disk, or has ended without."""
        while not (operation.is_recorded or operation.is_done):
            await self._change(operation)

    @staticmethod
    async def _change(operation: Operation) -> None:
        """Return when it has changed."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        operation.waiters.add(waiter)
        try:
            await waiter
        finally:
            operation.waiters.discard(waiter)

    async def _run(
        self, operation: Operation, action: Callable[[Operation], Awaitable[InstalledModel]]
    ) -> None:
        try:
            await self._save(operation)
            operation.is_recorded = True
            operation.changed()
            operation.result = await action(operation)
        except asyncio.CancelledError:
            operation.error = OperationCancelledError(
                f"The {operation.kind} of '{operation.model}' was cancelled"
            )
        except ModelServerError as error:
            operation.error = error
        except Exception:
            log.exception("operation %s failed", operation.id)
            operation.error = InternalError(
                f"The {operation.kind} of '{operation.model}' failed; see the log"
            )
        operation.is_ending = True
        # Durable before anybody is told, also when a second caller cancels meanwhile.
        saved = asyncio.ensure_future(self._save(operation, is_done=True))
        try:
            while not saved.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.shield(saved)
            saved.result()
        except Exception:
            log.exception("the end of operation %s could not be saved", operation.id)
        finally:
            operation.is_done = True
            operation.changed()

    async def _save(self, operation: Operation, *, is_done: bool = False) -> None:
        done = is_done or operation.is_done
        error = operation.error
        await self._catalog.save_operation(
            OperationRecord(
                id=operation.id,
                kind=operation.kind,
                model=operation.model,
                request=json.dumps(operation.request),
                state="running" if not done else "failed" if error else "done",
                error_reason=error.reason if error else "",
                error_message=error.message if error else "",
                create_time=operation.create_time,
                update_time=operation.update_time,
            )
        )

    def _installed_by(self, operation: Operation) -> InstalledModel | None:
        """The model that an install had added to the registry when its server died."""
        model = self._catalog.find(operation.model) if operation.kind == "install" else None
        if model is None or model.create_time < operation.create_time:
            return None
        sources = (operation.request.get("model_id"), operation.request.get("local_directory"))
        return model if sources in ((model.huggingface_id, None), (None, str(model.path))) else None

    def _forget_old(self, oldest_time: float = 0.0) -> None:
        done = [operation for operation in self._operations.values() if operation.is_done]
        surplus = done[: max(0, len(done) - KEPT_OPERATIONS)]
        for operation in [*surplus, *(old for old in done if old.update_time < oldest_time)]:
            self._operations.pop(operation.id, None)
