"""InferenceService: chat, completion, token counts."""

from collections.abc import AsyncIterator
from typing import Any

import grpc

from mlxgui.v1 import inference_pb2 as pb
from mlxgui.v1 import inference_pb2_grpc
from mlxgui_grpc import convert
from mlxgui_grpc.errors import InvalidRequestError
from mlxgui_grpc.generation import Delta, Event, GenerationRequest, Generator, Started

Context = grpc.aio.ServicerContext[Any, Any]

MAX_JOIN_TOKENS = 32


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Cancelling a call closes its generation, which gives its rows back at the next step."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def Chat(self, request: pb.ChatRequest, context: Context) -> pb.ChatResponse:
        chat = convert.chat_from_proto(request)
        return convert.chat_reply_to_proto(await self._collect(chat), chat.choices)

    async def ChatStream(
        self, request: pb.ChatStreamRequest, context: Context
    ) -> AsyncIterator[pb.ChatStreamResponse]:
        chat = convert.chat_from_proto(request.request)
        async for events in self._generator.run(chat, _join_tokens(request.options)):
            for event in events:
                yield convert.chat_event_to_proto(event)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        completion = convert.completion_from_proto(request)
        events = await self._collect(completion)
        if request.echo:
            events[1:1] = _echoes(completion)
        return convert.text_reply_to_proto(events, completion.choices * len(completion.prompts))

    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        completion = convert.completion_from_proto(request.request)
        async for events in self._generator.run(completion, _join_tokens(request.options)):
            for event in events:
                yield convert.text_event_to_proto(event)
                if request.request.echo and isinstance(event, Started):
                    for echo in _echoes(completion):
                        yield convert.text_event_to_proto(echo)

    async def CountTokens(self, request: pb.CountTokensRequest, context: Context) -> pb.CountTokensResponse:
        name = convert.model_name(request.model)
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


def _join_tokens(options: pb.StreamOptions) -> int:
    if options.max_join_tokens < 0:
        raise InvalidRequestError("max_join_tokens must not be negative", field="options.max_join_tokens")
    return options.max_join_tokens or MAX_JOIN_TOKENS


def _echoes(request: GenerationRequest) -> list[Event]:
    """The prompt as the first text of each of its choices."""
    return [
        Delta(index * request.choices + choice, prompt.text or "", 0)
        for index, prompt in enumerate(request.prompts)
        for choice in range(request.choices)
    ]
