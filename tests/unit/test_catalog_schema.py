"""The registry of every released version opens in this one with everything in it; a later one is left alone.

`tests/fixtures/state-vN.sql` is a dump of a file that version N of the schema wrote. A new version adds its own.
"""

import os
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from mlxgui_grpc import catalog_schema
from mlxgui_grpc.catalog import Catalog, InstalledModel, Origin
from mlxgui_grpc.catalog_schema import SCHEMA_VERSION, open_database
from mlxgui_grpc.failpoints import ENVIRONMENT

FIXTURES = Path(__file__).parent.parent / "fixtures"
RELEASED = sorted(int(path.stem.partition("-v")[2]) for path in FIXTURES.glob("state-v*.sql"))
STEPS_POINTS = [
    point
    for point in re.findall(r'failpoint\("(.+?)"\)', Path(catalog_schema.__file__).read_text())
    if point.startswith("migration.")
]

DEMO = InstalledModel(
    id=1,
    name="demo",
    origin=Origin.DEMO,
    path=Path("/opt/demo"),
    size_bytes=3,
    memory_bytes=9,
    context_length=2048,
    metadata='{"architecture": "llama"}',
    create_time=1764000000.0,
    update_time=1764000000.0,
)
QWEN = InstalledModel(
    id=3,
    name="Qwen3-Ü",
    origin=Origin.HUB,
    path=Path("/hub/models--Owner--Qwen3/snapshots/a"),
    huggingface_id="Owner/Qwen3",
    revision="a" * 40,
    is_download=True,
    size_bytes=2**41,
    memory_bytes=2**42,
    context_length=32768,
    metadata='{"it\'s": "\\"ü\\""}',
    error_message="broken; then; not",
    use_count=7,
    create_time=1764000001.5,
    update_time=1764000002.25,
    last_use_time=1764000003.125,
)


def written_by(version: int, folder: Path) -> Path:
    """A registry as that version left it."""
    path = folder / "state.db"
    with closing(sqlite3.connect(path)) as database:
        database.executescript((FIXTURES / f"state-v{version}.sql").read_text())
    return path


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as database:
        return [*database.iterdump(), str(database.execute("PRAGMA user_version").fetchone())]


def form(path: Path) -> list[tuple[str, str]]:
    """Tables with their columns, in no matter what order they were added."""
    with closing(sqlite3.connect(path)) as database:
        tables = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return sorted(
            (table, str(sorted(row[1:] for row in database.execute(f"PRAGMA table_info({table})"))))
            for table in tables
        )


@pytest.mark.parametrize("version", RELEASED)
async def test_nothing_is_lost_on_the_way_from_a_released_version(version: int, tmp_path: Path) -> None:
    """Every field of every row; numbers that were given are not given again; the old file is kept beside the new."""
    path = written_by(version, tmp_path)
    before = dump(path)
    catalog = Catalog(path)
    operations = await catalog.open()
    assert catalog.models() == [DEMO, QWEN]
    assert catalog.settings() == {"log_level": '"DEBUG"'}
    assert [(o.id, o.kind, o.model, o.state, o.error_reason, o.error_message) for o in operations] == [
        ("op-done", "install", "Qwen3-Ü", "done", "", ""),
        ("op-failed", "load", "demo", "failed", "MODEL_LOAD_FAILED", "no"),
        ("op-running", "install", "later", "running", "", ""),
    ]
    assert operations[0].request == '{"model_id": "Owner/Qwen3"}' and operations[0].update_time == 4e9
    assert (await catalog.add(InstalledModel(name="new", origin=Origin.HUB, path=Path("/n")))).id == 4
    await catalog.update("demo", pinned=True)
    await catalog.close()
    if version < SCHEMA_VERSION:
        assert dump(tmp_path / f"state.v{version}.db") == before

    new = Catalog(tmp_path / "new.db")
    await new.open()
    await new.close()
    assert form(path) == form(tmp_path / "new.db")
    again = Catalog(path)
    await again.open()
    assert again.get("demo").pinned and not again.get("Qwen3-Ü").pinned
    await again.close()
    assert sorted(p.name for p in tmp_path.glob("state.v*")) == [
        f"state.v{v}.db" for v in [version] if v < SCHEMA_VERSION
    ], "one copy, and none for a file that was new already"


def test_a_new_version_comes_with_a_file_of_the_one_before() -> None:
    """Whoever adds a step dumps a registry of the version that is out by then."""
    assert list(range(1, len(RELEASED) + 1)) == RELEASED
    assert len(RELEASED) >= SCHEMA_VERSION - 1


@pytest.mark.parametrize("point", STEPS_POINTS)
def test_a_migration_that_is_killed_leaves_the_old_or_the_new(point: str, tmp_path: Path) -> None:
    """kill -9 at every place of it; the copy is whole or absent, and the next start finishes."""
    path = written_by(1, tmp_path)
    before = dump(path)
    program = (
        "import os; from mlxgui_grpc import catalog_schema, failpoints; from pathlib import Path;"
        f"failpoints.arm(os.environ[{ENVIRONMENT!r}], os.getpid());"
        f"catalog_schema.open_database(Path({str(path)!r}))"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, ENVIRONMENT: f"{point}:kill"}, check=False
    )
    assert killed.returncode == -signal.SIGKILL, "the place is not on the way"
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        (version,) = database.execute("PRAGMA user_version").fetchone()
        columns = [row[1] for row in database.execute("PRAGMA table_info(models)")]
    assert (version == 1) == ("pinned" not in columns)
    if version == 1:
        assert dump(path) == before
    copy = tmp_path / "state.v1.db"
    assert copy.exists() == (point != "migration.before-backup")
    assert not copy.exists() or dump(copy) == before
    with closing(open_database(path)) as database:
        assert database.execute("SELECT count(*), sum(pinned) FROM models").fetchone()[:] == (2, 0)
    assert dump(copy) == before


def test_a_step_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ran of it before is undone; the steps before it stand."""
    path = written_by(1, tmp_path)
    broken = "CREATE TABLE extra (x); DROP TABLE settings; INSERT INTO no_such_table VALUES (1);"
    with monkeypatch.context() as patched:
        patched.setattr(catalog_schema, "STEPS", (*catalog_schema.STEPS, broken))
        patched.setattr(catalog_schema, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
        with pytest.raises(sqlite3.OperationalError, match="no_such_table"):
            open_database(path)
    with closing(open_database(path)) as database:
        tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master")}
        assert "extra" not in tables and "settings" in tables
        assert database.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION


async def test_a_registry_of_a_newer_version_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with closing(sqlite3.connect(path)) as database:
        database.executescript("CREATE TABLE later (x); PRAGMA user_version = 99;")
    before = path.read_bytes()
    with pytest.raises(OSError, match=r"newer version.*schema 99.*upgrade.*MLX_GUI_HOME"):
        await Catalog(path).open()
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["state.db"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"this is no database" * 100, "move it away"), (None, "cannot be opened")],
)
async def test_what_is_no_registry_is_refused_with_the_way_out(
    content: bytes | None, words: str, tmp_path: Path
) -> None:
    """A file of something else stays as it is; a folder in its place is no database that could be moved away."""
    path = tmp_path / "state.db"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(OSError, match=words):
        await Catalog(path).open()
    assert content is None or path.read_bytes() == content
