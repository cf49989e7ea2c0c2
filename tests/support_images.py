"""Servers on loopback that images are fetched from, and pictures to serve."""

import asyncio
import io
import ssl
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import pytest

from mlxgui_grpc.errors import ModelServerError, UrlBlockedError, UrlFetchFailedError
from mlxgui_grpc.images.decode import Decoder, Picture
from mlxgui_grpc.images.fetch import FetchedBytes, Fetcher
from mlxgui_grpc.images.loader import MAX_PIXELS

FIELD = "messages[0].content[0].image.url"
PNG_HEAD = b"\x89PNG\r\n\x1a\n"


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int = 3, height: int = 2, rows: bytes | None = None, *, colour: int = 2, depth: int = 8
) -> bytes:
    """A PNG with this header; its pixels are what `rows` says, red where it says nothing."""
    if rows is None:
        rows = (b"\0" + b"\xff\0\0" * width) * height
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = png_chunk(b"IDAT", zlib.compress(rows, 9))
    return PNG_HEAD + png_chunk(b"IHDR", header) + data + png_chunk(b"IEND", b"")


def answer(body: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    """A whole HTTP response."""
    headers = {"Content_Length": str(len(body)), "Content_Type": "image/png"} | headers
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return answer(status=status, Location=location)


@dataclass
class Canary:
    """A server on loopback that counts connections, and answers by path."""

    answers: dict[str, bytes] = field(default_factory=dict)
    requests: list[list[str]] = field(default_factory=list)
    connection_count: int = 0
    port: int = 0
    endless: bytes = b""
    """Sent again and again after the answer of a path that ends in /endless."""
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def start(self, tls: ssl.SSLContext | None = None) -> "Canary":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    @property
    def is_left(self) -> bool:
        """Nobody is connected any more."""
        return not self._writers

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connection_count += 1
        self._writers.add(writer)
        try:
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            self.requests.append(lines)
            path = lines[0].split(" ")[1]
            writer.write(self.answers.get(path, answer(status="404 Not Found")))
            await writer.drain()
            while path.endswith("/endless"):
                writer.write(self.endless)
                await writer.drain()
                if len(self.endless) < 100:
                    await asyncio.sleep(0.01)
            if path.endswith("/silent"):
                await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()


def encoded(format: str, size: tuple[int, int] = (8, 6), mode: str = "RGB", **options: object) -> bytes:
    """A file as Pillow writes it: a red left half and a blue right one."""
    from PIL import Image

    width, height = size
    picture = Image.new("RGB", size, "red")
    picture.paste("blue", (width // 2, 0, width, height))
    file = io.BytesIO()
    picture.convert(mode).save(file, format, **options)
    return file.getvalue()


async def fetch(fetcher: Fetcher, url: str) -> bytes:
    return await fetcher.fetch(url, FIELD, FetchedBytes())


async def refused_fetch(fetcher: Fetcher, url: str) -> ModelServerError:
    with pytest.raises((UrlBlockedError, UrlFetchFailedError)) as caught:
        await fetch(fetcher, url)
    assert caught.value.field == FIELD and FIELD in caught.value.message
    return caught.value


async def decode(decoder: Decoder, data: bytes, field: str = "f", **limits: Any) -> Picture:
    limits = {"max_pixels": MAX_PIXELS, "max_side": 16_384} | limits
    return await decoder.decode(data, field, **limits)


def animated(format: str) -> bytes:
    """Red, then blue."""
    from PIL import Image

    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, format, save_all=True, append_images=frames[1:])
    return file.getvalue()
