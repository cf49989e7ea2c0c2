"""What happens to every call around its handler: request id, log, metrics, errors, key, drain.

One interceptor, in this order, because in grpc.aio an interceptor sees the handler and not the call: each layer
would wrap the same four kinds of handler again.
"""

import asyncio
import hmac
import inspect
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from mlxgui_grpc.errors import (
    InternalError,
    InvalidRequestError,
    ModelServerError,
    NotImplementedYetError,
    ServerDrainingError,
    UnauthenticatedError,
)
from mlxgui_grpc.metrics import Metrics

log = logging.getLogger("mlxgui_grpc.access")

REQUEST_ID = "x-request-id"
ERROR_DOMAIN = "mlxgui.v1"
RETRY_WHILE_DRAINING_SECONDS = 5.0

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""The id of the call that the current task serves."""

_VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ALWAYS_OPEN = ("/grpc.health.", "/grpc.reflection.")
_OPEN_WHILE_DRAINING = ("/mlxgui.v1.SystemService/", "/mlxgui.v1.ModelService/GetOperation")


class _Unreadable:
    """Stands for a request whose bytes do not parse."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """See the module. `drain` makes new work UNAVAILABLE; `running_count` is what still runs."""

    def __init__(self, metrics: Metrics, api_key: str) -> None:
        """With an `api_key`, calls over TCP must carry it; the unix socket is guarded by its folder."""
        self._metrics = metrics
        self._api_key = api_key.encode()
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.running_count = 0

    def drain(self) -> None:
        """Refuse new work from now on."""
        self._is_draining = True

    async def wait_idle(self) -> None:
        """Return when no call runs."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        if method.startswith(_ALWAYS_OPEN) and not (self._api_key and "reflection" in method):
            return handler
        metadata = {str(key): value for key, value in handler_call_details.invocation_metadata or ()}
        wrapped = _Handler(handler)
        behavior = wrapped.behavior
        if handler.response_streaming:

            async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
                call = _CallLog(self, method, metadata, context)
                try:
                    await call.begin(request)
                    async for message in behavior(request, context):
                        call.message_count += 1
                        yield message
                except (Exception, asyncio.CancelledError) as error:
                    await call.fail(error)
                finally:
                    call.end()

            wrapped.behavior = stream
        else:

            async def unary(request: Any, context: Any) -> Any:
                call = _CallLog(self, method, metadata, context)
                try:
                    await call.begin(request)
                    return await behavior(request, context)
                except (Exception, asyncio.CancelledError) as error:
                    await call.fail(error)
                finally:
                    call.end()

            wrapped.behavior = unary
        return wrapped.build()

    def check(self, method: str, metadata: dict[str, Any], peer: str) -> None:
        """Raise what forbids the call."""
        if self._is_draining and not method.startswith(_OPEN_WHILE_DRAINING):
            raise ServerDrainingError(
                "The server is stopping and takes no new work",
                retry_after_seconds=RETRY_WHILE_DRAINING_SECONDS,
            )
        if not self._api_key or peer.startswith("unix:"):
            return
        bearer = str(metadata.get("authorization", ""))
        key = bearer[7:] if bearer[:7].lower() == "bearer " else str(metadata.get("x-api-key", ""))
        if not hmac.compare_digest(key.encode(), self._api_key):
            raise UnauthenticatedError(
                "A key is required: send metadata 'authorization: Bearer KEY' or 'x-api-key: KEY'"
            )

    def observe(self, method: str, code: str, seconds: float) -> None:
        """Count a finished call."""
        self._metrics.calls.labels(method, code).inc()
        self._metrics.call_seconds.labels(method).observe(seconds)


