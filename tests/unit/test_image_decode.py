"""Files of images become pictures, or are refused with the reason; whatever is in them harms nobody but a child."""

import asyncio
import contextlib
import io
import os
import signal
import struct
import sys
import threading
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from PIL import Image, ImageCms

from mlxgui_grpc.catalog import InstalledModel, Origin
from mlxgui_grpc.engine import frames
from mlxgui_grpc.errors import (
    InvalidImageError,
    InvalidRequestError,
    ModelServerError,
    PayloadTooLargeError,
    QueueFullError,
    UrlFetchFailedError,
)
from mlxgui_grpc.images.decode import Decoder, Picture
from mlxgui_grpc.images.fetch import Fetcher
from mlxgui_grpc.images.loader import MAX_DECODING, MAX_FETCHING, MAX_PIXEL_BYTES, ImageLoader
from mlxgui_grpc.images.sources import MAX_IMAGE_BYTES, MAX_IMAGES, ImageSource
from mlxgui_grpc.images.urls import UrlPolicy
from mlxgui_grpc.images.waiting import WaitingImages
from tests.support_images import PNG_HEAD, animated, decode, encoded, png, png_chunk

FIELD = "messages[0].content[0].image.data"
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


# One decoder for all of them: a child takes longer to start than to decode.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def decoder() -> AsyncIterator[Decoder]:
    running = Decoder()
    yield running
    await running.close()
    assert not children()


async def refused(decoder: Decoder, data: bytes) -> str:
    with pytest.raises(InvalidImageError) as caught:
        await decode(decoder, data, FIELD)
    assert caught.value.field == FIELD and caught.value.message.startswith(f"{FIELD} cannot be read: it ")
    return caught.value.message


def pixel(picture: Picture, x: int, y: int) -> tuple[int, ...]:
    offset = 3 * (y * picture.width + x)
    return tuple(picture.pixels[offset : offset + 3])


def is_near(left: Sequence[int], right: Sequence[int], difference: int = 12) -> bool:
    return all(abs(a - b) <= difference for a, b in zip(left, right, strict=True))


def children() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if "mlxgui_grpc.images.decode_child" in " ".join(child.cmdline())
    ]


# What is read.


async def test_every_format_and_mode_becomes_sixteen_million_colours(decoder: Decoder) -> None:
    """PNG, JPEG, GIF and WebP, in every mode that their encoders know."""
    files = {
        "png": encoded("PNG"),
        "png palette": encoded("PNG", mode="P"),
        "png alpha": encoded("PNG", mode="RGBA"),
        "jpeg": encoded("JPEG", quality=95, subsampling=0),
        "jpeg progressive": encoded("JPEG", quality=95, subsampling=0, progressive=True),
        "jpeg cmyk": encoded("JPEG", mode="CMYK", quality=95, subsampling=0),
        "gif": encoded("GIF"),
        "webp": encoded("WEBP", quality=100),
        "webp lossless": encoded("WEBP", lossless=True),
        "webp alpha": encoded("WEBP", mode="RGBA", lossless=True),
    }
    for name, data in files.items():
        picture = await decode(decoder, data)
        assert (picture.width, picture.height, picture.full_size) == (8, 6, (8, 6)), name
        assert len(picture.pixels) == 8 * 6 * 3
        assert is_near(pixel(picture, 1, 1), RED, 40) and is_near(pixel(picture, 6, 4), BLUE, 40), name


async def test_only_the_first_frame_counts(decoder: Decoder) -> None:
    for format in ("GIF", "WEBP", "PNG"):
        picture = await decode(decoder, animated(format))
        assert is_near(pixel(picture, 4, 3), RED), format


async def test_what_shines_through_is_white(decoder: Decoder) -> None:
    """Half a red on white; a colour of a palette, and a grey, that is none."""
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    for picture, options, expected in (
        (half, {}, (255, 127, 127)),
        (half.convert("LA"), {}, (165, 165, 165)),
        (palette, {"transparency": 1}, WHITE),
        (palette, {"transparency": 0}, BLUE),
        (Image.new("L", (4, 4), 7), {"transparency": 7}, WHITE),
        (Image.new("RGB", (4, 4), RED), {"transparency": RED}, WHITE),
    ):
        file = io.BytesIO()
        picture.save(file, "PNG", **options)
        assert is_near(pixel(await decode(decoder, file.getvalue()), 2, 2), expected, 2), (
            picture.mode,
            options,
        )


