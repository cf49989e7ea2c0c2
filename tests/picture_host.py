"""A web server that image URLs lead to, at an address of loopback where nothing else of the tests is.

The session's server may fetch from there, and from nowhere else that is not public: its own address is refused.
"""

import contextlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ADDRESSES = ("::1", "127.0.0.2")
"""The first that the machine has: some have no IPv6, others no more of IPv4's than 127.0.0.1."""


class PictureHost:
    """Serves `files` by path over HTTP while it is entered; `requests` are the paths that were asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host.requests.append(self.path)
                body = host.files.get(self.path)
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, format: str, *args: Any) -> None:
                pass

        for self.address in ADDRESSES:
            with contextlib.suppress(OSError):
                self._server = _server_at(self.address, Handler)
                break
        else:
            raise OSError(f"none of {ADDRESSES} is an address of this machine")
        self.port: int = self._server.server_address[1]

    def url(self, path: str) -> str:
        """Of one of its files."""
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"http://{address}:{self.port}{path}"

    def __enter__(self) -> "PictureHost":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _server_at(address: str, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        daemon_threads = True

    return Server((address, 0), handler)
