"""What happens to every call around its handler: request id, log, metrics, errors, key, drain.

One interceptor, in this order, because in grpc.aio an interceptor sees the handler and not the call: each layer
would wrap the same four kinds of handler again.
"""

import asyncio
import hmac
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from mlxgui_grpc.errors import InvalidRequestError, ModelServerError, UnauthenticatedError
from mlxgui_grpc.services.call_record import CallBook, CallRecord

REQUEST_ID = "x-request-id"
ERROR_DOMAIN = "mlxgui.v1"
_ALWAYS_OPEN = ("/grpc.health.", "/grpc.reflection.")
_OPEN_WHILE_DRAINING = (
    "/mlxgui.v1.SystemService/",
    "/mlxgui.v1.ModelService/GetOperation",
    "/mlxgui.v1.InferenceService/Session",  # refuses new requests one by one
)
_CARRIERS = frozenset({"/mlxgui.v1.InferenceService/Session", "/mlxgui.v1.ModelService/WatchManager"})
"""Calls that the drain does not wait for: they last as long as the server, or their requests are counted one by one."""


UNREADABLE = "the request is not a message of this method's type"


class Unreadable:
    """Stands for a request whose bytes do not parse."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """See the module."""

    def __init__(self, book: CallBook, api_key: str) -> None:
        """With an `api_key`, calls over TCP must carry it; the unix socket is guarded by its folder."""
        self._book = book
        self._api_key = api_key.encode()

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
                record = await self._open(method, metadata, context)
                try:
                    self._check(method, metadata, context, request)
                    async for message in behavior(request, context):
                        record.message_count += 1
                        yield message
                except (Exception, asyncio.CancelledError) as error:
                    await _end_badly(record, context, error)
                finally:
                    record.close()

            wrapped.behavior = stream
        else:

            async def unary(request: Any, context: Any) -> Any:
                record = await self._open(method, metadata, context)
                try:
                    self._check(method, metadata, context, request)
                    return await behavior(request, context)
                except (Exception, asyncio.CancelledError) as error:
                    await _end_badly(record, context, error)
                finally:
                    record.close()

            wrapped.behavior = unary
        return wrapped.build()

    async def _open(self, method: str, metadata: dict[str, Any], context: Any) -> CallRecord:
        # The peer is asked for now: of a cancelled call that is over, asking is a segmentation fault (grpcio 1.85.1).
        given_id, is_carrier = str(metadata.get(REQUEST_ID, "")), method in _CARRIERS
        record = self._book.open(method, given_id, context.peer(), is_carrier=is_carrier)
        try:
            await context.send_initial_metadata(((REQUEST_ID, record.id),))
        except BaseException:
            record.cancelled()
            record.close()
            raise
        return record

    def _check(self, method: str, metadata: dict[str, Any], context: Any, request: Any) -> None:
        """Raise what forbids the call."""
        if not method.startswith(_OPEN_WHILE_DRAINING):
            self._book.admit()
        if self._api_key and not context.peer().startswith("unix:"):
            bearer = str(metadata.get("authorization", ""))
            key = bearer[7:] if bearer[:7].lower() == "bearer " else str(metadata.get("x-api-key", ""))
            if not hmac.compare_digest(key.encode(), self._api_key):
                raise UnauthenticatedError(
                    "A key is required: send metadata 'authorization: Bearer KEY' or 'x-api-key: KEY'"
                )
        if isinstance(request, Unreadable):
            raise InvalidRequestError(UNREADABLE)


async def _end_badly(record: CallRecord, context: Any, error: BaseException) -> None:
    """End the call with the status of `error`; raises always."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        if context.cancelled() or context.done() or (task is not None and task.cancelling()):
            record.cancelled()
            raise error
        # A handler that lets an inner task's cancellation out would leave its caller hanging.
        error = RuntimeError("stray cancellation")
    assert isinstance(error, Exception)
    seen = record.failed(error)
    await context.abort(seen.status, seen.message, (("grpc-status-details-bin", error_details(seen)),))


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
            return Unreadable()

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
