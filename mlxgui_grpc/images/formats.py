"""The kinds of image that are read, found from their first bytes and never from what a sender calls them."""

from typing import Literal

Format = Literal["PNG", "JPEG", "GIF", "WebP"]

NAMES = "PNG, JPEG, GIF and WebP"
HEAD_BYTES = 12
"""What `sniff` looks at."""


def sniff(head: bytes) -> Format | None:
    """What a file begins as; None for everything else: SVG and TIFF, say, are never read."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WebP"
    return None
