"""InferenceService.Session: many requests over one stream, everything that is ready in one message."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from mlxgui.v1 import inference_pb2 as pb
from mlxgui_grpc import convert
from mlxgui_grpc.errors import InvalidRequestError, OperationCancelledError
from mlxgui_grpc.generation import Generator
from mlxgui_grpc.services.call_record import CallBook
from mlxgui_grpc.services.interceptors import UNREADABLE, Unreadable

MAX_UNSENT_ITEMS = 4_096
"""When the client does not read, requests stop taking from their engines here; those then pause their rows."""


class Session:
    """One session. `run` is its life."""

    def __init__(self, generator: Generator, book: CallBook, peer: str) -> None:
        self._generator = generator
        self._book = book
        self._peer = peer
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._unsent: list[pb.SessionItem] = []
        self._has_news = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()

    async def run(self, requests: AsyncIterator[pb.SessionRequest]) -> AsyncIterator[pb.SessionResponse]:
        """Yield what is ready, one message per wake-up, until the client has half-closed and all is answered.

        Closing the iterator cancels every request. Raises InvalidRequestError for what breaks the session itself,
        and ServerDrainingError when the server takes no new work and the last request has ended.
        """
        reader = asyncio.get_running_loop().create_task(self._read(requests))
        reader.add_done_callback(lambda _: self._has_news.set())
        drain = asyncio.get_running_loop().create_task(self._book.draining.wait())
        drain.add_done_callback(lambda _: self._has_news.set())
        try:
            while True:
                await self._has_news.wait()
                self._has_news.clear()
                if self._unsent:
                    items, self._unsent = self._unsent, []
                    self._has_room.set()
                    yield pb.SessionResponse(items=items)
                if not self._tasks and not self._unsent:
                    if reader.done():
                        reader.result()
                        return
                    self._book.admit()
                if reader.done() and reader.exception() is not None:
                    reader.result()
        finally:
            tasks: list[asyncio.Task[Any]] = [reader, drain, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        async for request in requests:
            if isinstance(request, Unreadable):
                raise InvalidRequestError(UNREADABLE)
            kind = request.WhichOneof("command")
            if kind == "cancel":
                if task := self._tasks.get(request.id):
                    task.cancel()
                continue
            if kind is None:
                raise InvalidRequestError("a message of a session needs a command", field="command")
            if request.id <= 0 or request.id in self._tasks:
                raise InvalidRequestError(
                    f"session request id {request.id} is not positive, or in use", field="id"
                )
            task = asyncio.get_running_loop().create_task(self._serve(request, kind))
            self._tasks[request.id] = task
            await asyncio.sleep(0)  # A task that is cancelled before it began would never say that it ended.

    async def _serve(self, request: pb.SessionRequest, kind: str) -> None:
        """One request from its command to its one terminal item, which a cancelled one has too."""
        method = "ChatStream" if kind == "chat" else "GenerateStream"
        record = self._book.open(f"Session/{method}", request.request_id, self._peer)
        try:
            self._book.admit()
            async for items in self._items(request, kind):
                record.message_count += len(items)
                self._unsent += items
                self._has_news.set()
                if len(self._unsent) >= MAX_UNSENT_ITEMS:
                    self._has_room.clear()
                    await self._has_room.wait()
        except asyncio.CancelledError:
            record.cancelled()
            cancelled = OperationCancelledError("The request was cancelled")
            self._unsent.append(pb.SessionItem(id=request.id, error=convert.error_to_proto(cancelled)))
            raise
        except Exception as failure:
            seen = record.failed(failure)
            self._unsent.append(pb.SessionItem(id=request.id, error=convert.error_to_proto(seen)))
        finally:
            del self._tasks[request.id]
            record.close()
            self._has_news.set()

    async def _items(self, request: pb.SessionRequest, kind: str) -> AsyncIterator[list[pb.SessionItem]]:
        """The events of one request, each with its id."""
        number = request.id
        given = request.timeout
        seconds = given.seconds + given.nanos / 1e9 if request.HasField("timeout") else None
        if kind == "chat":
            chat = convert.chat_from_proto(request.chat.request)
            join_tokens = convert.join_tokens_from_proto(request.chat.options)
            async for events in self._generator.run(chat, join_tokens, seconds):
                yield [pb.SessionItem(id=number, chat=convert.chat_event_to_proto(event)) for event in events]
            return
        completion = convert.completion_from_proto(request.generate.request)
        join_tokens = convert.join_tokens_from_proto(request.generate.options)
        async for events in self._generator.run(completion, join_tokens, seconds):
            yield [pb.SessionItem(id=number, generate=convert.text_event_to_proto(event)) for event in events]
