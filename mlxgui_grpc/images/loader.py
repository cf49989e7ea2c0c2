"""Makes of what a request names as its images the pictures that a model sees, or leaves them out."""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, TypeVar

import msgspec

from mlxgui_grpc.catalog import InstalledModel
from mlxgui_grpc.engine import frames
from mlxgui_grpc.images.decode import Decoder, Picture
from mlxgui_grpc.images.decode_frames import MAX_SIDE_PIXELS
from mlxgui_grpc.images.fetch import FetchedBytes, Fetcher
from mlxgui_grpc.images.sources import ImageSource, check_sources
from mlxgui_grpc.images.text_only import without_images
from mlxgui_grpc.images.waiting import MAX_WAITING_BYTES, WaitingImages

MAX_PIXELS = 2048 * 2048
"""Of one picture as a model sees it: more than any of them looks at."""
MAX_PIXEL_BYTES = 64 * 1024 * 1024
"""Of all pictures of a request, three a pixel. They cross to the worker in one frame."""
LOW_DETAIL_SIDE_PIXELS = 512
"""Of a picture that is to be looked at with low detail."""
MAX_DECODING = 16
"""Requests whose images are decoded at once; more wait."""
MAX_FETCHING = 16
"""Requests with URLs whose images are in the making at once; more wait. What they have fetched stays in memory."""

Result = TypeVar("Result")


class ImageLoader:
    """Fetches and decodes the images of requests. Use on the event loop only; nothing blocks it."""

    def __init__(
        self, fetcher: Fetcher, decoder: Decoder, max_waiting_bytes: int = MAX_WAITING_BYTES
    ) -> None:
        """`max_waiting_bytes` is for the decoded images that wait for one model."""
        self.fetcher = fetcher
        self._decoder = decoder
        self._waiting = WaitingImages(max_waiting_bytes)
        self._fetch_turns = asyncio.Semaphore(MAX_FETCHING)
        self._decode_turns = asyncio.Semaphore(MAX_DECODING)
        """Nobody fetches while holding one: hosts that dawdle do not stop those who send their images."""

    async def resolve(
        self,
        prompt: frames.Prompt,
        sources: Sequence[ImageSource],
        model: InstalledModel,
        warnings: list[str],
        waiting: ExitStack,
    ) -> frames.Prompt:
        """The prompt as `model` takes it: with its images, or without them where it reads text only.

        Says in `warnings` what was left out or made smaller. The images count as waiting for the model until `waiting`
        is closed. Raises what `load` raises, and QueueFullError when too many bytes wait; for a model of text nothing
        is fetched or decoded.
        """
        if not sources:
            return prompt
        if model.type != "vision":
            warnings.append(f"images were left out: '{model.name}' is a text model")
            return without_images(prompt)
        self._waiting.refuse_crowd(model.name)
        images, words = await self.load(sources)
        waiting.enter_context(self._waiting.held(model.name, sum(len(image.pixels) for image in images)))
        warnings.extend(words)
        return msgspec.structs.replace(prompt, images=images)

    async def load(self, sources: Sequence[ImageSource]) -> tuple[tuple[frames.Image, ...], list[str]]:
        """The pictures, in their order, and sentences about those that were made smaller.

        Cancelling it ends what runs. Raises InvalidRequestError, InvalidImageError, PayloadTooLargeError,
        UrlBlockedError or UrlFetchFailedError, which name the field.
        """
        check_sources(sources)
        fetched = FetchedBytes(sum(len(source.data) for source in sources))
        # By their number alone: what becomes of one does not hang on the sizes of the others.
        max_pixels = min(MAX_PIXELS, MAX_PIXEL_BYTES // 3 // max(1, len(sources)))
        async with self._fetch_turns if any(each.url for each in sources) else nullcontext():
            files = await _all(self._file(each, fetched) for each in sources)
            async with self._decode_turns:
                pictures = await _all(
                    self._decode(source, data, max_pixels)
                    for source, data in zip(sources, files, strict=True)
                )
        images = tuple(
            frames.Image(picture.width, picture.height, picture.pixels, source.detail)
            for source, picture in zip(sources, pictures, strict=True)
        )
        return images, [
            words
            for source, picture in zip(sources, pictures, strict=True)
            if (words := _words(source, picture))
        ]

    async def close(self) -> None:
        """End every child process."""
        await self._decoder.close()

    async def _file(self, source: ImageSource, fetched: FetchedBytes) -> bytes:
        return source.data or await self.fetcher.fetch(source.url, source.field, fetched)

    async def _decode(self, source: ImageSource, data: bytes, max_pixels: int) -> Picture:
        return await self._decoder.decode(
            data,
            source.field,
            max_pixels=max_pixels,
            max_side=LOW_DETAIL_SIDE_PIXELS if source.detail == "low" else MAX_SIDE_PIXELS,
            is_fetched=not source.data,
        )


async def _all(works: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """What they return, in their order; the first that fails ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _words(source: ImageSource, picture: Picture) -> str:
    """What to say of a picture that is not as large as its file's; empty when nothing is to be said."""
    is_smaller = picture.width * picture.height < picture.full_size[0] * picture.full_size[1]
    if not is_smaller or source.detail == "low":  # Which asks for that.
        return ""
    part = source.field.partition(".image.")[0]  # What follows is called something else in each API.
    full = " x ".join(map(str, picture.full_size))
    return f"the image in {part} was made smaller, from {full} to {picture.width} x {picture.height} pixels"
