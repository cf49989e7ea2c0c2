"""The bridge's one session with the server: every event stream of every client over one gRPC stream.

A gRPC stream per request is the dearest part of the way from the engine to an SSE client; over the session the server
sends one message per engine step, with the events of all requests in it.
"""

import itertools
import logging
import queue
import threading
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from mlxgui.v1 import inference_pb2, inference_pb2_grpc
from rest_bridge import errors
from rest_bridge.errors import ApiError

_log = logging.getLogger("rest_bridge")

# The server ends a request at its deadline; a frozen one does not.
_DEADLINE_GRACE_SECONDS = 5.0
# Events of one request that its client has not taken yet.
_UNREAD_LIMIT = 1024

StreamRequest = inference_pb2.ChatStreamRequest | inference_pb2.GenerateStreamRequest


class Session:
    """Any thread may `open` streams; a thread of its own hands out what comes."""

    def __init__(self, stub: inference_pb2_grpc.InferenceServiceStub) -> None:
        self._stub = stub
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._line: _Line | None = None

    def open(self, request: StreamRequest, timeout_seconds: float, request_id: str) -> "SessionStream":
        """Begin a request; the session itself is begun by the first, and anew after it broke."""
        message = inference_pb2.SessionRequest(
            id=next(self._ids),
            timeout=Duration(seconds=int(timeout_seconds), nanos=int(timeout_seconds % 1 * 1e9)),
            request_id=request_id,
        )
        if isinstance(request, inference_pb2.ChatStreamRequest):
            message.chat.CopyFrom(request)
        else:
            message.generate.CopyFrom(request)
        with self._lock:
            if self._line is None or not self._line.is_alive:
                self._line = _Line(self._stub)
            stream = SessionStream(self._line, message.id, timeout_seconds)
            self._line.begin(stream, message)
        return stream


class SessionStream(Iterator[Any]):
    """The events of one request. Raises ApiError when it ends in one; `cancel` gives it up, from any thread."""

    def __init__(self, line: "_Line", number: int, timeout_seconds: float) -> None:
        self._line = line
        self._wait_seconds = timeout_seconds + _DEADLINE_GRACE_SECONDS
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._is_over = False
        self.number = number
        self.put = self._events.put
        """Called by the session's thread with an event, or with the ApiError that ends the request."""
        self.unread_count = self._events.qsize

    def __next__(self) -> Any:
        if self._is_over:
            raise StopIteration
        try:
            event = self._events.get(timeout=self._wait_seconds)
        except queue.Empty:
            self._line.forget(self.number)
            event = ApiError("DEADLINE", "The model server did not answer in time.")
        if isinstance(event, ApiError):
            self._is_over = True
            raise event
        if event.HasField("end"):
            self._is_over = True
        return event

    def cancel(self) -> None:
        """End the request on the server; a reader that waits gets an error."""
        if self._line.forget(self.number):
            self.put(ApiError("CANCELLED", "The request was cancelled."))


class _Line:
    """One gRPC stream, from its first request until it breaks."""

    def __init__(self, stub: inference_pb2_grpc.InferenceServiceStub) -> None:
        self._outgoing: queue.SimpleQueue[inference_pb2.SessionRequest | None] = queue.SimpleQueue()
        self._streams: dict[int, SessionStream] = {}
        self._lock = threading.Lock()
        self.is_alive = True
        responses = stub.Session(iter(self._outgoing.get, None))
        threading.Thread(target=self._read, args=(responses,), name="session", daemon=True).start()

    def begin(self, stream: SessionStream, message: inference_pb2.SessionRequest) -> None:
        with self._lock:
            if not self.is_alive:
                stream.put(ApiError("SERVER_UNREACHABLE", "The model server cannot be reached.", None, 1.0))
                return
            self._streams[stream.number] = stream
        self._outgoing.put(message)

    def forget(self, number: int) -> bool:
        """Cancel a request; whether it was still running."""
        with self._lock:
            if self._streams.pop(number, None) is None:
                return False
        self._outgoing.put(inference_pb2.SessionRequest(id=number, cancel=inference_pb2.SessionCancel()))
        return True

    def _read(self, responses: Any) -> None:
        streams = self._streams
        failure = ApiError("SERVER_UNREACHABLE", "The model server ended the session.", None, 1.0)
        try:
            for response in responses:
                for item in response.items:
                    stream = streams.get(item.id)
                    if stream is None:
                        continue
                    kind = item.WhichOneof("event")
                    if kind == "error":
                        streams.pop(item.id, None)
                        stream.put(errors.from_operation(item.error))
                        continue
                    event = item.chat if kind == "chat" else item.generate
                    if event.HasField("end"):
                        streams.pop(item.id, None)
                    elif stream.unread_count() >= _UNREAD_LIMIT:
                        self.forget(item.id)
                        event = ApiError("SLOW_CONSUMER", "The client reads too slowly.")
                    stream.put(event)
        except grpc.RpcError as error:
            failure = errors.from_rpc(error)
        except Exception:
            _log.exception("the session with the model server failed")
            responses.cancel()
            failure = ApiError(
                "INTERNAL", "The bridge failed to read the model server's answer; see its log."
            )
        finally:
            with self._lock:
                self.is_alive = False
                left, self._streams = list(streams.values()), {}
            for stream in left:
                stream.put(failure)
            self._outgoing.put(None)
