"""InferenceService: chat, completion, token counts; vectors and scores are in `embedding_rpcs.py`."""

from collections.abc import AsyncIterator
from typing import Any

import grpc

from mlxgui.v1 import inference_pb2 as pb
from mlxgui_grpc import convert
from mlxgui_grpc.embedding import Embedder
from mlxgui_grpc.errors import InvalidRequestError
from mlxgui_grpc.generation import Event, GenerationRequest, Generator
from mlxgui_grpc.services.call_record import CallBook
from mlxgui_grpc.services.embedding_rpcs import EmbeddingRpcs
from mlxgui_grpc.services.session import Session

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(EmbeddingRpcs):
    """Cancelling a call closes its generation, which gives its rows back at the next step."""

    def __init__(self, generator: Generator, embedder: Embedder, book: CallBook) -> None:
        self._generator = generator
        self._embedder = embedder
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
        return convert.text_reply_to_proto(events, completion.choices * len(completion.prompts))

    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        completion = convert.completion_from_proto(request.request)
        join_tokens = convert.join_tokens_from_proto(request.options)
        async for events in self._generator.run(completion, join_tokens):
            for event in events:
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
            prompt, images = convert.chat_prompt_from_proto(request.chat)
        else:
            prompt, images = convert.prompt_from_proto(request.prompt, "prompt"), ()
        counted = await self._generator.count_tokens(name, prompt, images)
        return pb.CountTokensResponse(
            token_count=counted.token_count,
            model=counted.model,
            context_length=counted.context_length,
            warnings=counted.warnings,
        )

    async def _collect(self, request: GenerationRequest) -> list[Event]:
        return [event async for events in self._generator.run(request) for event in events]
