"""What a restart leaves in the environment is for the program that follows in the same process, and for no other."""

import os

import msgspec
import pytest

from mlxgui_grpc.handover import Handover, take_handover

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
