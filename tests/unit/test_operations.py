"""Long actions: told to all who watch, cancelled once however many ask, and durable before anybody hears of it."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxgui_grpc.catalog import (
    KEPT_OPERATION_SECONDS,
    Catalog,
    InstalledModel,
    OperationRecord,
    Origin,
)
from mlxgui_grpc.errors import (
    InternalError,
    ModelIncompatibleError,
    OperationNotFoundError,
    ServerDrainingError,
)
from mlxgui_grpc.operations import InstallProgress, LoadProgress, Operation, Operations

MODEL = InstalledModel(name="m", origin=Origin.DIRECTORY, path=Path("/m"))
WAIT_SECONDS = 30.0


@pytest.fixture
async def catalog(tmp_path: Path) -> AsyncIterator[Catalog]:
    catalog = Catalog(tmp_path / "state.db")
    await catalog.open()
    yield catalog
    await catalog.close()


async def for_ever(operation: Operation) -> InstalledModel:
    await asyncio.Event().wait()
    raise AssertionError


async def succeed(operation: Operation) -> InstalledModel:
    return MODEL


async def start(operations: Operations, action: object = for_ever) -> Operation:
    return await operations.start("install", "m", InstallProgress(), action)  # type: ignore[arg-type]


async def test_an_operation_ends_with_its_result(catalog: Catalog) -> None:
    operations = Operations(catalog)
    operation = await start(operations, succeed)
    assert await asyncio.wait_for(operations.wait(operation), WAIT_SECONDS) is MODEL
    assert operations.get(operation.id).is_done and operations.running("install", "m") is None
    with pytest.raises(OperationNotFoundError):
        operations.get("op-none")


async def test_watchers_see_every_state_at_last_the_end(catalog: Catalog) -> None:
    go_on = asyncio.Event()

    async def action(operation: Operation) -> InstalledModel:
        assert isinstance(operation.progress, InstallProgress)
        for number in range(5):
            operation.progress.done_bytes = number
            operation.changed()
            await asyncio.sleep(0)
        await go_on.wait()
        raise ModelIncompatibleError("no")

    operations = Operations(catalog)
    operation = await start(operations, action)

    async def watch() -> list[bool]:
        seen = []
        async for state in operations.watch(operation):
            seen.append(state.is_done)
            go_on.set()
        return seen

    for seen in await asyncio.wait_for(asyncio.gather(*(watch() for _ in range(3))), WAIT_SECONDS):
        assert seen[-1] and not any(seen[:-1])
    assert isinstance(operation.error, ModelIncompatibleError)


async def test_many_who_cancel_at_once_all_hear_of_one_end(catalog: Catalog) -> None:
    """Also in the moment between the action's end and its record."""
    operations = Operations(catalog)
    for ticks in range(12):
        operation = await start(operations)
        waiting = asyncio.create_task(operations.wait(operation))
        cancels = []
        for _ in range(4):
            cancels.append(asyncio.create_task(operations.cancel(operation)))
            for _ in range(ticks):
                await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(*cancels), WAIT_SECONDS)
        assert operation.is_done and operation.error is not None and operation.error.reason == "CANCELLED"
        with pytest.raises(type(operation.error)):
            await asyncio.wait_for(waiting, WAIT_SECONDS)


async def test_cancelling_what_is_about_to_succeed_hangs_nobody(catalog: Catalog) -> None:
    operations = Operations(catalog)
    for ticks in range(8):
        operation = await start(operations, succeed)
        for _ in range(ticks):
            await asyncio.sleep(0)
        await asyncio.wait_for(operations.cancel(operation), WAIT_SECONDS)
        assert operation.is_done and (operation.result is MODEL or operation.error is not None)


async def test_what_a_dead_server_left_is_failed_and_kept(tmp_path: Path) -> None:
    """The next server answers for it; what had ended keeps its end."""
    first = Catalog(tmp_path / "state.db")
    await first.open()
    operations = Operations(first)

    async def fail(operation: Operation) -> InstalledModel:
        raise ModelIncompatibleError("it is broken")

    failed, running = await start(operations, fail), await start(operations)
    with pytest.raises(ModelIncompatibleError):
        await operations.wait(failed)
    await first.close()

    second = Catalog(tmp_path / "state.db")
    recovered = Operations(second)
    await recovered.recover(await second.open())
    assert recovered.get(failed.id).error is not None
    again = recovered.get(failed.id).error
    assert isinstance(again, ModelIncompatibleError) and again.message == "it is broken"
    lost = recovered.get(running.id)
    assert lost.is_done and lost.error is not None and "start it again" in lost.error.message
    assert [o.id for o in recovered.list(include_done=True)] == [running.id, failed.id]
    assert recovered.list(include_done=False) == []
    await second.close()
    assert running.task is not None
    running.task.cancel()


