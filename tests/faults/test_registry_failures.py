"""The disk fails under the registry, at each of its operations in turn: the error says why, and nothing has changed."""

import itertools
import shutil
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from mlxgui_grpc.catalog import Catalog, InstalledModel, OperationRecord, Origin
from mlxgui_grpc.errors import ModelServerError
from mlxgui_grpc.operations import InstallProgress, Operation, Operations
from tests.faults.failing_disk import FailingDisk, disk
from tests.unit.test_catalog_schema import dump, written_by

__all__ = ["disk"]

MODEL = InstalledModel(name="mine", origin=Origin.HUB, path=Path("/m"), huggingface_id="owner/mine")
OPERATION = OperationRecord(id="op-1", kind="install", model="mine")

Write = Callable[[Catalog], Awaitable[object]]

WRITES: dict[str, Write] = {
    "add": lambda catalog: catalog.add(replace(MODEL, name="other")),
    "update": lambda catalog: catalog.update("mine", pinned=True),
    "remove": lambda catalog: catalog.remove("mine"),
    "settings": lambda catalog: catalog.save_settings({"a": "2", "b": "1", "c": None}),
    "operation": lambda catalog: catalog.save_operation(replace(OPERATION, state="done")),
}


def in_memory(catalog: Catalog) -> tuple[list[InstalledModel], dict[str, str]]:
    return catalog.models(), catalog.settings()


def after_a_kill(path: Path, number: int) -> list[str]:
    """What a server finds that starts after a kill -9 at this moment."""
    folder = path.parent / f"killed-{number}"
    folder.mkdir()
    for name in (path.name, path.name + "-wal"):
        if path.with_name(name).exists():
            shutil.copy(path.with_name(name), folder)
    return dump(folder / path.name)


@pytest.mark.parametrize("is_full", [True, False], ids=["full", "broken"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
async def test_a_write_that_fails_changes_nothing(
    write: Write, is_full: bool, disk: FailingDisk, tmp_path: Path
) -> None:
    """Neither in memory nor on the disk, nor for a server that starts after a kill; the next write works."""
    path = tmp_path / "state.db"
    catalog = Catalog(path)
    await catalog.open()
    await catalog.add(MODEL)
    await catalog.save_settings({"a": "1", "c": "1"})
    await catalog.save_operation(OPERATION)
    memory, stored = in_memory(catalog), dump(path)
    for number in itertools.count(1):
        disk.fail(number, is_full=is_full)
        try:
            await write(catalog)
        except ModelServerError as error:
            assert (error.reason == "DISK_FULL") == is_full, error
            assert error.reason in ("DISK_FULL", "INTERNAL") and str(path) in error.message
        else:
            break
        finally:
            disk.heal()
        assert in_memory(catalog) == memory and dump(path) == stored
        assert after_a_kill(path, number) == stored
    assert number > 2, "the disk failed nowhere"
    assert in_memory(catalog) != memory or dump(path) != stored
    changed = dump(path)
    await catalog.close()
    assert dump(path) == changed


@pytest.mark.parametrize("is_full", [True, False], ids=["full", "broken"])
@pytest.mark.parametrize("version", [0, 1, 2])
async def test_an_open_that_fails_changes_nothing(
    version: int, is_full: bool, disk: FailingDisk, tmp_path: Path
) -> None:
    """Of a new registry, of one that has to be migrated, and of one that does not: the sentence says why, the rows stay
    and the next open works."""
    original = tmp_path / "original"
    original.mkdir()
    if version == 1:
        written_by(1, original)
    elif version == 2:
        catalog = Catalog(original / "state.db")
        await catalog.open()
        await catalog.add(MODEL)
        await catalog.close()
    for number in itertools.count(1):
        home = tmp_path / str(number)
        shutil.copytree(original, home)
        path = home / "state.db"
        rows = dump(path) if version else []
        catalog = Catalog(path)
        disk.fail(number, is_full=is_full)
        try:
            await catalog.open()
        except OSError as error:
            assert str(path) in str(error)
            assert "The disk is full" in str(error) or "check its disk" in str(error)
        else:
            break
        finally:
            disk.heal()
        found = dump(path)
        if version and found != rows:
            with closing(sqlite3.connect(path)) as database:
                assert database.execute("PRAGMA user_version").fetchone() != (version,), "neither old nor new"
        again = Catalog(path)
        await again.open()
        assert len(again.models()) == {0: 0, 1: 2, 2: 1}[version]
        await again.close()
    await catalog.close()
    assert number > (1 if version == 2 else 3), "the disk failed nowhere"


async def test_an_install_whose_record_cannot_be_written_ends_with_the_reason(
    disk: FailingDisk, tmp_path: Path
) -> None:
    """At its beginning, at its end and between them, on a disk that is full from then on: one end for all who wait."""
    path = tmp_path / "state.db"
    catalog = Catalog(path)
    await catalog.open()
    operations = Operations(catalog)

    async def install(operation: Operation) -> InstalledModel:
        return await catalog.add(MODEL)

    ends = []
    for number in itertools.count(1):
        stored = catalog.find("mine")
        disk.fail(number, is_full=True)
        operation = await operations.start("install", "mine", InstallProgress(), install)
        try:
            ends.append((await operations.wait(operation)).name)
        except ModelServerError as error:
            ends.append(error.reason)
            assert catalog.find("mine") == stored
        disk.heal()
        assert operation.is_done
        if ends[-1] == "mine":
            break
    assert set(ends[:-1]) == {"DISK_FULL"} and len(ends) > 2
    assert catalog.find("mine") is not None
    await catalog.close()


async def test_a_start_on_a_full_disk_takes_over_what_ran(disk: FailingDisk, tmp_path: Path) -> None:
    """It cannot be written that it has failed; the next start finds it running once more."""
    path = tmp_path / "state.db"
    catalog = Catalog(path)
    await catalog.open()
    await catalog.save_operation(OPERATION)
    await catalog.close()
    for is_full in (True, False):
        again = Catalog(path)
        found = await again.open()
        assert [record.state for record in found] == ["running"]
        operations = Operations(again)
        if is_full:
            disk.fail(1, is_full=True)
        await operations.recover(found)
        disk.heal()
        assert operations.get(OPERATION.id).is_done
        await again.close()


async def test_uses_that_cannot_be_written_are_written_later(disk: FailingDisk, tmp_path: Path) -> None:
    """A full disk costs neither the counts nor an orderly end."""
    path = tmp_path / "state.db"
    catalog = Catalog(path)
    await catalog.open()
    await catalog.add(MODEL)
    catalog.note_use("mine")
    disk.fail(1, is_full=True)
    await catalog._write_uses()
    disk.heal()
    catalog.note_use("mine")
    await catalog.close()
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT use_count FROM models").fetchone() == (2,)
    full = Catalog(path)
    await full.open()
    full.note_use("mine")
    disk.fail(1, is_full=True)
    await full.close()
