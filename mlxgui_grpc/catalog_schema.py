"""The registry's tables, and the steps that bring a database of any released version to this one."""

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from mlxgui_grpc.failpoints import failpoint

log = logging.getLogger(__name__)

_V1 = """
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

_V2 = """
ALTER TABLE models ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0;  -- 1: never evicted
"""

STEPS = (_V1, _V2)
"""The n-th step makes version n of version n − 1; a new database takes them all. A released step never changes."""

SCHEMA_VERSION = len(STEPS)


def open_database(path: Path) -> sqlite3.Connection:
    """Open or create the registry in this version's form; what is done on it is durable when it is committed.

    Before its form changes, the database is copied beside itself. Raises OSError when a newer version wrote it, and
    sqlite3.Error.
    """
    database = sqlite3.connect(path, check_same_thread=False)
    try:
        database.row_factory = sqlite3.Row
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise OSError(
                f"{path} was written by a newer version (schema {version}, this one knows {SCHEMA_VERSION}): upgrade, "
                "or choose another folder with MLX_GUI_HOME"
            )
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA fullfsync = ON")  # macOS: fsync alone does not reach the platter
        if 0 < version < SCHEMA_VERSION:
            backup = _back_up(database, path, version)
            log.info("registry: schema %d becomes %d; a copy is in %s", version, SCHEMA_VERSION, backup)
        for number, step in enumerate(STEPS[version:], version + 1):
            database.executescript(f"BEGIN IMMEDIATE; {step} PRAGMA user_version = {number};")
            failpoint("migration.before-commit")
            database.commit()
            failpoint("migration.after-commit")
    except BaseException:
        database.close()  # Ends an unfinished step as if it had never begun.
        raise
    return database


def _back_up(database: sqlite3.Connection, path: Path, version: int) -> Path:
    """Copy the database to `state.v1.db` beside it; the copy is whole or absent."""
    backup = path.with_name(f"{path.stem}.v{version}{path.suffix}")
    temporary = backup.with_name(backup.name + ".new")
    temporary.unlink(missing_ok=True)
    with closing(sqlite3.connect(temporary)) as copy:
        database.backup(copy)
    with temporary.open("rb") as written:
        os.fsync(written.fileno())
    failpoint("migration.before-backup")
    temporary.replace(backup)
    failpoint("migration.after-backup")
    return backup
