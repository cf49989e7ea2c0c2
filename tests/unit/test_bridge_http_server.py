"""Waitress with the bridge's settings, in front of applications of the test's own."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rest_bridge.config import BridgeConfig
from rest_bridge.http_server import HttpServer, listen


@contextmanager
def _serving(application: Any, config: BridgeConfig) -> Iterator[tuple[str, int]]:
    listener = listen("127.0.0.1", 0)
    address = listener.getsockname()
    server = HttpServer(application, listener, config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield address
    finally:
        server.stop()
        thread.join()
        server.stop_accepting()


def test_a_client_that_stops_reading_frees_its_thread() -> None:
    """Its answer is closed, as if the client had gone; one that reads meanwhile gets all of its own."""
    closed = threading.Event()

    class Endless:
        def __iter__(self) -> Iterator[bytes]:
            while True:
                yield b"x" * 65536

        def close(self) -> None:
            closed.set()

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [])
        return Endless() if environ["PATH_INFO"] == "/endless" else [b"all"]

    config = BridgeConfig("unix:/s", thread_count=2, stalled_client_seconds=0.4)
    with _serving(application, config) as address, socket.create_connection(address) as stalled:
        stalled.sendall(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert closed.wait(60)
        with socket.create_connection(address, timeout=60) as reader:
            reader.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert reader.makefile("rb").read().endswith(b"all")