async def test_an_operation_is_on_the_disk_when_it_has_a_name(catalog: Catalog, tmp_path: Path) -> None:
    """Whoever knows its id can ask a later server for it."""
    operations = Operations(catalog)
    operation = await start(operations)
    with sqlite3.connect(tmp_path / "state.db") as other:
        assert other.execute("SELECT id, state FROM operations").fetchall() == [(operation.id, "running")]
    await operations.close()


@pytest.mark.parametrize(
    ("changes", "is_done"),
    [
        ({}, True),
        ({"model": "M"}, True),
        ({"request": '{"model_id": "other/m"}'}, False),
        ({"kind": "update"}, False),
        ({"kind": "load", "request": "{}"}, False),
        ({"create_time": 4e9}, False),
    ],
)
async def test_an_install_that_had_registered_its_model_is_done(
    changes: dict[str, Any], is_done: bool, catalog: Catalog
) -> None:
    """The server died between the two writes: that of the model and that of the operation's end."""
    record = OperationRecord(id="op-1", kind="install", model="m", request='{"model_id": "owner/m"}')
    model = await catalog.add(
        InstalledModel(name="m", origin=Origin.HUB, path=Path("/m"), huggingface_id="owner/m")
    )
    operations = Operations(catalog)
    await operations.recover([replace(record, **changes)])
    operation = operations.get("op-1")
    assert operation.is_done and operation.result == (model if is_done else None)
    assert (operation.error is None) == is_done
    if not is_done:
        with pytest.raises(ServerDrainingError, match="start it again"):
            await operations.wait(operation)


@pytest.mark.parametrize(
    ("kind", "progress"),
    [
        ("install", InstallProgress),
        ("update", InstallProgress),
        ("load_adapter", InstallProgress),
        ("load", LoadProgress),
    ],
)
async def test_every_kind_is_taken_over(kind: str, progress: type, catalog: Catalog) -> None:
    operations = Operations(catalog)
    await operations.recover([OperationRecord(id="op-1", kind=kind, model="m")])
    operation = operations.get("op-1")
    assert operation.is_done and operation.kind == kind and isinstance(operation.progress, progress)


async def test_what_ended_long_ago_is_forgotten(catalog: Catalog, tmp_path: Path) -> None:
    """In memory and on the disk; what runs is not, however old."""
    operations = Operations(catalog)
    old, recent, running = [await start(operations, a) for a in (succeed, succeed, for_ever)]
    await operations.wait(old)
    await operations.wait(recent)
    week_ago = time.time() - KEPT_OPERATION_SECONDS - 1
    for operation in (old, running):
        operation.update_time = week_ago
    with sqlite3.connect(tmp_path / "state.db") as other:
        other.execute("UPDATE operations SET update_time = ? WHERE id != ?", [week_ago, recent.id])
    await operations.tidy()
    assert [o.id for o in operations.list(include_done=True)] == [running.id, recent.id]
    with sqlite3.connect(tmp_path / "state.db") as other:
        assert {row[0] for row in other.execute("SELECT id FROM operations")} == {running.id, recent.id}
    await operations.close()


async def test_an_operation_ends_although_its_end_cannot_be_saved(
    catalog: Catalog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Who waits and who cancels hear of the end; the log says what went wrong."""
    operations = Operations(catalog)
    with sqlite3.connect(tmp_path / "state.db") as other:
        other.execute("DROP TABLE operations")
    finished, cancelled = await start(operations, succeed), await start(operations)
    with pytest.raises(InternalError):
        await asyncio.wait_for(operations.wait(finished), WAIT_SECONDS)
    await asyncio.wait_for(operations.cancel(cancelled), WAIT_SECONDS)
    assert finished.is_done and cancelled.is_done
    assert "could not be saved" in caplog.text


async def test_a_watcher_hears_of_the_end_at_once_and_of_the_rest_now_and_then(catalog: Catalog) -> None:
    """A thousand changes in a row are two snapshots: the first state and the end."""
    operations = Operations(catalog)

    async def hurry(operation: Operation) -> InstalledModel:
        for _ in range(1000):
            await asyncio.sleep(0)
            operation.changed()
        return MODEL

    operation = await start(operations, hurry)
    seen = [state.is_done async for state in operations.watch(operation)]
    assert seen[-1] and len(seen) <= 3
    assert [state.is_done async for state in operations.watch(operation)] == [True]


async def test_an_end_of_an_unknown_reason_is_taken_over(catalog: Catalog) -> None:
    operations = Operations(catalog)
    record = OperationRecord(id="op-1", kind="load", model="m", state="failed", error_reason="FROM_LATER")
    await operations.recover([record])
    assert isinstance(operations.get("op-1").error, InternalError)


async def test_names_are_compared_without_regard_to_case(catalog: Catalog) -> None:
    operations = Operations(catalog)
    operation = await start(operations)
    assert operations.running("install", "M") is operation
    assert operations.running("load", "m") is None
    await operations.close()
    assert operation.is_done
