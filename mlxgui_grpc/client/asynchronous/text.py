"""Text from models, for asyncio."""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from mlxgui.v1 import inference_pb2
from mlxgui_grpc.client import messages as conversion
from mlxgui_grpc.client import vectors
from mlxgui_grpc.client.asynchronous.connection import AsyncStream, Connection
from mlxgui_grpc.client.messages import ChatEvent, ChatReply, Completion, GenerateEvent, Message, Sampling
from mlxgui_grpc.client.vectors import Embeddings, Ranking


class TextCalls(Connection):
    """InferenceService: chat, completion, vectors, scores, and counting."""

    async def chat(
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
        """Answer a conversation, whole."""
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
        return conversion.chat_reply(await self._call(self._inference.Chat, request, timeout_seconds))

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
    ) -> AsyncStream[ChatEvent]:
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

    async def generate(
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
        """Continue prompts; answers when all choices are whole."""
        request = conversion.generate_request(
            model,
            prompts,
            sampling,
            echo=echo,
            keep_alive_seconds=keep_alive_seconds,
            require_loaded=require_loaded,
        )
        return conversion.completion(await self._call(self._inference.Generate, request, timeout_seconds))

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
    ) -> AsyncStream[GenerateEvent]:
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

    async def embed(
        self,
        model: str,
        inputs: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        dimensions: int | None = None,
        keep_alive_seconds: float | None = None,
        require_loaded: bool = False,
        timeout_seconds: float | None = None,
    ) -> Embeddings:
        """The vectors of a text, of texts or of lists of token ids; `dimensions` keeps so many leading numbers."""
        request = vectors.embed_request(
            model,
            inputs,
            dimensions=dimensions,
            keep_alive_seconds=keep_alive_seconds,
            require_loaded=require_loaded,
        )
        return vectors.embeddings(await self._call(self._inference.Embed, request, timeout_seconds))

    async def rerank(
        self,
        model: str,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        keep_alive_seconds: float | None = None,
        require_loaded: bool = False,
        timeout_seconds: float | None = None,
    ) -> Ranking:
        """How well documents answer a query, by a cross-encoder, best first; only the `top_n` best if given."""
        request = vectors.rerank_request(
            model,
            query,
            documents,
            top_n=top_n,
            keep_alive_seconds=keep_alive_seconds,
            require_loaded=require_loaded,
        )
        return vectors.ranking(await self._call(self._inference.Rerank, request, timeout_seconds))

    async def count_tokens(
        self, model: str, prompt: str | Sequence[Message], *, timeout_seconds: float | None = None
    ) -> int:
        """Tokens of a prompt (text) or of a conversation (a sequence of messages), exactly."""
        request = conversion.count_request(model, prompt)
        return (await self._call(self._inference.CountTokens, request, timeout_seconds)).token_count
