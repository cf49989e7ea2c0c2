"""What a restart leaves is for the program that follows in the same process; what it ends are its own children."""

import os
import subprocess
from collections.abc import Iterator

import msgspec
import psutil
import pytest

from mlxgui_grpc.handover import Handover, end_children, present_children, take_handover

OTHERS = {"PATH": "/bin"}


def test_it_is_taken_out_of_the_environment_by_the_process_that_left_it() -> None:
    left = Handover(process_id=os.getpid(), lock=7, rest_port=1, grpc_port=2, models=("a", "ü"))
    environ = {**OTHERS, "MLX_GUI_HANDOVER": msgspec.json.encode(left).decode()}
    assert take_handover(environ) == left and environ == OTHERS
    assert take_handover(environ) is None


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", "{}", '{"process_id": 1, "lock": 7, "rest_port": 1, "grpc_port": 2, "models": []}'],
)
def test_what_is_of_another_process_or_none_is_dropped(text: str) -> None:
    environ = {**OTHERS, "MLX_GUI_HANDOVER": text}
    assert take_handover(environ) is None and environ == OTHERS


@pytest.fixture
def shell() -> "Iterator[subprocess.Popen[str]]":
    """A child with a child of its own."""
    with subprocess.Popen(
        ["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        for child in psutil.Process(process.pid).children():
            child.kill()
        process.kill()


async def test_children_from_before_the_program_are_not_ended(shell: "subprocess.Popen[str]") -> None:
    """As in `sh -c 'x & exec mlxgui serve'`; theirs, too, are theirs."""
    assert shell.stdout is not None
    theirs = psutil.Process(int(shell.stdout.readline()))
    before = present_children()
    own = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    assert own.stdout is not None
    grandchild = psutil.Process(int(own.stdout.readline()))
    await end_children(before)
    own.wait()
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE
    assert shell.poll() is None and theirs.is_running()
