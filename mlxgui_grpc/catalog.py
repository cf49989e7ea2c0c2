"""What is installed: the registry of models, long operations and settings, in SQLite.

Reads come from memory. Writes go through one thread, off the event loop, and are acknowledged when durable
(WAL, synchronous=FULL); use counters alone are gathered and written every few seconds.
"""

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from mlxgui_grpc.catalog_rows import (
    InstalledModel,
    OperationRecord,
    Origin,
    columns_of_model,
    columns_of_operation,
    model_of,
    name_key,
)
from mlxgui_grpc.catalog_schema import open_database
from mlxgui_grpc.errors import (
    DiskFullError,
    InternalError,
    ModelExistsError,
    ModelNotFoundError,
    ModelServerError,
)
from mlxgui_grpc.failpoints import failpoint

__all__ = [
    "KEPT_OPERATIONS",
    "KEPT_OPERATION_SECONDS",
    "Catalog",
    "InstalledModel",
    "OperationRecord",
    "Origin",
]

log = logging.getLogger(__name__)

Result = TypeVar("Result")

USE_WRITE_SECONDS = 5.0
KEPT_OPERATION_SECONDS = 7 * 24 * 3600.0
KEPT_OPERATIONS = 1_000


class Catalog:
    """The registry. Methods that change it are coroutines; the rest answer from memory, on the event loop."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="catalog")
        self._database: sqlite3.Connection | None = None
        self._models: dict[str, InstalledModel] = {}
        self._settings: dict[str, str] = {}
        self._writes: set[asyncio.Task[Any]] = set()
        self._used: set[str] = set()
        self._use_timer: asyncio.TimerHandle | None = None
        self._use_write: asyncio.Task[None] | None = None

    async def open(self) -> list[OperationRecord]:
        """Open or create the database; returns the operations of earlier servers, oldest first.

        Finished ones are kept for a week, `KEPT_OPERATIONS` at most. Raises OSError, with a sentence for the user,
        when the file is no database of ours, or cannot be opened.
        """
        loop = asyncio.get_running_loop()
        try:
            models, operations, settings = await loop.run_in_executor(self._writer, self._open)
        except (OSError, sqlite3.DatabaseError) as error:
            self._writer.shutdown()
            if isinstance(error, sqlite3.DatabaseError):
                raise OSError(self._why_not_opened(error)) from error
            raise
        self._models = {name_key(model.name): model for model in models}
        self._settings = settings
        return operations

    async def close(self) -> None:
        """Write what is pending and close."""
        if self._use_timer is not None:
            self._use_timer.cancel()
        if self._use_write is not None:
            await self._use_write
        await self._write_uses()
        if self._writes:
            await asyncio.wait(self._writes)
        assert self._database is not None
        await asyncio.get_running_loop().run_in_executor(self._writer, self._database.close)
        self._writer.shutdown()

    # Models.

    def models(self) -> list[InstalledModel]:
        """All models, oldest first."""
        return sorted(self._models.values(), key=lambda model: model.id)

    def find(self, name: str) -> InstalledModel | None:
        """A model by installed name or hub id, either in any case."""
        key = name_key(name)
        if model := self._models.get(key):
            return model
        if "/" not in key:
            return None
        return next((model for model in self.models() if name_key(model.huggingface_id) == key), None)

    def get(self, name: str) -> InstalledModel:
        """`find`, or ModelNotFoundError."""
        model = self.find(name)
        if model is None:
            raise ModelNotFoundError.of(name)
        return model

    async def add(self, model: InstalledModel) -> InstalledModel:
        """Register a model; raises ModelExistsError when the name is taken."""
        if name_key(model.name) in self._models:
            raise _taken(model.name)
        values = columns_of_model(model)
        columns = ", ".join(values)
        marks = ", ".join("?" * len(values))

        def insert(database: sqlite3.Connection) -> int:
            try:
                cursor = database.execute(
                    f"INSERT INTO models ({columns}) VALUES ({marks})", list(values.values())
                )
            except sqlite3.IntegrityError:  # Another is being added at this moment.
                raise _taken(model.name) from None
            assert cursor.lastrowid is not None
            return cursor.lastrowid

        def remember(number: int) -> None:
            self._models[name_key(model.name)] = replace(model, id=number)

        number = await self._write(insert, remember)
        return replace(model, id=number)

    async def update(self, name: str, **changes: Any) -> InstalledModel:
        """Change fields of a model; one that is removed meanwhile stays so."""
        changes["update_time"] = time.time()
        before = self.get(name)
        key = name_key(before.name)
        model = replace(before, **changes)
        # Only these columns: a use may be counted meanwhile.
        values = {column: value for column, value in columns_of_model(model).items() if column in changes}
        assignments = ", ".join(f"{column} = ?" for column in values)

        def change(database: sqlite3.Connection) -> None:
            database.execute(f"UPDATE models SET {assignments} WHERE id = ?", [*values.values(), model.id])

        def remember(_: None) -> None:
            current = self._models.get(key)
            if current is not None and current.id == model.id:
                self._models[key] = replace(current, **changes)

        await self._write(change, remember)
        current = self._models.get(key)
        return current if current is not None and current.id == model.id else model

    async def remove(self, name: str) -> None:
        """Forget a model; its files are somebody else's business."""
        model = self.get(name)

        def delete(database: sqlite3.Connection) -> None:
            database.execute("DELETE FROM models WHERE id = ?", [model.id])

        def forget(_: None) -> None:
            self._models.pop(name_key(model.name), None)

        await self._write(delete, forget)

    def note_use(self, name: str) -> None:
        """Count one use, now; written within some seconds."""
        key = name_key(name)
        if model := self._models.get(key):
            self._models[key] = replace(model, use_count=model.use_count + 1, last_use_time=time.time())
            self._used.add(key)
            if self._use_timer is None:
                loop = asyncio.get_running_loop()
                self._use_timer = loop.call_later(USE_WRITE_SECONDS, self._start_use_write)

    # Settings.

    def settings(self) -> dict[str, str]:
        """What is stored, as JSON texts by key."""
        return dict(self._settings)

    async def save_settings(self, values: Mapping[str, str | None]) -> None:
        """Store JSON texts by key, all of them or none; None forgets a key."""
        kept = {key: value for key, value in values.items() if value is not None}
        forgotten = [key for key, value in values.items() if value is None]

        def save(database: sqlite3.Connection) -> None:
            database.executemany("INSERT OR REPLACE INTO settings (key, value) VALUES (?, ?)", kept.items())
            database.executemany("DELETE FROM settings WHERE key = ?", ([key] for key in forgotten))

        def remember(_: None) -> None:
            self._settings |= kept
            for key in forgotten:
                self._settings.pop(key, None)

        await self._write(save, remember)

    # Operations.

    async def save_operation(self, record: OperationRecord) -> None:
        """Insert or replace one operation."""
        values = columns_of_operation(record)
        columns, marks = ", ".join(values), ", ".join("?" * len(values))

        def save(database: sqlite3.Connection) -> None:
            database.execute(
                f"INSERT OR REPLACE INTO operations ({columns}) VALUES ({marks})", list(values.values())
            )

        await self._write(save)

    async def forget_operations(self) -> None:
        """Delete the finished operations that `open` would not return any more."""
        oldest = time.time() - KEPT_OPERATION_SECONDS

        def delete(database: sqlite3.Connection) -> None:
            database.execute(
                "DELETE FROM operations WHERE state != 'running' AND (update_time < ? OR id NOT IN "
                "(SELECT id FROM operations ORDER BY state = 'running' DESC, create_time DESC LIMIT ?))",
                [oldest, KEPT_OPERATIONS],
            )

        await self._write(delete)

    # The writer thread.

    async def _write(
        self,
        action: Callable[[sqlite3.Connection], Result],
        remember: Callable[[Result], None] = lambda result: None,
    ) -> Result:
        """Run `action` in a transaction on the writer thread and then `remember` on the event loop.

        A caller that is cancelled leaves the wait; the write goes on, and memory follows it. Raises DiskFullError,
        or InternalError when the disk fails in another way.
        """

        def transaction() -> Result:
            assert self._database is not None, "the catalog is not open"
            failpoint("catalog.before-write")
            try:
                with self._database:
                    result = action(self._database)
                    failpoint("catalog.before-commit")
            except sqlite3.OperationalError as error:
                # The log may hold all of it and only the sync have failed: the next start would believe the log.
                with contextlib.suppress(sqlite3.OperationalError):
                    self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                raise self._why_not_written(error) from error
            failpoint("catalog.after-commit")
            return result

        async def write() -> Result:
            result = await asyncio.get_running_loop().run_in_executor(self._writer, transaction)
            remember(result)
            return result

        task = asyncio.get_running_loop().create_task(write())
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        return await asyncio.shield(task)

    def _why_not_written(self, error: sqlite3.OperationalError) -> ModelServerError:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            return DiskFullError(f"The disk is full: {self._path} could not be written; free some space")
        return InternalError(
            f"{self._path} could not be written ({error}): check its disk, and that no other program holds it"
        )

    def _why_not_opened(self, error: sqlite3.DatabaseError) -> str:
        code = error.sqlite_errorcode & 0xFF  # The rest of it says where.
        if code == sqlite3.SQLITE_FULL:
            return (
                f"The disk is full: {self._path} could not be written; free some space, or set MLX_GUI_HOME"
            )
        if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR):
            return f"{self._path} cannot be read ({error}): move it away, or choose another folder with MLX_GUI_HOME"
        return (
            f"{self._path} cannot be opened ({error}): check its disk and that no other program holds it, or choose "
            "another folder with MLX_GUI_HOME"
        )

    def _open(self) -> tuple[list[InstalledModel], list[OperationRecord], dict[str, str]]:
        database = self._database = open_database(self._path)
        models = [model_of(row) for row in database.execute("SELECT * FROM models")]
        settings = {row["key"]: row["value"] for row in database.execute("SELECT key, value FROM settings")}
        # No write, so that a server starts on a full disk too: `forget_operations` deletes what is left out.
        rows = database.execute(
            "SELECT * FROM operations WHERE state = 'running' OR update_time >= ? "
            "ORDER BY state = 'running' DESC, create_time DESC LIMIT ?",
            [time.time() - KEPT_OPERATION_SECONDS, KEPT_OPERATIONS],
        )
        operations = [OperationRecord(**dict(row)) for row in rows]
        return models, sorted(operations, key=lambda record: record.create_time), settings

    def _start_use_write(self) -> None:
        self._use_timer = None
        self._use_write = asyncio.get_running_loop().create_task(self._write_uses())

    async def _write_uses(self) -> None:
        used, self._used = self._used, set()
        rows = [
            (model.use_count, model.last_use_time, model.id)
            for key in used
            if (model := self._models.get(key)) is not None
        ]
        if not rows:
            return
        try:
            await self._write(
                lambda database: database.executemany(
                    "UPDATE models SET use_count = ?, last_use_time = ? WHERE id = ?", rows
                )
            )
        except ModelServerError as error:  # Counts can wait for the next use.
            self._used |= used
            log.warning("uses not counted yet: %s", error.message)


def _taken(name: str) -> ModelExistsError:
    return ModelExistsError(f"A model named '{name}' exists already", model=name)
