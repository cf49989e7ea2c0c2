"""What each process imports, and that the generated code is what the contract says."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("mlx", "mlx_lm", "torch", "transformers", "tokenizers", "numpy", "huggingface_hub", "PIL")


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("mlxgui_grpc.server", (*HEAVY, "flask")),
        ("mlxgui_grpc.__main__, mlxgui_grpc.cli.serve", (*HEAVY, "flask")),
        ("rest_bridge.app, rest_bridge.__main__", (*HEAVY, "mlxgui_grpc", "sqlite3", "pydantic")),
    ],
)
def test_control_process_and_bridge_stay_light(module: str, forbidden: tuple[str, ...]) -> None:
    """No MLX and nothing of its kind, and the bridge nothing of ours but the contract."""
    script = (
        f"import sys, {module}\n"
        f"print(sorted({{name.partition('.')[0] for name in sys.modules}} & {set(forbidden)!r}))"
    )
    child = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert child.stdout.strip() == "[]"


def test_the_generated_code_is_current() -> None:
    """`make proto` would change nothing."""
    command = [sys.executable, "tools/generate_proto.py", "--check"]
    child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert child.returncode == 0, child.stderr