class _CallLog:
    """One call from its first byte to its log line."""

    def __init__(self, owner: CallInterceptor, method: str, metadata: dict[str, Any], context: Any) -> None:
        self._owner = owner
        self._method = method
        self._metadata = metadata
        self._context = context
        self._started = time.monotonic()
        self._code = "OK"
        self._reason = "-"
        self.message_count = 0
        owner.running_count += 1
        owner._idle.clear()
        # Asked for now: once a cancelled call is over, asking gRPC for its peer is a segmentation fault (1.85.1).
        self._peer = context.peer()
        given = str(metadata.get(REQUEST_ID, ""))
        self.id = given if _VALID_ID.fullmatch(given) else uuid.uuid4().hex

    async def begin(self, request: Any) -> None:
        request_id.set(self.id)
        await self._context.send_initial_metadata(((REQUEST_ID, self.id),))
        self._owner.check(self._method, self._metadata, self._peer)
        if isinstance(request, _Unreadable):
            raise InvalidRequestError("the request is not a message of this method's type")

    async def fail(self, error: BaseException) -> None:
        """End the call with the status of `error`; raises always."""
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if isinstance(error, asyncio.CancelledError):
            if self._context.cancelled() or self._context.done():
                self._code = "CANCELLED"
                raise error
            # A handler that lets an inner task's cancellation out would leave its caller hanging.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                self._code = "CANCELLED"
                raise error
            log.error("%s %s: stray cancellation", self._method, self.id)
            error = InternalError(f"The call was interrupted; the log has more under request {self.id}")
        elif isinstance(error, NotImplementedError):
            error = NotImplementedYetError(
                f"{self._method.rpartition('/')[2]} is not implemented in this version"
            )
        elif not isinstance(error, ModelServerError):
            log.error("%s %s failed", self._method, self.id, exc_info=error)
            error = InternalError(f"Something went wrong; the log has more under request {self.id}")
        self._code, self._reason = error.status.name, error.reason
        await self._context.abort(
            error.status, error.message, (("grpc-status-details-bin", error_details(error)),)
        )

    def end(self) -> None:
        owner = self._owner
        owner.running_count -= 1
        if owner.running_count == 0:
            owner._idle.set()
        seconds = time.monotonic() - self._started
        owner.observe(self._method, self._code, seconds)
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


class _Handler:
    """A method handler taken apart: its kind, its behaviour, and a deserializer that never raises."""

    def __init__(self, handler: Any) -> None:
        self._handler = handler
        kind = f"{'stream' if handler.request_streaming else 'unary'}_"
        kind += "stream" if handler.response_streaming else "unary"
        behavior = getattr(handler, kind)
        self._factory = getattr(grpc, f"{kind}_rpc_method_handler")
        # RPCs that are declared and not written are plain functions of the generated base class.
        target = getattr(behavior, "__func__", behavior)
        is_async = inspect.iscoroutinefunction(target) or inspect.isasyncgenfunction(target)
        self.behavior = behavior if is_async else _unimplemented(handler.response_streaming)

    def build(self) -> Any:
        return self._factory(
            self.behavior,
            request_deserializer=_lenient(self._handler.request_deserializer),
            response_serializer=self._handler.response_serializer,
        )


def _unimplemented(streaming: bool) -> Callable[[Any, Any], Any]:
    async def unary(request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        if request is not None:
            raise NotImplementedError
        yield

    return stream if streaming else unary


def _lenient(deserializer: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """gRPC answers UNKNOWN when a request does not parse; let the handler answer INVALID_ARGUMENT."""

    def deserialize(data: bytes) -> Any:
        try:
            return deserializer(data)
        except Exception:
            return _Unreadable()

    return deserialize


def error_details(error: ModelServerError) -> bytes:
    """The serialized google.rpc.Status with ErrorInfo, and BadRequest and RetryInfo where they apply."""
    details: list[Any] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=error.metadata)
    ]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration(
            seconds=int(error.retry_after_seconds), nanos=int(error.retry_after_seconds % 1 * 1e9)
        )
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        wrapped = any_pb2.Any()
        wrapped.Pack(detail)
        packed.append(wrapped)
    status = status_pb2.Status(code=error.status.value[0], message=error.message, details=packed)
    return bytes(status.SerializeToString())
