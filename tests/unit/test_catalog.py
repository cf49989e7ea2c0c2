"""The registry: what is acknowledged is on the disk, whatever happens next."""

import asyncio
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mlxgui_grpc.catalog import (
    KEPT_OPERATION_SECONDS,
    Catalog,
    InstalledModel,
    OperationRecord,
    Origin,
)
from mlxgui_grpc.catalog_schema import SCHEMA_VERSION
from mlxgui_grpc.errors import ModelExistsError, ModelNotFoundError

MODEL = InstalledModel(name="Mine", origin=Origin.HUB, path=Path("/m"), huggingface_id="Owner/Repo")


async def opened(path: Path) -> Catalog:
    catalog = Catalog(path)
    await catalog.open()
    return catalog


async def test_models_are_found_by_name_and_hub_id_in_any_case(tmp_path: Path) -> None:
    catalog = await opened(tmp_path / "s.db")
    added = await catalog.add(MODEL)
    for name in ("mine", "MINE", "owner/repo", "OWNER/REPO"):
        assert catalog.find(name) == added
    assert catalog.find("repo") is None
    with pytest.raises(ModelNotFoundError):
        catalog.get("repo")
    with pytest.raises(ModelExistsError):
        await catalog.add(replace(MODEL, name="mINE"))
    await catalog.close()


async def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    catalog = await opened(tmp_path / "s.db")
    added = await catalog.add(MODEL)
    await catalog.update("mine", size_bytes=2**40, metadata='{"a": "ü"}', is_download=True)
    catalog.note_use("mine")
    catalog.note_use("MINE")
    before = catalog.get("mine")
    await catalog.close()

    again = await opened(tmp_path / "s.db")
    assert again.get("mine") == before
    assert (before.id, before.use_count, before.size_bytes) == (added.id, 2, 2**40)
    await again.remove("mine")
    later = await again.add(MODEL)
    assert later.id > added.id, "numbers are never used again"
    await again.close()


async def test_a_write_that_was_acknowledged_survives_without_a_close(tmp_path: Path) -> None:
    """As after kill -9: a second reader of the file sees it at once."""
    catalog = await opened(tmp_path / "s.db")
    await catalog.add(MODEL)
    with sqlite3.connect(tmp_path / "s.db") as other:
        assert other.execute("SELECT name FROM models").fetchall() == [("Mine",)]
        assert other.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    await catalog.close()


async def test_a_cancelled_writer_tears_nothing(tmp_path: Path) -> None:
    """Each write is whole or absent, however many callers leave in the middle, and memory knows which."""
    catalog = await opened(tmp_path / "s.db")
    tasks = [asyncio.create_task(catalog.add(replace(MODEL, name=f"m{i}"))) for i in range(40)]
    for index, task in enumerate(tasks):
        await asyncio.sleep(0)
        if index % 2:
            task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await catalog.close()
    again = await opened(tmp_path / "s.db")
    assert again.models() == catalog.models()
    names = {model.name for model in again.models()}
    assert {f"m{i}" for i in range(0, 40, 2)} <= names
    with sqlite3.connect(tmp_path / "s.db") as other:
        assert other.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    await again.close()


async def test_a_model_that_is_removed_during_a_change_stays_removed(tmp_path: Path) -> None:
    """Nor does the change reach another model that the name finds then."""
    catalog = await opened(tmp_path / "s.db")
    await catalog.add(replace(MODEL, name="first"))
    await catalog.add(replace(MODEL, name="second"))
    removal = asyncio.create_task(catalog.remove("first"))
    await asyncio.sleep(0)
    await asyncio.gather(removal, catalog.update("owner/repo", error_message="broken"))
    assert catalog.find("first") is None and catalog.get("second").error_message == ""
    await catalog.close()


async def test_a_change_whose_caller_leaves_is_known_when_it_is_durable(tmp_path: Path) -> None:
    catalog = await opened(tmp_path / "s.db")
    await catalog.add(MODEL)
    await catalog.add(replace(MODEL, name="other"))
    writes = (
        catalog.update("mine", pinned=True),
        catalog.remove("other"),
        catalog.save_settings({"log_level": '"DEBUG"'}),
    )
    for write in writes:
        task = asyncio.create_task(write)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await catalog.close()
    assert catalog.get("mine").pinned and catalog.find("other") is None
    assert catalog.settings() == {"log_level": '"DEBUG"'}


async def test_of_two_who_take_a_name_at_once_one_is_told(tmp_path: Path) -> None:
    catalog = await opened(tmp_path / "s.db")
    outcomes = await asyncio.gather(
        catalog.add(MODEL), catalog.add(replace(MODEL, name="MINE")), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [InstalledModel, ModelExistsError]
    assert catalog.models() == [outcomes[0]]
    await catalog.close()


async def test_settings_are_stored_all_or_none_and_forgotten(tmp_path: Path) -> None:
    catalog = await opened(tmp_path / "s.db")
    assert catalog.settings() == {}
    await catalog.save_settings({"a": "1", "b": '"ü"', "c": "null"})
    await catalog.save_settings({"a": "2", "b": None, "never_there": None})
    assert catalog.settings() == {"a": "2", "c": "null"}
    catalog.settings()["a"] = "3"
    with pytest.raises(sqlite3.ProgrammingError):
        await catalog.save_settings({"c": "4", "a": object()})  # type: ignore[dict-item]
    assert catalog.settings() == {"a": "2", "c": "null"}
    await catalog.close()
    again = await opened(tmp_path / "s.db")
    assert again.settings() == {"a": "2", "c": "null"}
    await again.close()


async def test_old_operations_are_forgotten_and_running_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a later start, and by `forget_operations` on the disk too."""
    monkeypatch.setattr("mlxgui_grpc.catalog.KEPT_OPERATIONS", 4)
    catalog = await opened(tmp_path / "s.db")
    now, week = time.time(), KEPT_OPERATION_SECONDS
    for number, (state, age) in enumerate(
        [("running", 2 * week), ("done", week + 60), ("done", 60), ("failed", 50), ("done", 40), ("done", 30)]
    ):
        time_then = now - age
        await catalog.save_operation(
            OperationRecord(
                id=f"op-{number}",
                kind="load",
                model="m",
                state=state,
                create_time=time_then,
                update_time=time_then,
            )
        )
    await catalog.close()
    again = Catalog(tmp_path / "s.db")
    kept = ["op-0", "op-3", "op-4", "op-5"]
    assert [record.id for record in await again.open()] == kept
    await again.forget_operations()
    await again.close()
    with sqlite3.connect(tmp_path / "s.db") as other:
        assert [row[0] for row in other.execute("SELECT id FROM operations ORDER BY id")] == kept


async def test_uses_are_counted_without_a_write_each(tmp_path: Path) -> None:
    catalog = await opened(tmp_path / "s.db")
    await catalog.add(MODEL)
    for _ in range(1000):
        catalog.note_use("mine")
    assert catalog.get("mine").use_count == 1000
    with sqlite3.connect(tmp_path / "s.db") as other:
        assert other.execute("SELECT use_count FROM models").fetchone() == (0,)
    await catalog.close()
    with sqlite3.connect(tmp_path / "s.db") as other:
        assert other.execute("SELECT use_count FROM models").fetchone() == (1000,)
