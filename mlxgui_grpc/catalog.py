"""What is installed: the registry of models and long operations, in SQLite.

Reads come from memory. Writes go through one thread, off the event loop, and are acknowledged when durable
(WAL, synchronous=FULL); use counters alone are gathered and written every few seconds.
"""

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from mlxgui_grpc.errors import DiskFullError, ModelExistsError, ModelNotFoundError

Result = TypeVar("Result")

SCHEMA_VERSION = 1
USE_WRITE_SECONDS = 5.0
KEPT_OPERATION_SECONDS = 7 * 24 * 3600.0
KEPT_OPERATIONS = 1_000

_SCHEMA = """
CREATE TABLE models (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,
    name_key TEXT NOT NULL UNIQUE,   -- lower case: names differ by more than case
    origin TEXT NOT NULL,            -- hub, directory or demo
    huggingface_id TEXT NOT NULL,
    revision TEXT NOT NULL,
    path TEXT NOT NULL,
    is_download INTEGER NOT NULL,    -- 1: the files came by our own download and may be removed by us
    type TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    memory_bytes INTEGER NOT NULL,
    context_length INTEGER NOT NULL,
    metadata TEXT NOT NULL,          -- JSON object
    error_message TEXT NOT NULL,
    use_count INTEGER NOT NULL,
    create_time REAL NOT NULL,       -- Unix seconds
    update_time REAL NOT NULL,
    last_use_time REAL               -- NULL: never used
);
CREATE TABLE operations (
    id TEXT PRIMARY KEY,
    kind TEXT NOT NULL,
    model TEXT NOT NULL,
    request TEXT NOT NULL,           -- JSON: what would start it again
    state TEXT NOT NULL,             -- running, done or failed
    error_reason TEXT NOT NULL,
    error_message TEXT NOT NULL,
    create_time REAL NOT NULL,
    update_time REAL NOT NULL
);
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class Origin(StrEnum):
    """Where the files of a model came from."""

    HUB = "hub"
    DIRECTORY = "directory"
    DEMO = "demo"


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledModel:
    """One row of the registry."""

    id: int = 0
    name: str
    origin: Origin
    path: Path
    huggingface_id: str = ""
    revision: str = ""
    is_download: bool = False
    type: str = "text"
    size_bytes: int = 0
    memory_bytes: int = 0
    context_length: int = 0
    metadata: str = "{}"
    error_message: str = ""
    use_count: int = 0
    create_time: float = field(default_factory=time.time)
    update_time: float = field(default_factory=time.time)
    last_use_time: float | None = None

    @property
    def author(self) -> str:
        """The owner part of the hub id."""
        return self.huggingface_id.partition("/")[0] if "/" in self.huggingface_id else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationRecord:
    """The durable part of a long operation."""

    id: str
    kind: str
    model: str
    request: str = "{}"
    state: str = "running"
    error_reason: str = ""
    error_message: str = ""
    create_time: float = field(default_factory=time.time)
    update_time: float = field(default_factory=time.time)


class Catalog:
    """The registry. Methods that change it are coroutines; the rest answer from memory, on the event loop."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="catalog")
        self._database: sqlite3.Connection | None = None
        self._models: dict[str, InstalledModel] = {}
        self._used: set[str] = set()
        self._use_timer: asyncio.TimerHandle | None = None
        self._use_write: asyncio.Task[None] | None = None

    async def open(self) -> list[OperationRecord]:
        """Open or create the database; returns the operations of earlier servers, oldest first.

        Finished ones are kept for a week, `KEPT_OPERATIONS` at most. Raises OSError, with a sentence for the user,
        when the file is no database of ours.
        """
        loop = asyncio.get_running_loop()
        try:
            models, operations = await loop.run_in_executor(self._writer, self._open)
        except sqlite3.DatabaseError as error:
            raise OSError(
                f"{self._path} cannot be read ({error}): move it away, or choose another folder with MLX_GUI_HOME"
            ) from error
        self._models = {_key(model.name): model for model in models}
        return operations

    async def close(self) -> None:
        """Write what is pending and close."""
        if self._use_timer is not None:
            self._use_timer.cancel()
        if self._use_write is not None:
            await self._use_write
        await self._write_uses()

        assert self._database is not None
        await asyncio.get_running_loop().run_in_executor(self._writer, self._database.close)
        self._writer.shutdown()

    # Models.

    def models(self) -> list[InstalledModel]:
        """All models, oldest first."""
        return sorted(self._models.values(), key=lambda model: model.id)

    def find(self, name: str) -> InstalledModel | None:
        """A model by installed name or hub id, either in any case."""
        key = _key(name)
        if model := self._models.get(key):
            return model
        if "/" not in key:
            return None
        return next((model for model in self.models() if _key(model.huggingface_id) == key), None)

    def get(self, name: str) -> InstalledModel:
        """`find`, or ModelNotFoundError."""
        model = self.find(name)
        if model is None:
            raise ModelNotFoundError.of(name)
        return model

    async def add(self, model: InstalledModel) -> InstalledModel:
        """Register a model; raises ModelExistsError when the name is taken."""
        if _key(model.name) in self._models:
            raise ModelExistsError(f"A model named '{model.name}' exists already", model=model.name)
        values = _model_values(model)
        columns = ", ".join(values)
        marks = ", ".join("?" * len(values))

        def insert(database: sqlite3.Connection) -> int:
            cursor = database.execute(
                f"INSERT INTO models ({columns}) VALUES ({marks})", list(values.values())
            )
            assert cursor.lastrowid is not None
            return cursor.lastrowid

        added = replace(model, id=await self._write(insert))
        self._models[_key(added.name)] = added
        return added

    async def update(self, name: str, **changes: Any) -> InstalledModel:
        """Change fields of a model; one that is removed meanwhile stays so."""
        changes["update_time"] = time.time()
        before = self.get(name)
        model = replace(before, **changes)
        # Only these columns: a use may be counted meanwhile.
        values = {column: value for column, value in _model_values(model).items() if column in changes}
        assignments = ", ".join(f"{column} = ?" for column in values)
        await self._write(
            lambda database: database.execute(
                f"UPDATE models SET {assignments} WHERE id = ?", [*values.values(), model.id]
            )
        )
        current = self._models.get(_key(before.name))
        if current is None or current.id != model.id:
            return model
        model = self._models[_key(before.name)] = replace(current, **changes)
        return model

    async def remove(self, name: str) -> None:
        """Forget a model; its files are somebody else's business."""
        model = self.get(name)
        await self._write(lambda database: database.execute("DELETE FROM models WHERE id = ?", [model.id]))
        self._models.pop(_key(model.name), None)

    def note_use(self, name: str) -> None:
        """Count one use, now; written within some seconds."""
        key = _key(name)
        if model := self._models.get(key):
            self._models[key] = replace(model, use_count=model.use_count + 1, last_use_time=time.time())
            self._used.add(key)
            if self._use_timer is None:
                loop = asyncio.get_running_loop()
                self._use_timer = loop.call_later(USE_WRITE_SECONDS, self._start_use_write)

    # Operations and settings.

    async def save_operation(self, record: OperationRecord) -> None:
        """Insert or replace one operation."""
        values = {name: getattr(record, name) for name in OperationRecord.__slots__}
        columns, marks = ", ".join(values), ", ".join("?" * len(values))
        await self._write(
            lambda database: database.execute(
                f"INSERT OR REPLACE INTO operations ({columns}) VALUES ({marks})", list(values.values())
            )
        )

    # The writer thread.

    async def _write(self, action: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run `action` in a transaction on the writer thread; shielded, so that a cancelled caller tears nothing."""

        def transaction() -> Result:
            assert self._database is not None, "the catalog is not open"
            try:
                with self._database:
                    return action(self._database)
            except sqlite3.OperationalError as error:
                if "full" in str(error):
                    raise DiskFullError("The disk is full: the registry could not be written") from error
                raise

        loop = asyncio.get_running_loop()
        return await asyncio.shield(loop.run_in_executor(self._writer, transaction))

    def _open(self) -> tuple[list[InstalledModel], list[OperationRecord]]:
        database = sqlite3.connect(self._path, check_same_thread=False)
        database.row_factory = sqlite3.Row
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA fullfsync = ON")  # macOS: fsync alone does not reach the platter
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise ModelExistsError(
                f"{self._path} was written by a newer version (schema {version}); upgrade, or set MLX_GUI_HOME"
            )
        if version == 0:
            database.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        self._database = database
        models = [_model_from_row(row) for row in database.execute("SELECT * FROM models")]
        with database:
            database.execute(
                "DELETE FROM operations WHERE state != 'running' AND update_time < ?",
                [time.time() - KEPT_OPERATION_SECONDS],
            )
        rows = database.execute(
            "SELECT * FROM operations ORDER BY state = 'running' DESC, create_time DESC LIMIT ?",
            [KEPT_OPERATIONS],
        )
        records = [OperationRecord(**dict(row)) for row in rows]
        return models, sorted(records, key=lambda record: record.create_time)

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
        if rows:
            await self._write(
                lambda database: database.executemany(
                    "UPDATE models SET use_count = ?, last_use_time = ? WHERE id = ?", rows
                )
            )


def _key(name: str) -> str:
    return name.casefold()


def _model_values(model: InstalledModel) -> dict[str, Any]:
    values = {name: getattr(model, name) for name in InstalledModel.__slots__ if name != "id"}
    values |= {"path": str(model.path), "origin": str(model.origin), "is_download": int(model.is_download)}
    return {**values, "name_key": _key(model.name)}


def _model_from_row(row: sqlite3.Row) -> InstalledModel:
    values = dict(row)
    del values["name_key"]
    values |= {
        "path": Path(values["path"]),
        "origin": Origin(values["origin"]),
        "is_download": bool(values["is_download"]),
    }
    return InstalledModel(**values)
