"""Failpoints do nothing unless one is armed, and then what they are told to, at the time that they are told to."""

import errno
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlxgui_grpc
from mlxgui_grpc import failpoints
from mlxgui_grpc.failpoints import arm, failpoint


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm("", control_pid=0)


def test_a_place_that_is_not_armed_is_passed() -> None:
    arm("", control_pid=0)
    failpoint("catalog.before-write")
    arm("elsewhere:eio", control_pid=0)
    failpoint("catalog.before-write")


@pytest.mark.parametrize(("action", "number"), [("eio", errno.EIO), ("enospc", errno.ENOSPC)])
def test_a_disk_fails_from_the_n_th_time_on(action: str, number: int) -> None:
    arm(f"here:{action}:3", control_pid=0)
    failpoint("here")
    failpoint("here")
    for _ in range(2):
        with pytest.raises(OSError) as raised:
            failpoint("here")
        assert raised.value.errno == number


@pytest.mark.parametrize("text", ["here", "here:explode", "here:kill:often"])
def test_what_is_no_failpoint_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        arm(text, control_pid=0)


def test_every_place_has_a_name_that_tests_can_find() -> None:
    """The campaigns read the names from the source."""
    for source in Path(mlxgui_grpc.__file__).parent.rglob("*.py"):
        if source != Path(failpoints.__file__):
            text = source.read_text()
            named = re.findall(r'\bfailpoint\("[a-z]+\.[a-z-]+"\)', text)
            assert len(re.findall(r"\bfailpoint\(", text)) == len(named), source
