"""The systems that are measured: each knows how to start itself for one model and where to reach it."""

from collections.abc import Mapping

from bench.systems.base import System
from bench.systems.engine import BareEngine
from bench.systems.openai_server import OpenAIServer
from bench.systems.ours import Ours

# One line adds a peer: anything that streams OpenAI chat completions is an OpenAIServer.
SYSTEMS: Mapping[str, System] = {
    "engine": BareEngine(),
    "ours": Ours(),
    "mlx_lm": OpenAIServer(
        command=(
            "{python}", "-m", "mlx_lm", "server",
            "--model", "{model}", "--host", "127.0.0.1", "--port", "{port}", "--log-level", "WARNING",
        ),
        ready_path="/health",
        process_name="mlx_lm.server",
    ),
}  # fmt: skip
