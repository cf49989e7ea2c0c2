"""The child process that decodes images, with limits: what a stranger made of a file happens in here.

Started as `python -m mlxgui_grpc.images.decode_child`. It reads jobs from standard input, answers each on standard
output, and ends at once when standard input closes.
"""

import contextlib
import io
import math
import os
import queue
import resource
import threading
import warnings
from collections.abc import Callable

import msgspec
from PIL import GifImagePlugin, Image, ImageCms, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from mlxgui_grpc.images.decode_frames import (
    MAX_PIXELS,
    MAX_SIDE_PIXELS,
    Decoded,
    Job,
    Ready,
    Refused,
    Report,
)
from mlxgui_grpc.images.formats import NAMES, Format, sniff

MAX_MEMORY_BYTES = 3 * 1024**3
"""Addresses of this process: the largest picture takes half of it on its way."""

# Called by themselves: Pillow's own search would bring all its other formats in.
_OPEN: dict[Format, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
}
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture upright, by its EXIF orientation."""
_REDUCING_GAP = 3.0
"""Pillow may first shrink a picture by whole numbers to three times its last size, or a JPEG while it decodes."""


class _RefusedError(Exception):
    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.words = words


def main() -> None:
    """Decode what comes on standard input, in order."""
    _limit(resource.RLIMIT_AS, MAX_MEMORY_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    # Pillow fails at twice its limit, and warns from once on, which is no matter here.
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
    warnings.simplefilter("ignore")
    output = os.dup(1)
    os.dup2(2, 1)  # What a library prints is no report.
    jobs: queue.SimpleQueue[tuple[Job, bytes]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(jobs,), name="control", daemon=True).start()
    _write(output, Ready())
    while True:
        job, data = jobs.get()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, math.ceil(usage.ru_utime + usage.ru_stime) + job.time_limit_seconds)
        _write(output, *_answer(job, data))


def _answer(job: Job, data: bytes) -> tuple[Report, bytes]:
    try:
        return decode(data, job)
    except _RefusedError as refusal:
        return Refused(refusal.words, "size"), b""
    except MemoryError:
        return Refused("takes too much memory to decode", "memory"), b""
    except Exception:  # A damaged file makes Pillow raise most of what Python has.
        return Refused("is cut short or damaged"), b""


def decode(data: bytes, job: Job) -> tuple[Report, bytes]:
    """The first frame, upright, on white, in sRGB, at most as large as the job says: its sizes and its pixels.

    Raises whatever Pillow raises.
    """
    format = sniff(data)
    if format is None:
        return Refused(f"is none of {NAMES}"), b""
    if format == "PNG" and b"IEND" not in data:  # Which Pillow does not miss.
        raise ValueError("no end")
    file = _OPEN[format](io.BytesIO(data))
    width, height = file.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE_PIXELS:
        raise _RefusedError(
            f"is {width} x {height} pixels large; {MAX_PIXELS >> 20} Mi pixels in all and {MAX_SIDE_PIXELS} a side "
            "are the most"
        )
    target = _fitting(width, height, job.max_pixels, job.max_side)
    file.draft("", tuple(round(_REDUCING_GAP * side) for side in target))  # type: ignore[arg-type]
    file.load()
    orientation, profile = _orientation(file), file.info.get("icc_profile")
    picture = _opaque(file)
    del file  # With what its decoder holds.
    if picture.size != target:
        if picture.mode == "1":
            picture = picture.convert("L")
        picture = picture.resize(target, Image.Resampling.BICUBIC, reducing_gap=_REDUCING_GAP)
    picture = _srgb(picture, profile)
    if orientation in _UPRIGHT:
        picture = picture.transpose(_UPRIGHT[orientation])
    if orientation in (5, 6, 7, 8):
        width, height = height, width
    return Decoded(*picture.size, width, height), picture.tobytes()


def _fitting(width: int, height: int, max_pixels: int, max_side: int) -> tuple[int, int]:
    """The size of the same shape that keeps to both limits, and no larger than it is."""
    scale = min(1.0, math.sqrt(max_pixels / (width * height)), max_side / max(width, height))
    return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))


def _orientation(file: Image.Image) -> int:
    try:
        orientation = file.getexif().get(_ORIENTATION)
    except Exception:  # A picture with damaged remarks is a picture.
        return 1
    return orientation if isinstance(orientation, int) else 1


def _opaque(file: Image.Image) -> Image.Image:
    """The pixels in mode RGB, L or CMYK, on white where they let something shine through."""
    if file.mode.startswith("I;16") or file.mode in ("I", "F"):
        # 16 bits of grey; a plain conversion would cut off what is brighter than 255.
        wide = file.convert("I") if file.mode != "F" else file
        file = wide.point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if file.has_transparency_data:
        layer = file.convert("RGBA")
        picture = Image.new("RGB", layer.size, "white")
        picture.paste(layer, mask=layer.getchannel("A"))
        return picture
    return file if file.mode in ("RGB", "L", "CMYK") else file.convert("RGB")


def _srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """In sRGB, by the profile if it is one for such pixels."""
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(
                picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            if converted is not None:
                return converted
    return picture.convert("RGB")


def _read(jobs: "queue.SimpleQueue[tuple[Job, bytes]]") -> None:
    """Take in jobs until standard input closes: the server is gone, or has done with us."""
    # os.read, because a daemon thread inside a buffered reader upsets the interpreter's shutdown.
    pending = bytearray()

    def more() -> None:
        chunk = os.read(0, 1 << 20)
        if not chunk:
            os._exit(0)
        pending.extend(chunk)

    while True:
        while (end := pending.find(b"\n")) < 0:
            more()
        job = msgspec.json.decode(pending[:end], type=Job)
        del pending[: end + 1]
        while len(pending) < job.byte_count:
            more()
        jobs.put((job, bytes(pending[: job.byte_count])))
        del pending[: job.byte_count]


def _write(output: int, report: Report, pixels: bytes = b"") -> None:
    for part in (msgspec.json.encode(report) + b"\n", pixels):
        rest = memoryview(part)
        while rest:
            rest = rest[os.write(output, rest) :]


def _limit(kind: int, limit: int) -> None:
    """Set a limit of this process, where the system knows it."""
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    main()