async def test_sixteen_bits_become_eight(decoder: Decoder) -> None:
    """Grey and colour; a plain conversion of grey would be white from 256 on."""
    grey = struct.pack(">B4H", 0, 0, 257, 0x8000, 65_535)
    picture = await decode(decoder, png(4, 1, grey, colour=0, depth=16))
    assert [pixel(picture, x, 0)[0] for x in range(4)] == [0, 1, 128, 255]
    colours = struct.pack(">B6H", 0, 65_535, 0x8000, 0, 0, 0, 65_535)
    picture = await decode(decoder, png(2, 1, colours, colour=2, depth=16))
    assert (pixel(picture, 0, 0), pixel(picture, 1, 0)) == ((255, 128, 0), BLUE)
    picture = await decode(decoder, png(8, 1, b"\0\xaa", colour=0, depth=1))
    assert [pixel(picture, x, 0)[0] for x in range(8)] == [255, 0] * 4


async def test_a_photograph_is_the_right_way_up(decoder: Decoder) -> None:
    """For each of the eight orientations, in each format that has them; damaged remarks are passed over."""
    upright = Image.new("RGB", (16, 8), "white")
    upright.paste("red", (0, 0, 8, 4))  # Top left.
    turned = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }
    for orientation, stored in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for format in ("JPEG", "PNG", "WEBP"):
            file = io.BytesIO()
            stored.save(file, format, exif=exif)
            picture = await decode(decoder, file.getvalue())
            assert picture.full_size == (16, 8) == (picture.width, picture.height)
            corners = [pixel(picture, x, y) for x, y in ((2, 2), (13, 2), (2, 6), (13, 6))]
            assert is_near(corners[0], RED, 60), (orientation, format)
            assert all(is_near(corner, WHITE, 60) for corner in corners[1:]), (orientation, format)
    file = io.BytesIO()
    upright.save(file, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert (await decode(decoder, file.getvalue())).width == 16


async def test_colours_are_those_of_srgb(decoder: Decoder) -> None:
    """By the profile in the file; one that is damaged, or for other pixels, is passed over."""
    grey = Image.new("RGB", (4, 4), (100, 150, 200))
    linear = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    same = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (same, linear, b"no profile", same[:200], same[:128] + os.urandom(len(same) - 128)):
        for format in ("PNG", "JPEG", "WEBP"):
            file = io.BytesIO()
            grey.save(file, format, icc_profile=profile, **({} if format == "PNG" else {"quality": 100}))
            picture = await decode(decoder, file.getvalue())
            if profile in (same, b"no profile"):
                assert is_near(pixel(picture, 2, 2), (100, 150, 200), 4), format


# What is made smaller.


async def test_a_picture_is_made_no_larger_than_it_may_be(decoder: Decoder) -> None:
    """By its area and by its longest side; its shape stays."""
    for format in ("PNG", "JPEG", "WEBP"):
        data = encoded(format, (400, 100))
        picture = await decode(decoder, data, max_pixels=10_000)
        assert (picture.width, picture.height, picture.full_size) == (200, 50, (400, 100)), format
        assert is_near(pixel(picture, 10, 10), RED, 8) and is_near(pixel(picture, 190, 40), BLUE, 8)
        picture = await decode(decoder, data, max_side=40)
        assert (picture.width, picture.height) == (40, 10), format
    picture = await decode(decoder, encoded("PNG", (1000, 1)), max_side=10)
    assert (picture.width, picture.height) == (10, 1)
    picture = await decode(decoder, encoded("PNG", (16_384, 1)))
    assert picture.width == 16_384


async def test_a_request_says_what_was_made_smaller(decoder: Decoder) -> None:
    """Not of low detail, which its caller asked for; sixteen pictures share what there is."""
    loader = ImageLoader(Fetcher(UrlPolicy(is_on=False)), decoder)
    large = png(2600, 2000, bytes(2601 // 8 * 2000 + 2000), colour=0, depth=1)
    sources = [
        ImageSource("a.image.data", large),
        ImageSource("b", encoded("PNG", (1024, 256)), detail="low"),
        ImageSource("c", encoded("PNG")),
        ImageSource("d", large, detail="high"),
    ]
    images, warnings = await loader.load(sources)
    assert [(image.width, image.height, image.detail) for image in images] == [
        (2335, 1796, "auto"),
        (512, 128, "low"),
        (8, 6, "auto"),
        (2335, 1796, "high"),
    ]
    assert warnings == [
        f"the image in {part} was made smaller, from 2600 x 2000 to 2335 x 1796 pixels" for part in ("a", "d")
    ]
    images, warnings = await loader.load([ImageSource(str(index), large) for index in range(MAX_IMAGES)])
    assert len(warnings) == MAX_IMAGES
    assert MAX_PIXEL_BYTES * 0.99 < sum(len(image.pixels) for image in images) <= MAX_PIXEL_BYTES


async def test_hosts_that_dawdle_do_not_stop_those_who_send_their_images(decoder: Decoder) -> None:
    """However many there are, and though none of them answers before the others are done."""
    is_over = threading.Event()

    def dawdle(host: str, port: int) -> list[str]:
        is_over.wait()
        return []

    loader = ImageLoader(Fetcher(UrlPolicy(), resolve=dawdle, time_limit_seconds=120), decoder)
    slow = [
        asyncio.create_task(loader.load([ImageSource("slow", url=f"http://slow{index}.example/")]))
        for index in range(2 * (MAX_FETCHING + MAX_DECODING))
    ]
    try:
        await asyncio.sleep(0)
        images, _ = await loader.load([ImageSource("sent", encoded("PNG"))])
        assert (images[0].width, images[0].height) == (8, 6)
        assert not any(task.done() for task in slow)
    finally:
        is_over.set()
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)


async def test_images_wait_until_their_request_is_accepted_and_keep_others_out(decoder: Decoder) -> None:
    """Before those are fetched or decoded when there is no room at all."""
    model = InstalledModel(name="eyes", origin=Origin.DIRECTORY, path=Path("/m"), type="vision")
    loader = ImageLoader(Fetcher(UrlPolicy(is_on=False)), decoder, max_waiting_bytes=2 * 8 * 6 * 3)

    async def resolve(data: bytes, waiting: ExitStack) -> frames.Prompt:
        return await loader.resolve(frames.Prompt(), [ImageSource("f", data)], model, [], waiting)

    with ExitStack() as other:
        with ExitStack() as waiting:
            for stack in (waiting, other):
                assert (await resolve(encoded("PNG"), stack)).images
            with pytest.raises(QueueFullError, match="wait for model 'eyes'"):
                await resolve(b"no image", other)
        with pytest.raises(InvalidImageError):
            await resolve(b"no image", other)
        assert (await resolve(encoded("PNG"), other)).images


async def test_the_bytes_of_images_that_wait_for_a_model_have_a_limit() -> None:
    """What is refused is not counted; who has left makes room; another model's do not count."""
    waiting = WaitingImages(limit_bytes=100)
    with waiting.held("a", 60):
        with pytest.raises(QueueFullError, match="wait for model 'a'") as caught, waiting.held("a", 50):
            pass
        assert caught.value.retry_after_seconds
        waiting.refuse_crowd("a")
        with waiting.held("b", 50), waiting.held("a", 40):
            waiting.refuse_crowd("b")
            with pytest.raises(QueueFullError):
                waiting.refuse_crowd("a")
    with waiting.held("a", 100):
        pass


# What is not read.


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is none of PNG, JPEG, GIF and WebP"),
        (b"GIF", "is none of PNG, JPEG, GIF and WebP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><rect width='9' height='9'/></svg>", "is none of"),
        (b"<?xml version='1.0'?><!DOCTYPE svg SYSTEM 'file:///etc/passwd'><svg/>", "is none of"),
        (b"II*\0" + bytes(100), "is none of"),
        (b"BM" + bytes(100), "is none of"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is none of"),
        (b"\0\0\0\x1cftypavif", "is none of"),
        (PNG_HEAD, "is cut short or damaged"),
        (b"\xff\xd8\xff", "is cut short or damaged"),
        (b"GIF89a", "is cut short or damaged"),
        (b"RIFF\xff\xff\xff\xffWEBP", "is cut short or damaged"),
        (png(0, 5, b""), "is cut short or damaged"),
        (png(60_000, 60_000, b"\0")[:45], "is cut short or damaged"),
        (png(60_000, 60_000, b"\0"), "is 60000 x 60000 pixels large; 64 Mi pixels in all and 16384 a side"),
        (png(16_385, 1), "is 16385 x 1 pixels large"),
        (png(1, 16_385), "is 1 x 16385 pixels large"),
        (png(8192, 8193, b"\0"), "is 8192 x 8193 pixels large"),
        (b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b";", "is "),
        (png(64, 64)[:-60], "is cut short or damaged"),
        (png(64, 64)[:-12], "is cut short or damaged"),
        (encoded("JPEG", (64, 64))[:-300], "is cut short or damaged"),
        (encoded("WEBP", (64, 64))[:-30], "is cut short or damaged"),
        (encoded("GIF", (64, 64))[:-30], "is cut short or damaged"),
    ],
    ids=lambda value: repr(value)[:24],
)
async def test_a_file_that_is_no_picture_is_refused_with_the_reason(
    decoder: Decoder, data: bytes, words: str
) -> None:
    assert words in await refused(decoder, data)


async def test_a_webp_that_claims_to_be_vast_takes_no_memory(decoder: Decoder) -> None:
    header = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (2**24 - 1).to_bytes(3, "little") * 2
    data = b"RIFF" + struct.pack("<I", 4 + len(header)) + b"WEBP" + header
    assert await refused(decoder, data)
    assert all(child.memory_info().rss < 512 * 1024**2 for child in children())


async def test_a_bomb_within_the_limits_is_a_picture(decoder: Decoder) -> None:
    """8 KiB that are 64 Mi pixels: the largest there may be, of one bit each."""
    rows = (b"\0" + bytes(8192 // 8)) * 8192
    data = png(8192, 8192, rows, colour=0, depth=1)
    assert len(data) < 16 * 1024
    picture = await decode(decoder, data)
    assert (picture.width, picture.height, picture.full_size) == (2048, 2048, (8192, 8192))


async def test_remarks_that_unfold_are_not_read(decoder: Decoder) -> None:
    """A text and a profile of 100 MB each in a few KB."""
    bomb = zlib.compress(bytes(100 * 1024**2), 1)
    head, body = png()[: 8 + 25], png()[8 + 25 :]
    for kind, remark in ((b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0")):
        with_bomb = head + png_chunk(kind, remark + bomb) + body
        with contextlib.suppress(InvalidImageError):
            assert (await decode(decoder, with_bomb)).width == 3
    assert all(child.memory_info().rss < 512 * 1024**2 for child in children())


async def test_what_is_elsewhere_is_not_described(decoder: Decoder) -> None:
    with pytest.raises(UrlFetchFailedError) as caught:
        await decoder.decode(png(60_000, 60_000, b"\0"), "f", max_pixels=100, max_side=100, is_fetched=True)
    assert caught.value.message == "f could not be fetched: what is there is no image that can be read"


@pytest.mark.parametrize(
    ("sources", "error", "words"),
    [
        ([ImageSource(f"f{index}", b"x") for index in range(17)], InvalidRequestError, "f16 .* may have 16"),
        ([ImageSource("f0")], InvalidImageError, "f0 has 0 bytes"),
        ([ImageSource("f0", url="http://a/" + "x" * 8192)], PayloadTooLargeError, "f0 .* 8192 bytes"),
        ([ImageSource("f0", bytes(MAX_IMAGE_BYTES + 1))], PayloadTooLargeError, "f0 .* 20 MiB"),
        (
            [ImageSource(f"f{index}", bytes(MAX_IMAGE_BYTES)) for index in range(3)],
            PayloadTooLargeError,
            "f2 .* 48 MiB in all",
        ),
    ],
    ids=["17 images", "no bytes", "long URL", "one too large", "all too large"],
)
async def test_counts_and_sizes_are_checked_before_anything_else(
    decoder: Decoder, sources: list[ImageSource], error: type[ModelServerError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        await ImageLoader(Fetcher(UrlPolicy()), decoder).load(sources)
    assert caught.value.field == words.partition(" ")[0]


# The child.


async def test_a_child_that_stops_or_ends_over_a_picture_is_replaced() -> None:
    """As far as anybody can tell it is the picture's fault; a caller that leaves takes its child along."""
    before = set(children())
    decoder = Decoder(time_limit_seconds=3)

    async def stopped() -> tuple[psutil.Process, asyncio.Task[Picture]]:
        """A child that is stopped over a picture."""
        assert (await decode(decoder, png())).width == 3
        (child,) = set(children()) - before
        child.send_signal(signal.SIGSTOP)
        task = asyncio.create_task(decode(decoder, png()))
        await asyncio.sleep(0)
        return child, task

    child, task = await stopped()
    with pytest.raises(InvalidImageError, match="it takes longer than 3 seconds to decode"):
        await task
    child, task = await stopped()
    child.kill()
    with pytest.raises(InvalidImageError, match="it breaks what decodes it"):
        await task
    child, task = await stopped()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await decoder.close()
    assert set(children()) == before


async def test_a_child_ends_with_its_pipe() -> None:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mlxgui_grpc.images.decode_child"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdin is not None and child.stdout is not None
    assert await child.stdout.readline() == b'{"type":"ready"}\n'
    child.stdin.write(b'{"byte_count":100,"max_pixels":9,"max_side":9,"time_limit_seconds":1}\nhalf of it')
    child.stdin.close()
    async with asyncio.timeout(30):
        assert await child.wait() == 0
