"""A light OpenAI chat client over raw sockets: one connection per request, no JSON parsed per token."""

import asyncio
import json
import re
import time
from urllib.parse import urlsplit

from bench.load import closed_loop
from bench.load.serve import serve
from bench.load.tally import Reply, Tally
from bench.protocol import Order

# A non-empty text member. Quotes inside JSON strings are escaped, so text can never look like a member.
TEXT = re.compile(rb'"(?:content|reasoning_content|reasoning)"\s*:\s*"(?!")')


class EventStream(asyncio.Protocol):
    """Writes one request and counts the events of its reply; `done` ends with the reply or its error."""

    def __init__(self, request: bytes, max_tokens: int, tally: Tally) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._max_tokens = max_tokens
        self._tally = tally
        self._reply: Reply | None = None
        self._usage_tokens: int | None = None
        self._raw = b""
        self._text = b""
        self._status = 0
        self._is_chunked = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._reply = self._tally.begin(self._max_tokens)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._raw += data
        if not self._status and not self._read_head():
            return
        if self._status != 200:
            return
        try:
            self._read_events(now)
        except (ValueError, RuntimeError) as error:
            self._finish(error)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._status not in (0, 200):
            self._finish(RuntimeError(f"HTTP {self._status} {self._raw[:100]!r}"))
        self._finish(exc or EOFError("the connection closed before the reply had ended"))

    def _finish(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if error is not None:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)

    def _read_head(self) -> bool:
        head, separator, rest = self._raw.partition(b"\r\n\r\n")
        if not separator:
            return False
        self._status = int(head.split(b" ", 2)[1])
        self._is_chunked = b"transfer-encoding: chunked" in head.lower()
        self._raw = rest
        return True

    def _read_events(self, now: float) -> None:
        if self._is_chunked:
            self._unchunk()
        else:
            self._text += self._raw
            self._raw = b""
        *events, self._text = self._text.replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            self._read_event(event, now)

    def _unchunk(self) -> None:
        while True:
            size_line, separator, rest = self._raw.partition(b"\r\n")
            if not separator:
                return
            size = int(size_line.split(b";")[0], 16)
            if len(rest) < size + 2:
                return
            self._text += rest[:size]
            self._raw = rest[size + 2 :]
            if size == 0:
                return

    def _read_event(self, event: bytes, now: float) -> None:
        assert self._reply is not None
        if TEXT.search(event):
            self._tally.event(self._reply, now)
        if b'"completion_tokens"' in event:
            usage = json.loads(event.partition(b"data:")[2])["usage"]
            self._usage_tokens = int(usage["completion_tokens"])
        elif b'"error"' in event and b'"choices"' not in event:
            raise RuntimeError(event[:120].decode(errors="replace"))
        elif event.endswith(b"[DONE]") and not TEXT.search(event):
            if self._reply.first is None:
                raise RuntimeError("the reply had no text")
            self._tally.end(self._reply, self._usage_tokens)
            self._finish(None)


def connect(order: Order) -> closed_loop.Chat:
    """A client of the OpenAI API whose base URL is the order's endpoint."""
    url = urlsplit(order.endpoint)
    host, port = url.hostname, url.port
    if host is None or port is None:
        raise ValueError(f"{order.endpoint} names no host and port")

    async def chat(prompt: str, max_tokens: int, tally: Tally) -> None:
        body = json.dumps(
            {
                "model": order.model,
                "messages": [{"role": "user", "content": prompt}],
                "stream": True,
                "stream_options": {"include_usage": True},
                "temperature": 0,
                "max_tokens": max_tokens,
            }
        ).encode()
        head = (
            f"POST {url.path.rstrip('/')}/chat/completions HTTP/1.1\r\nHost: {url.netloc}\r\n"
            "Content-Type: application/json\r\nAccept: text/event-stream\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        ).encode()
        loop = asyncio.get_running_loop()
        transport, stream = await loop.create_connection(
            lambda: EventStream(head + body, max_tokens, tally), host, port
        )
        try:
            await stream.done
        finally:
            transport.abort()

    return chat


if __name__ == "__main__":
    serve(connect)
