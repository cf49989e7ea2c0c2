"""What is kept of every request while it runs, and the one line and the counts that remain of it."""

import asyncio
import logging
import re
import time
import uuid
from contextvars import ContextVar

from mlxgui_grpc.errors import (
    InternalError,
    ModelServerError,
    NotImplementedYetError,
    ServerDrainingError,
)
from mlxgui_grpc.metrics import Metrics

log = logging.getLogger("mlxgui_grpc.access")

RETRY_WHILE_DRAINING_SECONDS = 5.0

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""The id of the request that the current task serves."""

_VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class CallBook:
    """The requests that run now, and whether new ones may begin. Use on the event loop only."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.draining = asyncio.Event()
        """Set when no new work is taken any more."""
        self.idle = asyncio.Event()
        """Set when no request runs."""
        self.idle.set()
        self.running_count = 0

    def drain(self) -> None:
        """Refuse new work from now on."""
        self.draining.set()

    def admit(self) -> None:
        """Raise ServerDrainingError when no new work is taken."""
        if self.draining.is_set():
            raise ServerDrainingError(
                "The server is stopping and takes no new work",
                retry_after_seconds=RETRY_WHILE_DRAINING_SECONDS,
            )

    def open(self, method: str, given_id: str, peer: str, *, is_carrier: bool = False) -> "CallRecord":
        """Begin a request; `given_id` is used when it is well formed.

        The drain does not wait for a carrier of other requests: those are counted one by one.
        """
        return CallRecord(self, method, given_id, peer, 0 if is_carrier else 1)

    def count(self, change: int) -> None:
        """More or fewer requests run."""
        self.running_count += change
        if self.running_count:
            self.idle.clear()
        else:
            self.idle.set()


class CallRecord:
    """One request from its beginning to its log line; `close` it exactly once."""

    def __init__(self, book: CallBook, method: str, given_id: str, peer: str, weight: int) -> None:
        self._book = book
        self._method = method
        self._peer = peer
        self._started = time.monotonic()
        self._code, self._reason = "OK", "-"
        self.id = given_id if _VALID_ID.fullmatch(given_id) else uuid.uuid4().hex
        self.message_count = 0
        request_id.set(self.id)
        log.debug("%s peer=%s id=%s begins", method, peer, self.id)
        self._weight = weight
        book.count(weight)

    def cancelled(self) -> None:
        """The caller left."""
        self._code = "CANCELLED"

    def failed(self, error: Exception) -> ModelServerError:
        """Note the failure; returns it as the caller may see it. What is unknown is logged and kept from them."""
        if isinstance(error, NotImplementedError):
            name = self._method.rpartition("/")[2]
            error = NotImplementedYetError(f"{name} is not implemented in this version")
        elif not isinstance(error, ModelServerError):
            log.error("%s %s failed", self._method, self.id, exc_info=error)
            error = InternalError(f"Something went wrong; the log has more under request {self.id}")
        self._code, self._reason = error.status.name, error.reason
        return error

    def close(self) -> None:
        """The request is over."""
        self._book.count(-self._weight)
        seconds = time.monotonic() - self._started
        metrics = self._book._metrics
        metrics.calls.labels(self._method, self._code).inc()
        metrics.call_seconds.labels(self._method).observe(seconds)
        log.info(
            "%s peer=%s id=%s code=%s reason=%s ms=%.1f messages=%d",
            self._method,
            self._peer,
            self.id,
            self._code,
            self._reason,
            seconds * 1e3,
            self.message_count,
        )
