"""What the control process and the child that decodes images say to each other: a JSON line, then so many bytes."""

from typing import Literal

import msgspec

MAX_PIXELS = 64 * 1024 * 1024
"""Of a picture, before it is made smaller."""
MAX_SIDE_PIXELS = 16_384


class Job(msgspec.Struct, frozen=True):
    """Decode the file of `byte_count` bytes that follows, to at most so many pixels and so long a side."""

    byte_count: int
    max_pixels: int
    max_side: int
    time_limit_seconds: int


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The child takes jobs: its first word."""


class Decoded(msgspec.Struct, tag="decoded", frozen=True):
    """`width` x `height` x 3 bytes of sRGB follow; the file's picture, the right way up, has the `full` size."""

    width: int
    height: int
    full_width: int
    full_height: int


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """Nothing follows: the bytes are no picture that is read. `words` go on from `it`."""

    words: str
    cause: Literal["bytes", "size", "memory"] = "bytes"


Report = Ready | Decoded | Refused
