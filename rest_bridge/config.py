"""Every option of the bridge process, with its unit; read once, in `__main__`."""

from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True)
class BridgeConfig:
    """How one bridge runs. Sizes are bytes, times are seconds."""

    target: str
    """gRPC target of the control process, for example `unix:/home/me/.mlxgui/run/grpc.sock`."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""

    parent_fd: int | None = None
    """Descriptor whose end of file ends the bridge: the control process has gone."""

    allowed_hosts: frozenset[str] = frozenset()
    """Names besides loopback's and the bound address that a Host header may carry, as `wall.host_name` spells them."""

    cors_origins: frozenset[str] = frozenset()
    """Origins whose pages may call this server, in lower case. `*`: any."""

    api_key: str | None = None
    """The key that requests must carry. None: any key, or none."""

    thread_count: int = 64
    live_call_limit: int = 56
    """Long calls at once. The threads beyond it are kept for the quick routes, so that /health always answers."""

    session_from_call_count: int = 3
    """From so many live calls on, new streams share the session. One alone is faster on a gRPC stream of its own,
    which its thread reads itself; sixteen together take a third more of the processor that way (measured)."""

    inference_body_limit_bytes: int = 64 * MIB
    body_limit_bytes: int = MIB
    """Largest body of every other route."""

    status_timeout_seconds: float = 5.0
    catalog_timeout_seconds: float = 30.0
    removal_timeout_seconds: float = 120.0
    """For unloading and deleting, which wait for a worker or for the disk."""

    inference_timeout_seconds: float = 600.0
    stalled_client_seconds: float = 60.0
    """How long a client may read nothing of what a thread waits to send it; then its connection is closed."""

    drain_seconds: float = 5.0
    """How long running requests may go on after SIGTERM."""
