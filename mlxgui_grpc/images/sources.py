"""What a request names as its images, and how many and how large they may be."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mlxgui_grpc.errors import InvalidImageError, InvalidRequestError, PayloadTooLargeError

MAX_IMAGES = 16
"""Of one request."""
MAX_IMAGE_BYTES = 20 * 1024 * 1024
"""Of one file, sent or fetched."""
MAX_IMAGES_BYTES = 48 * 1024 * 1024
"""Of all files of a request."""
MAX_URL_BYTES = 8 * 1024

Detail = Literal["auto", "low", "high"]


@dataclass(frozen=True, slots=True)
class ImageSource:
    """One image of a request: the bytes of its file, or where to fetch them. `field` is its path in the request."""

    field: str
    data: bytes = b""
    url: str = ""
    detail: Detail = "auto"


def check_sources(sources: Sequence[ImageSource]) -> None:
    """Check counts and sizes, before anything is fetched or decoded.

    Raises InvalidRequestError, InvalidImageError or PayloadTooLargeError, which name the field.
    """
    total_bytes = 0
    for index, source in enumerate(sources):
        if index == MAX_IMAGES:
            raise InvalidRequestError(
                f"{source.field} is one image too many: a request may have {MAX_IMAGES}", field=source.field
            )
        if not source.data and not source.url:
            raise InvalidImageError(f"{source.field} has 0 bytes: send an image or a URL", field=source.field)
        if len(source.url.encode("utf-8", "replace")) > MAX_URL_BYTES:
            raise PayloadTooLargeError(
                f"{source.field} is longer than a URL may be: {MAX_URL_BYTES} bytes", field=source.field
            )
        if len(source.data) > MAX_IMAGE_BYTES:
            raise PayloadTooLargeError(
                f"{source.field} has {len(source.data)} bytes; an image may have {MAX_IMAGE_BYTES >> 20} MiB",
                field=source.field,
            )
        total_bytes += len(source.data)
        if total_bytes > MAX_IMAGES_BYTES:
            raise images_too_large(source.field)


def images_too_large(field: str) -> PayloadTooLargeError:
    """With this one the images of a request are too many bytes."""
    return PayloadTooLargeError(
        f"with {field} the images of the request have more than {MAX_IMAGES_BYTES >> 20} MiB in all: "
        "send fewer or smaller ones",
        field=field,
    )
