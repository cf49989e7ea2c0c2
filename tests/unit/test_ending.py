"""The end of a run: a stop goes before a restart, the earliest deadline counts, idle ends the wait at once."""

import asyncio

import pytest

from mlxgui_grpc.ending import Ending


@pytest.mark.parametrize(
    ("asked", "is_restart"),
    [
        ([True], True),
        ([True, True], True),
        ([True, False], False),
        ([False, True], False),
        ([True, False, True], False),
    ],
)
async def test_a_stop_goes_before_a_restart(asked: list[bool], is_restart: bool) -> None:
    ending = Ending()
    for restart in asked:
        ending.ask(restart=restart, grace_seconds=1)
    await ending.asked()
    assert ending.is_restart is is_restart


async def test_the_wait_ends_when_nothing_runs() -> None:
    ending, idle = Ending(), asyncio.Event()
    ending.ask(restart=False, grace_seconds=1e9)
    waiting = asyncio.get_running_loop().create_task(ending.wait_for(idle))
    await asyncio.sleep(0)
    assert not waiting.done()
    idle.set()
    assert await asyncio.wait_for(waiting, 10)


async def test_a_later_call_can_only_shorten_the_wait() -> None:
    ending, idle = Ending(), asyncio.Event()
    ending.ask(restart=True, grace_seconds=1e9)
    waiting = asyncio.get_running_loop().create_task(ending.wait_for(idle))
    await asyncio.sleep(0)
    ending.ask(restart=True, grace_seconds=0)
    ending.ask(restart=True, grace_seconds=1e9)
    assert not await asyncio.wait_for(waiting, 10)


async def test_no_grace_waits_for_nothing() -> None:
    ending = Ending()
    ending.ask(restart=False, grace_seconds=0)
    assert not await asyncio.wait_for(ending.wait_for(asyncio.Event()), 10)
