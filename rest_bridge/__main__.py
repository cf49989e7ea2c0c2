"""Runs the bridge: flags and environment in, exit code out."""

import argparse
import contextlib
import ctypes
import errno
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from importlib import metadata

import psutil

from rest_bridge import backend, wall
from rest_bridge.app import create_app
from rest_bridge.calls import LiveCalls
from rest_bridge.config import BridgeConfig
from rest_bridge.http_server import HttpServer, listen
from rest_bridge.metrics import BridgeMetrics
from rest_bridge.web import Bridge

EXIT_USAGE = 2
EXIT_CANNOT_BIND = 98

_M_ARENA_MAX = -8  # of glibc's malloc.h
_REACH_SECONDS = 5.0
# What is left of the drain when the control process has died: its requests have failed already.
_ORPHAN_DRAIN_SECONDS = 0.3


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the bridge until it is told to end. 0: it ended well; 2: wrong options; 98: the address is taken."""
    config = _read_config(argv)
    if isinstance(config, str):
        print(f"mlxgui bridge: {config}", file=sys.stderr)
        return EXIT_USAGE
    _share_heaps()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # A client that leaves is nothing to write down.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    try:
        listener = listen(config.host, config.port)
    except OSError as error:
        print(_bind_failure(config, error), file=sys.stderr)
        return EXIT_CANNOT_BIND
    return _serve(config, listener)


def _serve(config: BridgeConfig, listener: socket.socket) -> int:
    port = listener.getsockname()[1]
    services = backend.connect(config.target)
    calls = LiveCalls(config.live_call_limit)
    bridge = Bridge(config, services, calls, BridgeMetrics(), f"mlxgui-{_version()}")
    server = HttpServer(create_app(bridge), listener, config)
    orphaned = threading.Event()

    def end(*_: object) -> None:
        server.stop()

    def end_with_parent(fd: int) -> None:
        while _read(fd):
            pass
        orphaned.set()
        server.stop()

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
    if config.parent_fd is not None:
        threading.Thread(
            target=end_with_parent, args=(config.parent_fd,), name="parent-watch", daemon=True
        ).start()
    reached = backend.wait_until_reachable(services, _REACH_SECONDS)
    if config.parent_fd is None:
        ready = f"REST  http://{f'[{config.host}]' if ':' in config.host else config.host}:{port}"
        if not reached:
            print(
                f"mlxgui bridge: no model server answers at {config.target}; requests get 503 until one does.",
                file=sys.stderr,
            )
    else:
        ready = json.dumps({"event": "ready", "port": port})
    # Who reads this line may have gone, or closed its end.
    try:
        print(ready, flush=True)
    except BrokenPipeError:
        return 0
    server.run()

    calls.refuse_new()
    server.stop_accepting()
    if not server.drain(_ORPHAN_DRAIN_SECONDS if orphaned.is_set() else config.drain_seconds):
        calls.cancel_all()
        # Their clients are told; then it is over.
        server.drain(_ORPHAN_DRAIN_SECONDS)
    services.channel.close()
    return 0


def _read_config(argv: Sequence[str] | None) -> BridgeConfig | str:
    """The options, or what is wrong with them in one sentence."""
    parser = argparse.ArgumentParser(
        prog="mlxgui bridge", description="Serves the REST API of a running server."
    )
    parser.add_argument("--target", required=True, help="gRPC target, for example unix:/path/grpc.sock")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=8000, help="port, 0 for a free one (default: %(default)s)"
    )
    parser.add_argument("--parent-fd", type=int, help="descriptor whose end of file ends the bridge")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name that a Host header may carry",
    )
    parser.add_argument(
        "--cors-origin", action="append", default=[], metavar="ORIGIN", help="origin whose pages may call"
    )
    parser.add_argument(
        "--require-key", action="store_true", help="refuse requests without the key in MLX_GUI_API_KEY"
    )
    parser.add_argument("--insecure", action="store_true", help="listen beyond loopback without a key")
    options = parser.parse_args(argv)
    api_key = os.environ.get("MLX_GUI_API_KEY") or None
    if options.require_key and api_key is None:
        return "--require-key needs the key in the environment variable MLX_GUI_API_KEY."
    if not 0 <= options.port <= 65535:
        return f"--port must be between 0 and 65535, not {options.port}."
    if not wall.is_loopback(options.host) and api_key is None and not options.insecure:
        return (
            f"{options.host} can be reached from other machines: set MLX_GUI_API_KEY, or say --insecure to serve "
            "everybody."
        )
    allowed_hosts = {host: wall.host_name(host) for host in options.allowed_host}
    for host, name in allowed_hosts.items():
        if name is None:
            return f"--allowed-host must be a host name or an address, not '{host}'."
    return BridgeConfig(
        target=options.target,
        host=options.host,
        port=options.port,
        parent_fd=options.parent_fd,
        allowed_hosts=frozenset(name for name in allowed_hosts.values() if name is not None),
        cors_origins=frozenset(origin.lower().rstrip("/") for origin in options.cors_origin),
        api_key=api_key,
    )


def _bind_failure(config: BridgeConfig, error: OSError) -> str:
    if error.errno != errno.EADDRINUSE:
        return f"mlxgui bridge: cannot listen on {config.host}:{config.port}: {error.strerror or error}."
    holder = _port_holder(config.port)
    by = f" by {holder}" if holder else ""
    return f"mlxgui bridge: port {config.port} is in use{by}; choose another with --port or MLX_GUI_PORT."


def _share_heaps() -> None:
    """Keeps the 64 threads from having a heap each, which costs 15 MB and brings nothing: they take turns anyway."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def _port_holder(port: int) -> str | None:
    """Name and process id of who listens on a port, where the system tells."""
    try:
        for connection in psutil.net_connections("tcp"):
            address = connection.laddr
            if (
                connection.status == psutil.CONN_LISTEN
                and connection.pid
                and address
                and address.port == port
            ):
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    except (psutil.Error, OSError):
        return None
    return None


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 4096)
    except OSError:
        return b""


def _version() -> str:
    try:
        return metadata.version("mlxgui-grpc")
    except metadata.PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
