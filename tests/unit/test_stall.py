"""When a worker counts as stuck: by what is owed to whom, with a clock that moves when told."""

import pytest

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.stall import StallWatch


class Watched:
    """A watch and its clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.watch = StallWatch(1000.0, lambda seconds: None, clock=lambda: self.now)

    def after(self, seconds: float) -> float:
        """The silence that the watch sees so much later."""
        self.now += seconds
        return self.watch.quiet_seconds

    def start(self, *keys: int) -> None:
        """Rows whose prompts are tokenized."""
        self.watch.asked(keys)
        self.watch.accepted(keys, keys)


@pytest.fixture
async def watched() -> Watched:
    return Watched()


def usage(work_count: int) -> frames.Usage:
    return frames.Usage(0, 0, 0, 0, 1, 0, 0, work_count)


async def test_nobody_waits_no_silence(watched: Watched) -> None:
    assert watched.after(50) == 0
    watched.watch.asked((1,))
    assert watched.after(5) == 5, "not the 50 seconds before it"
    watched.watch.closed(1)
    assert watched.after(50) == 0


async def test_tokens_and_chunks_of_prompts_are_signs_of_life(watched: Watched) -> None:
    watched.start(1)
    assert watched.after(9) == 9
    watched.watch.progressed()
    assert watched.after(2) == 2


async def test_a_report_is_a_sign_of_life_only_if_something_was_done(watched: Watched) -> None:
    watched.start(1)
    watched.watch.reported(usage(10))
    assert watched.after(3) == 3
    watched.watch.reported(usage(10))
    assert watched.after(3) == 6
    watched.watch.reported(usage(2058))
    assert watched.after(1) == 1


async def test_prompts_that_are_accepted_do_not_hide_that_no_row_gets_on(watched: Watched) -> None:
    watched.start(1)
    for key in range(2, 12):
        watched.after(1)
        watched.start(key)
    assert watched.watch.quiet_seconds == 10


async def test_tokens_do_not_hide_that_no_prompt_is_accepted(watched: Watched) -> None:
    watched.start(1)
    watched.watch.asked((2,))
    for _ in range(10):
        watched.after(1)
        watched.watch.progressed()
    assert watched.watch.quiet_seconds == 10


async def test_nothing_is_owed_to_a_row_whose_reader_is_slow(watched: Watched) -> None:
    watched.start(1)
    watched.watch.paused(1)
    assert watched.after(50) == 0
    watched.watch.resumed(1)
    assert watched.after(2) == 2


async def test_a_row_paused_before_its_prompt_was_accepted_stays_paused(watched: Watched) -> None:
    watched.watch.asked((1, 2))
    watched.watch.paused(1)
    watched.watch.accepted((1,), (1,))
    watched.watch.answered((2,))
    assert watched.after(50) == 0
