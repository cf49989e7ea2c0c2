"""The images of a request's messages."""

import binascii
import re
from dataclasses import dataclass

from mlxgui.v1 import inference_pb2
from rest_bridge.errors import ApiError, invalid, too_large
from rest_bridge.json_body import Fields

MIB = 1024 * 1024

IMAGE_LIMIT_BYTES = 20 * MIB

IMAGES_LIMIT_BYTES = 48 * MIB

_DETAILS = {
    "auto": inference_pb2.Image.DETAIL_AUTO,
    "low": inference_pb2.Image.DETAIL_LOW,
    "high": inference_pb2.Image.DETAIL_HIGH,
}

_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII | re.IGNORECASE)


@dataclass
class ImageBudget:
    """Bytes of the images of one request so far."""

    size_bytes: int = 0


def read_image(fields: Fields, images: ImageBudget) -> inference_pb2.Image:
    """The image of an object with `url` and `detail`. Raises ApiError (400, 413)."""
    return image_at(fields.required_text("url"), fields.name("url"), read_detail(fields), images)


def read_detail(fields: Fields) -> "inference_pb2.Image.Detail.ValueType":
    """How closely to look. Raises ApiError (400)."""
    detail = fields.text("detail")
    if detail is not None and detail not in _DETAILS:
        raise invalid(f"`{fields.name('detail')}` must be auto, low or high.", fields.name("detail"))
    return _DETAILS.get(detail or "", inference_pb2.Image.DETAIL_UNSPECIFIED)


def image_at(
    url: str, name: str, detail: "inference_pb2.Image.Detail.ValueType", images: ImageBudget
) -> inference_pb2.Image:
    """The image at a URL that its caller calls `name`. Raises ApiError (400, 413)."""
    image = inference_pb2.Image(detail=detail)
    if url[:5].lower() != "data:":
        if not re.match(r"https?://", url, re.IGNORECASE):
            raise invalid(f"`{name}` must be an http, https or data URL.", name)
        image.url = url
        return image
    head = _DATA_URL.match(url)
    if head is None:
        raise invalid(f"`{name}` must be a data URL with base64.", name)
    padding_count = 2 if url.endswith("==") else url.endswith("=")
    size_bytes = (len(url) - head.end()) * 3 // 4 - padding_count
    if size_bytes <= 0:
        raise ApiError("INVALID_IMAGE", f"`{name}` holds 0 bytes; send the image's.", name)
    if size_bytes > IMAGE_LIMIT_BYTES:
        raise too_large(f"`{name}` holds {size_bytes} bytes; an image may have {IMAGE_LIMIT_BYTES}.", name)
    images.size_bytes += size_bytes
    if images.size_bytes > IMAGES_LIMIT_BYTES:
        raise too_large(f"The images of one request may have {IMAGES_LIMIT_BYTES} bytes in all.", name)
    try:
        image.data = binascii.a2b_base64(url[head.end() :], strict_mode=True)
    except (binascii.Error, ValueError):
        raise ApiError("INVALID_IMAGE", f"`{name}` is not base64.", name) from None
    image.media_type = head[1] or ""
    return image
