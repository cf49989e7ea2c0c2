"""Files of images that went wrong in every way: each is a picture or refused, and the child goes on.

Some hundred in each run. The campaign:
FUZZ_IMAGES=20000 FUZZ_SEED=1 python -m pytest -m campaign tests/unit/test_image_mutations.py
"""

import asyncio
import os
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Sequence

import pytest
from PIL import Image, ImageCms

from mlxgui_grpc.errors import InvalidImageError
from mlxgui_grpc.images.decode import Decoder
from tests.support_images import PNG_HEAD, animated, decode, encoded, png, png_chunk

MUTATIONS = 200


@pytest.fixture
async def decoder() -> AsyncIterator[Decoder]:
    running = Decoder()
    yield running
    await running.close()


def corpus() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return [
        encoded("PNG", (40, 30)),
        encoded("PNG", (40, 30), "P"),
        encoded("PNG", (40, 30), "RGBA", icc_profile=profile, exif=exif),
        png(40, 4, (b"\0" + bytes(80)) * 4, colour=0, depth=16),
        encoded("JPEG", (40, 30), exif=exif),
        encoded("JPEG", (40, 30), "CMYK", icc_profile=profile),
        encoded("JPEG", (40, 30), progressive=True),
        encoded("GIF", (40, 30)),
        animated("GIF"),
        encoded("WEBP", (40, 30)),
        encoded("WEBP", (40, 30), "RGBA", lossless=True, exif=exif),
        animated("WEBP"),
    ]


def mutated(files: Sequence[bytes], seed: int) -> bytes:
    """A file with bytes changed, cut out, doubled or taken from another; its first ones mostly stay."""
    choose = random.Random(seed)
    data = bytearray(choose.choice(files))
    for _ in range(choose.randrange(1, 4)):
        first = (
            choose.randrange(len(data) or 1) if choose.random() < 0.1 else choose.randrange(6, len(data) + 7)
        )
        last = min(len(data), first + choose.choice((1, 1, 2, 4, 16, 200)))
        match choose.randrange(5):
            case 0:
                data[first:last] = choose.randbytes(last - first if last > first else 0)
            case 1:
                del data[first:last]
            case 2:
                data[first:first] = data[first:last]
            case 3:
                other = choose.choice(files)
                data[first:last] = other[first : first + choose.choice((1, 8, 64, 1000))]
            case 4:
                data[first:last] = choose.choice((b"\0", b"\xff", b"\x7f")) * (
                    last - first if last > first else 0
                )
    return summed(bytes(data)) if choose.random() < 0.5 else bytes(data)


def summed(data: bytes) -> bytes:
    """A PNG's chunks with the sums that they should have, so that more is read than the first of them."""
    if not data.startswith(PNG_HEAD):
        return data
    result, rest = PNG_HEAD, data[8:]
    while len(rest) >= 12:
        size = min(int.from_bytes(rest[:4], "big"), len(rest) - 12)
        result += png_chunk(rest[4:8], rest[8 : 8 + size])
        rest = rest[12 + size :]
    return result


async def run_mutations(decoder: Decoder, seeds: range) -> Counter[str]:
    files, outcomes = corpus(), Counter[str]()

    async def one(seed: int) -> None:
        try:
            picture = await decode(decoder, mutated(files, seed))
            assert len(picture.pixels) == 3 * picture.width * picture.height > 0, seed
            outcomes["picture"] += 1
        except InvalidImageError as error:
            outcomes[re.sub(r"\d+", "N", error.message.partition("it ")[2])] += 1

    for first in range(seeds.start, seeds.stop, 100):
        await asyncio.gather(*(one(seed) for seed in range(first, min(first + 100, seeds.stop))))
    return outcomes


async def test_no_file_is_too_strange(decoder: Decoder) -> None:
    """Each is a picture or refused, and there are both."""
    outcomes = await run_mutations(decoder, range(MUTATIONS))
    assert sum(outcomes.values()) == MUTATIONS
    assert outcomes["picture"] > MUTATIONS / 20 and outcomes["is cut short or damaged"] > MUTATIONS / 20, (
        outcomes
    )
    assert (await decode(decoder, png())).width == 3


@pytest.mark.campaign
@pytest.mark.timeout(24 * 3600)
async def test_twenty_thousand_files(decoder: Decoder) -> None:
    """The campaign."""
    first = int(os.environ.get("FUZZ_SEED", "1")) * 1_000_000
    count = int(os.environ.get("FUZZ_IMAGES", "20000"))
    outcomes = await run_mutations(decoder, range(first, first + count))
    assert sum(outcomes.values()) == count
    print(dict(outcomes))
