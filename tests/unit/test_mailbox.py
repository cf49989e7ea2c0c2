"""Where a request's events wait: in order, joined, bounded."""

import asyncio

import pytest

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.mailbox import PAUSE_AT_EVENTS, Mailbox
from mlxgui_grpc.errors import EngineDeadError, ModelServerError, SlowConsumerError


class Row:
    """The engine's side of a mailbox, as a record of what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.mailbox = Mailbox(
            pause=lambda: self.told.append("pause"),
            resume=lambda: self.told.append("resume"),
            abandon=lambda: self.told.append("abandon"),
        )


def piece(number: int) -> frames.Piece:
    return frames.Piece(number, 1, str(number))


async def test_the_reader_takes_everything_that_waits_in_order() -> None:
    row = Row()
    for number in range(5):
        row.mailbox.put(piece(number))
    assert await row.mailbox.take() == [piece(number) for number in range(5)]
    reader = asyncio.create_task(row.mailbox.take())
    await asyncio.sleep(0)
    assert not reader.done()
    row.mailbox.put(piece(9))
    assert await reader == [piece(9)]
    assert row.told == []


async def test_a_full_mailbox_pauses_its_rows_and_resumes_them_when_read() -> None:
    row = Row()
    for number in range(PAUSE_AT_EVENTS - 1):
        row.mailbox.put(piece(number))
    assert row.told == []
    for number in range(3):
        row.mailbox.put(piece(number))
    assert row.told == ["pause"], "once"
    assert len(await row.mailbox.take()) == PAUSE_AT_EVENTS + 2
    assert row.told == ["pause", "resume"]


async def test_an_error_comes_after_what_was_delivered_before_it_and_the_first_wins() -> None:
    row = Row()
    row.mailbox.put(piece(1))
    row.mailbox.fail(EngineDeadError("first"))
    row.mailbox.fail(SlowConsumerError("second"))
    assert await row.mailbox.take() == [piece(1)]
    for _ in range(2):
        with pytest.raises(ModelServerError, match="first"):
            await row.mailbox.take()


async def test_a_reader_that_waits_hears_of_the_error() -> None:
    row = Row()
    reader = asyncio.create_task(row.mailbox.take())
    await asyncio.sleep(0)
    row.mailbox.fail(EngineDeadError("gone"))
    with pytest.raises(EngineDeadError):
        await reader
