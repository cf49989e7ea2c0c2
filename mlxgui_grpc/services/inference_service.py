"""InferenceService: chat, completion, token counts."""

from collections.abc import AsyncIterator
from typing import Any

import grpc

from mlxgui.v1 import inference_pb2 as pb
from mlxgui.v1 import inference_pb2_grpc
from mlxgui_grpc import convert
from mlxgui_grpc.errors import InvalidRequestError
from mlxgui_grpc.generation import Event, GenerationRequest, Generator
from mlxgui_grpc.services.call_record import CallBook
from mlxgui_grpc.services.session import Session

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Cancelling a call closes its generation, which gives its rows back at the next step."""

    def __init__(self, generator: Generator, book: CallBook) -> None:
        self._generator = generator
        self._book = book

    async def Chat(self, request: pb.ChatRequest, context: Context) -> pb.ChatResponse:
        chat = convert.chat_from_proto(request)
        return convert.chat_reply_to_proto(await self._collect(chat), chat.choices)

    async def ChatStream(
        self, request: pb.ChatStreamRequest, context: Context
    ) -> AsyncIterator[pb.ChatStreamResponse]:
        chat = convert.chat_from_proto(request.request)
        async for events in self._generator.run(chat, convert.join_tokens_from_proto(request.options)):
            for event in events:
                yield convert.chat_event_to_proto(event)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        completion = convert.completion_from_proto(request)
        events = await self._collect(completion)
        if request.echo:
            events = convert.with_echo(events, completion)
        return convert.text_reply_to_proto(events, completion.choices * len(completion.prompts))

    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        completion = convert.completion_from_proto(request.request)
        join_tokens = convert.join_tokens_from_proto(request.options)
        async for events in self._generator.run(completion, join_tokens):
            for event in convert.with_echo(events, completion) if request.request.echo else events:
                yield convert.text_event_to_proto(event)

    async def Session(
        self, requests: AsyncIterator[pb.SessionRequest], context: Context
    ) -> AsyncIterator[pb.SessionResponse]:
        async for response in Session(self._generator, self._book, context.peer()).run(requests):
            yield response

    async def CountTokens(self, request: pb.CountTokensRequest, context: Context) -> pb.CountTokensResponse:
        name = convert.model_name(request.model or request.chat.model, may_be_empty=True)
        kind = request.WhichOneof("input")
        if kind is None:
            raise InvalidRequestError("one of prompt and chat is required", field="input")
        if kind == "chat":
            prompt = convert.chat_prompt_from_proto(request.chat, [])
        else:
            prompt = convert.prompt_from_proto(request.prompt, "prompt")
        model, count, context_length = await self._generator.count_tokens(name, prompt)
        return pb.CountTokensResponse(token_count=count, model=model, context_length=context_length)

    async def _collect(self, request: GenerationRequest) -> list[Event]:
        return [event async for events in self._generator.run(request) for event in events]
