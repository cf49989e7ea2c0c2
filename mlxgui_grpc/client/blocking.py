"""The blocking client. Its methods may be called from any thread."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

import grpc
from grpc_health.v1 import health_pb2

from mlxgui.v1 import (
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
)
from mlxgui_grpc.client import channel, operations
from mlxgui_grpc.client import messages as conversion
from mlxgui_grpc.client.address import ServerAddress, discover
from mlxgui_grpc.client.failures import failure_of_call, failure_of_usage
from mlxgui_grpc.client.messages import ChatEvent, ChatReply, Completion, GenerateEvent, Message, Sampling

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


class Client:
    """One connection to a server.

    `target` is `unix:/path` or `host:port`; without it the server that runs in `home` (default: MLX_GUI_HOME)
    is found by the file it wrote. `token` goes with every call. `root_certificate` (PEM, or its file) or
    `tls` turns TLS on. `timeout_seconds` is the deadline of calls that neither run nor move a model; those
    that do have their own parameter and by default only the server's limit.
    """

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

    # Text.

    def chat(
        self,
        model: str,
        messages: Message | Sequence[Message],
        *,
        tools: Sequence[inference_pb2.Tool] = (),
        tool_choice: inference_pb2.ToolChoice | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        keep_alive_seconds: float | None = None,
        require_loaded: bool = False,
        timeout_seconds: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> ChatReply:
        """Answer a conversation; blocks until the reply is whole."""
        request = conversion.chat_request(
            model,
            messages,
            sampling,
            tools=tools,
            tool_choice=tool_choice,
            template_arguments=template_arguments,
            keep_alive_seconds=keep_alive_seconds,
            require_loaded=require_loaded,
        )
        return conversion.chat_reply(self._call(self._inference.Chat, request, timeout_seconds))

    def stream_chat(
        self,
        model: str,
        messages: Message | Sequence[Message],
        *,
        tools: Sequence[inference_pb2.Tool] = (),
        tool_choice: inference_pb2.ToolChoice | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        keep_alive_seconds: float | None = None,
        require_loaded: bool = False,
        timeout_seconds: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Stream[ChatEvent]:
        """Answer a conversation as it is decoded: start, perhaps prefill, deltas, finish per choice, end."""
        request = conversion.chat_request(
            model,
            messages,
            sampling,
            tools=tools,
            tool_choice=tool_choice,
            template_arguments=template_arguments,
            keep_alive_seconds=keep_alive_seconds,
            require_loaded=require_loaded,
        )
        return self._stream(
            self._inference.ChatStream,
            inference_pb2.ChatStreamRequest(request=request),
            conversion.chat_event,
            timeout_seconds,
        )

    def generate(
        self,
        model: str,
        prompts: str | Sequence[str],
        *,
        echo: bool = False,
        keep_alive_seconds: float | None = None,
        require_loaded: bool = False,
        timeout_seconds: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Completion:
        """Continue prompts; blocks until all choices are whole."""
        request = conversion.generate_request(
            model,
            prompts,
            sampling,
            echo=echo,
            keep_alive_seconds=keep_alive_seconds,
            require_loaded=require_loaded,
        )
        return conversion.completion(self._call(self._inference.Generate, request, timeout_seconds))

    def stream_generate(
        self,
        model: str,
        prompts: str | Sequence[str],
        *,
        echo: bool = False,
        keep_alive_seconds: float | None = None,
        require_loaded: bool = False,
        timeout_seconds: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Stream[GenerateEvent]:
        """Continue prompts as they are decoded: start, perhaps prefill, deltas, a finish per choice, end."""
        request = conversion.generate_request(
            model,
            prompts,
            sampling,
            echo=echo,
            keep_alive_seconds=keep_alive_seconds,
            require_loaded=require_loaded,
        )
        return self._stream(
            self._inference.GenerateStream,
            inference_pb2.GenerateStreamRequest(request=request),
            conversion.generate_event,
            timeout_seconds,
        )

    def count_tokens(
        self, model: str, prompt: str | Sequence[Message], *, timeout_seconds: float | None = None
    ) -> int:
        """Tokens of a prompt (text) or of a conversation (a sequence of messages), exactly."""
        request = conversion.count_request(model, prompt)
        return self._call(self._inference.CountTokens, request, timeout_seconds).token_count

    # Models.

    def models(self, *, include_available: bool = False) -> list[model_pb2.Model]:
        """The installed models, by name; also those of the Hugging Face cache that could be, if asked for."""
        request = conversion.checked(model_pb2.ListModelsRequest)(
            page_size=1000, include_available=include_available
        )
        found: list[model_pb2.Model] = []
        while True:
            page = self._call(self._models.ListModels, request, self._timeout_seconds)
            found.extend(page.models)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def model(self, name: str) -> model_pb2.Model:
        """One installed model."""
        request = conversion.checked(model_pb2.GetModelRequest)(name=name)
        return self._call(self._models.GetModel, request, self._timeout_seconds).model

    def install(
        self,
        source: str | Path,
        name: str = "",
        *,
        revision: str = "",
        force: bool = False,
        request_id: str = "",
    ) -> Stream[model_pb2.Operation]:
        """Install a hub id (text) or a directory on the server's machine (`Path`); streams snapshots.

        The last snapshot has `success`. A failed operation raises. Closing the stream only detaches: see
        `cancel_operation`.
        """
        request = conversion.install_request(source, name, revision, force=force, request_id=request_id)
        return self._stream(self._models.InstallModel, request, operations.snapshot, None)

    def load(
        self, name: str, *, priority: int = 0, keep_alive_seconds: float | None = None
    ) -> Stream[model_pb2.Operation]:
        """Load a model; streams snapshots, the last of which has `success`. A failed operation raises."""
        keep_alive = conversion.duration(keep_alive_seconds)
        request = conversion.checked(model_pb2.LoadModelRequest)(
            name=name, priority=priority, keep_alive=keep_alive
        )
        return self._stream(self._models.LoadModel, request, operations.snapshot, None)

    def unload(
        self, name: str, *, force: bool = False, timeout_seconds: float | None = None
    ) -> model_pb2.Model:
        """Remove a model from memory; `force` ends its requests."""
        request = conversion.checked(model_pb2.UnloadModelRequest)(name=name, force=force)
        return self._call(self._models.UnloadModel, request, timeout_seconds).model

    def delete(
        self,
        name: str,
        *,
        remove_files: bool = True,
        force: bool = False,
        timeout_seconds: float | None = None,
    ) -> model_pb2.DeleteModelResponse:
        """Remove a model from the registry, with the files that the server downloaded for it."""
        request = conversion.checked(model_pb2.DeleteModelRequest)(
            name=name, remove_files=remove_files, force=force
        )
        return self._call(self._models.DeleteModel, request, timeout_seconds)

    def health(self, name: str) -> model_pb2.CheckModelHealthResponse:
        """Whether a model is ready to serve; does not load it."""
        request = conversion.checked(model_pb2.CheckModelHealthRequest)(name=name)
        return self._call(self._models.CheckModelHealth, request, self._timeout_seconds)

    def manager_status(self) -> model_pb2.ManagerSnapshot:
        """What is in memory and what waits."""
        request = model_pb2.GetManagerStatusRequest()
        return self._call(self._models.GetManagerStatus, request, self._timeout_seconds).snapshot

    # Operations and the server.

    def operations(self, *, include_done: bool = False) -> list[model_pb2.Operation]:
        """The long actions that run, newest first; finished ones too, if asked for."""
        request = conversion.checked(model_pb2.ListOperationsRequest)(
            page_size=1000, include_done=include_done
        )
        found: list[model_pb2.Operation] = []
        while True:
            page = self._call(self._models.ListOperations, request, self._timeout_seconds)
            found.extend(page.operations)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def operation(self, operation_id: str) -> model_pb2.Operation:
        """One operation as it stands; a failed one is an answer here, not an exception."""
        request = conversion.checked(model_pb2.GetOperationRequest)(id=operation_id)
        return self._call(self._models.GetOperation, request, self._timeout_seconds).operation

    def watch_operation(self, operation_id: str) -> Stream[model_pb2.Operation]:
        """Snapshots of an operation until it is done. A failed operation raises."""
        request = conversion.checked(model_pb2.WatchOperationRequest)(id=operation_id)
        return self._stream(self._models.WatchOperation, request, operations.snapshot, None)

    def cancel_operation(self, operation_id: str) -> model_pb2.Operation:
        """Cancel an operation for everybody who waits for it; answers it when it has ended."""
        request = conversion.checked(model_pb2.CancelOperationRequest)(id=operation_id)
        return self._call(self._models.CancelOperation, request, self._timeout_seconds).operation

    def server_info(self) -> system_pb2.GetServerInfoResponse:
        """What the server is: version, addresses, capabilities and limits."""
        request = system_pb2.GetServerInfoRequest()
        return self._call(self._system.GetServerInfo, request, self._timeout_seconds)

    def is_serving(self, service: str = "") -> bool:
        """Whether the server, one service or one model (`model/<name>`) serves: the standard health check."""
        request = conversion.checked(health_pb2.HealthCheckRequest)(service=service)
        response = self._call(self._check_health, request, self._timeout_seconds)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

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
