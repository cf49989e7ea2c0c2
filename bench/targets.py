"""The targets: the rows of the report, each a way to reach a system."""

from dataclasses import dataclass

from bench.protocol import Mode


@dataclass(frozen=True)
class Target:
    name: str
    title: str
    # A key of systems.SYSTEMS; targets of one system share its processes.
    system: str
    # Kind of client: "engine", "grpc" or "sse".
    client: str
    mode: Mode = ""


TARGETS = (
    Target("lock-step", "BatchGenerator, lock-step", "engine", "engine", "lock-step"),
    Target("staggered", "BatchGenerator, staggered", "engine", "engine", "staggered"),
    Target("grpc", "mlxgui gRPC", "ours", "grpc"),
    Target("sse", "mlxgui SSE", "ours", "sse"),
    Target("mlx_lm", "mlx_lm.server", "mlx_lm", "sse"),
)
CLIENT_MODULES = {"grpc": "bench.load.grpc_stream", "sse": "bench.load.sse"}
BY_NAME = {target.name: target for target in TARGETS}
