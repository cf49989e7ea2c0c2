"""Calls in progress: how many there may be, and who ends them when their client has gone."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, TypeVar

import grpc

from rest_bridge import errors
from rest_bridge.errors import ApiError
from rest_bridge.session import Session, StreamRequest

Metadata = tuple[tuple[str, str], ...]
_Response = TypeVar("_Response")

# From a client's leaving to the cancel; the pause between two looks at the live calls.
_WATCH_INTERVAL_SECONDS = 0.1


class Cancellable(Protocol):
    def cancel(self) -> Any: ...


class LiveCall:
    """One long call and its client. Close it, however it ends; closing cancels what still runs."""

    def __init__(self, registry: "LiveCalls", client_gone: Callable[[], bool]) -> None:
        self._registry = registry
        self._call: Cancellable | None = None
        self._cancelled = False
        self._ended_with: ApiError | None = None
        self.client_gone = client_gone

    def attach(self, call: Cancellable) -> None:
        """Makes `call` the one to cancel."""
        self._call = call
        if self._cancelled:
            call.cancel()

    def cancel(self) -> None:
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()

    def end(self, error: ApiError) -> None:
        """Cancels the call from outside; `error` is what its client is told."""
        self._ended_with = error
        self.cancel()

    def blame(self, error: ApiError) -> ApiError:
        """What a failure of the call means: the error it was ended with, if it was ended here."""
        return self._ended_with or error if error.reason == "CANCELLED" else error

    def close(self) -> None:
        self._registry._discard(self)
        self.cancel()

    def __enter__(self) -> "LiveCall":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LiveCalls:
    """All long calls of the bridge.

    One thread looks ten times a second for clients that have gone, and cancels their calls; Waitress itself would
    notice only at the next write, which during a prefill never comes. It sleeps while there is no call.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._calls: set[LiveCall] = set()
        self._changed = threading.Condition()
        self._draining = False
        threading.Thread(target=self._watch, name="client-watch", daemon=True).start()

    def __len__(self) -> int:
        return len(self._calls)

    def open(self, client_gone: Callable[[], bool]) -> LiveCall:
        """Takes a place. Raises ApiError (429) when all are taken, (503) once the bridge is ending."""
        live = LiveCall(self, client_gone)
        with self._changed:
            if self._draining:
                raise _draining()
            if len(self._calls) >= self._limit:
                raise ApiError(
                    "QUEUE_FULL",
                    f"{self._limit} requests are in progress over REST, the most there may be.",
                    None,
                    1.0,
                )
            self._calls.add(live)
            if len(self._calls) == 1:
                self._changed.notify()
        return live

    def refuse_new(self) -> None:
        """From now on `open` raises."""
        with self._changed:
            self._draining = True

    def cancel_all(self) -> None:
        """Ends every call; their clients get an error."""
        with self._changed:
            calls = list(self._calls)
        for live in calls:
            live.end(_draining())

    def _discard(self, live: LiveCall) -> None:
        with self._changed:
            self._calls.discard(live)

    def _watch(self) -> None:
        while True:
            with self._changed:
                while not self._calls:
                    self._changed.wait()
                calls = list(self._calls)
            for live in calls:
                if live.client_gone():
                    live.end(ApiError("CLIENT_GONE", "The client went away."))
            time.sleep(_WATCH_INTERVAL_SECONDS)


def _draining() -> ApiError:
    return ApiError("SERVER_DRAINING", "The server is shutting down.", None, 5.0)


@contextmanager
def as_api_error(live: LiveCall | None = None) -> Iterator[None]:
    """Turns a failed call into the ApiError that it means."""
    try:
        yield
    except grpc.RpcError as error:
        failure = errors.from_rpc(error)
    except grpc.FutureCancelledError:
        failure = ApiError("CANCELLED", "The request was cancelled.")
    except ApiError as error:
        failure = error
    else:
        return
    raise failure if live is None else live.blame(failure)


def unary(
    method: Callable[..., _Response], request: Any, timeout_seconds: float | None, metadata: Metadata
) -> _Response:
    """A quick call, which blocks its thread for at most its deadline."""
    with as_api_error():
        return method(request, timeout=timeout_seconds, metadata=metadata)


def watched(
    method: Any, request: Any, live: LiveCall, timeout_seconds: float | None, metadata: Metadata
) -> Any:
    """A long call with one answer, ended early if its client goes."""
    with as_api_error(live):
        call = method.future(request, timeout=timeout_seconds, metadata=metadata)
        live.attach(call)
        return call.result()


def stream(
    method: Any, request: Any, live: LiveCall, timeout_seconds: float | None, metadata: Metadata
) -> tuple[Any, Iterator[Any]]:
    """A streamed call that has begun well: its first message, and the rest. Raises ApiError if it has not."""
    with as_api_error(live):
        call = method(request, timeout=timeout_seconds, metadata=metadata)
        live.attach(call)
        try:
            return next(call), call
        except StopIteration:
            raise ApiError("INTERNAL", "The model server ended the stream before it began.") from None


def session_stream(
    session: Session, request: StreamRequest, live: LiveCall, timeout_seconds: float, request_id: str
) -> tuple[Any, Iterator[Any]]:
    """The same over the session, which costs less than a call of its own when many are live."""
    call = session.open(request, timeout_seconds, request_id)
    live.attach(call)
    with as_api_error(live):
        return next(call), call
