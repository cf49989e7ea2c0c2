"""The registry: what is acknowledged is on the disk, whatever happens next."""

import asyncio
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from mlxgui_grpc.catalog import SCHEMA_VERSION, Catalog, InstalledModel, Origin
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
    """Each write is whole or absent, however many callers leave in the middle."""
    catalog = await opened(tmp_path / "s.db")
    tasks = [asyncio.create_task(catalog.add(replace(MODEL, name=f"m{i}"))) for i in range(40)]
    for index, task in enumerate(tasks):
        await asyncio.sleep(0)
        if index % 2:
            task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await catalog.close()
    again = await opened(tmp_path / "s.db")
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
