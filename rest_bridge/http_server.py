"""Waitress as the bridge runs it: its settings, and an end that lets running requests finish."""

import json
import socket
import threading
import time
from typing import Any

from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.server import create_server
from waitress.task import ErrorTask

from rest_bridge.config import MIB, BridgeConfig

_POLL_SECONDS = 30.0
_DRAIN_POLL_SECONDS = 0.02
# Beyond it a thread waits until its client has read.
_PILE_BYTES = MIB


class _JsonErrorTask(ErrorTask):
    """The answer to what is no HTTP request, in JSON like all others."""

    def execute(self) -> None:
        request: Any = self.request
        error = request.error
        message = f"{error.reason}: {error.body}"
        body = json.dumps(
            {
                "error": {"message": message, "type": "invalid_request_error", "param": None, "code": None},
                "detail": message,
            }
        ).encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers = [("Content-Type", "application/json")]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Parser(HTTPRequestParser):
    # Waitress 3.0.2 names the path in its log when a client goes, also of a request that had no readable one.
    path = ""


class _Channel(HTTPChannel):
    error_task_class = _JsonErrorTask
    parser_class = _Parser


class HttpServer:
    """Serves a WSGI application on a socket that listens already."""

    def __init__(self, application: Any, listener: socket.socket, config: BridgeConfig) -> None:
        server: Any = create_server(
            application,
            sockets=[listener],
            threads=config.thread_count,
            # Without it Waitress does not read while a request runs, and learns of a client's leaving only at the
            # next write.
            channel_request_lookahead=1,
            # An idle timeout; longer than any deadline, as nothing is written during a prefill.
            channel_timeout=3600,
            max_request_body_size=config.inference_body_limit_bytes + MIB,
            max_request_header_size=64 * 1024,
            connection_limit=512,
            # What a slow reader can pile up per stream.
            outbuf_high_watermark=_PILE_BYTES,
            asyncore_use_poll=True,
            clear_untrusted_proxy_headers=True,
            ident=None,
            expose_tracebacks=False,
        )
        server.channel_class = _Channel
        self._server = server
        self._stopping = threading.Event()
        self._stall_seconds = config.stalled_client_seconds

    def run(self) -> None:
        """Serves until `stop`. Call on the main thread."""
        while not self._stopping.is_set():
            self._turn(min(_POLL_SECONDS, self._stall_seconds / 4))
            self._drop_stalled()

    def stop(self) -> None:
        """Makes `run` return. Any thread, and a signal handler, may call it."""
        self._stopping.set()
        self._server.pull_trigger()

    def stop_accepting(self) -> None:
        """Closes the listening socket and the connections that wait for a next request."""
        self._server.accepting = False
        wasyncore.dispatcher.close(self._server)
        for channel in self._channels():
            if not channel.requests and not channel.total_outbufs_len:
                channel.will_close = True

    def drain(self, timeout_seconds: float) -> bool:
        """Serves what has been begun. Whether all of it ended within the time."""
        deadline = time.monotonic() + timeout_seconds
        while self._is_busy():
            if time.monotonic() >= deadline:
                return False
            self._turn(_DRAIN_POLL_SECONDS)
        return True

    def _turn(self, timeout_seconds: float) -> None:
        wasyncore.loop(timeout=timeout_seconds, map=self._server._map, use_poll=True, count=1)

    def _drop_stalled(self) -> None:
        """Ends the requests whose clients do not read; Waitress would let them keep their threads for ever."""
        latest = time.time() - self._stall_seconds
        for channel in self._channels():
            if (
                channel.requests
                and channel.total_outbufs_len > _PILE_BYTES
                and channel.last_activity < latest
            ):
                channel.handle_close()

    def _is_busy(self) -> bool:
        return any(channel.requests or channel.total_outbufs_len for channel in self._channels())

    def _channels(self) -> list[Any]:
        return list(self._server.active_channels.values())


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises OSError when the address cannot be had."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(Adjustments.backlog)
    except OSError:
        listener.close()
        raise
    return listener
