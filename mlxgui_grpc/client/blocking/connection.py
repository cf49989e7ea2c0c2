"""The connection of the blocking client, and the streams that come over it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2

from mlxgui.v1 import inference_pb2, inference_pb2_grpc, model_pb2_grpc, system_pb2_grpc
from mlxgui_grpc.client import channel
from mlxgui_grpc.client.address import ServerAddress, discover
from mlxgui_grpc.client.failures import failure_of_call, failure_of_usage

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
EventT = TypeVar("EventT")


class Stream(Generic[EventT]):
    """The events of one call, as they come. Closing it, leaving its block or dropping it cancels the call."""

    def __init__(
        self,
        call: "grpc._CallIterator[ResponseT]",
        convert: Callable[[ResponseT], EventT | None],
        place: str,
    ) -> None:
        self._call = call
        self._place = place
        self._is_closed = False
        self._events = (event for response in call if (event := convert(response)) is not None)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> EventT:
        if self._is_closed:
            raise StopIteration
        try:
            return next(self._events)
        except grpc.RpcError as error:
            if self._is_closed:
                raise StopIteration from None
            raise failure_of_call(error, self._place) from error

    def texts(self) -> Iterator[str]:
        """Only the text of the first choice, piece by piece."""
        for event in self:
            if (
                isinstance(event, inference_pb2.ChatDelta | inference_pb2.TextDelta)
                and event.index == 0
                and event.text
            ):
                yield event.text

    def close(self) -> None:
        """Cancel the call, if it still runs; the stream then ends. May be called from another thread."""
        self._is_closed = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Not reached when the constructor failed.
        if hasattr(self, "_call"):
            self._call.cancel()


class Connection:
    """A channel to a server, what goes with every call, and how calls fail."""

    def __init__(
        self,
        target: str | None = None,
        *,
        home: Path | str | None = None,
        token: str | None = None,
        root_certificate: Path | str | bytes | None = None,
        tls: bool = False,
        timeout_seconds: float = 30.0,
    ) -> None:
        self.address = ServerAddress.of(target) if target else discover(home)
        options = channel.channel_options(self.address)
        if credentials := channel.credentials(root_certificate, tls):
            self._channel = grpc.secure_channel(self.address.target, credentials, options)
        else:
            self._channel = grpc.insecure_channel(self.address.target, options)
        self._metadata = channel.call_metadata(token)
        self._timeout_seconds = timeout_seconds
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._system = system_pb2_grpc.SystemServiceStub(self._channel)
        # The generated stub of this service has no types.
        self._check_health = self._channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection and every call on it."""
        self._channel.close()

    def _call(
        self,
        method: "grpc.UnaryUnaryMultiCallable[RequestT, ResponseT]",
        request: RequestT,
        timeout_seconds: float | None,
    ) -> ResponseT:
        try:
            return method(request, timeout=timeout_seconds, metadata=self._metadata)
        except grpc.RpcError as error:
            raise failure_of_call(error, self.address.place) from error
        except (TypeError, ValueError) as error:
            raise failure_of_usage(error) from error

    def _stream(
        self,
        method: "grpc.UnaryStreamMultiCallable[RequestT, ResponseT]",
        request: RequestT,
        convert: Callable[[ResponseT], EventT | None],
        timeout_seconds: float | None,
    ) -> Stream[EventT]:
        try:
            call = method(request, timeout=timeout_seconds, metadata=self._metadata)
        except (TypeError, ValueError) as error:
            raise failure_of_usage(error) from error
        return Stream(call, convert, self.address.place)
