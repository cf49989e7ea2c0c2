"""The typed client of the model server, blocking (`Client`) and for asyncio (`AsyncClient`).

    with Client() as client:
        for text in client.stream_chat("demo", "What is the capital of France?").texts():
            print(text, end="")

Every failure is a `ModelServerError` of `mlxgui_grpc.errors`, as if the server's code had raised it here.
"""

from mlxgui_grpc.client.address import ServerAddress, discover
from mlxgui_grpc.client.asynchronous import AsyncClient, AsyncStream
from mlxgui_grpc.client.blocking import Client, Stream
from mlxgui_grpc.client.failures import ServerUnreachableError
from mlxgui_grpc.client.management import CatalogKind, CatalogSort, SettingValues
from mlxgui_grpc.client.messages import (
    ChatEvent,
    ChatReply,
    Completion,
    FinishReason,
    GenerateEvent,
    Message,
    Sampling,
    chat_message,
    finish_reason,
)
from mlxgui_grpc.client.vectors import Embeddings, Ranking

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "CatalogKind",
    "CatalogSort",
    "ChatEvent",
    "ChatReply",
    "Client",
    "Completion",
    "Embeddings",
    "FinishReason",
    "GenerateEvent",
    "Message",
    "Ranking",
    "Sampling",
    "ServerAddress",
    "ServerUnreachableError",
    "SettingValues",
    "Stream",
    "chat_message",
    "discover",
    "finish_reason",
]
