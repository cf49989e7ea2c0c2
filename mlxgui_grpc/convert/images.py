"""The images of messages."""

from mlxgui.v1 import inference_pb2
from mlxgui_grpc.errors import InvalidImageError
from mlxgui_grpc.images.sources import Detail, ImageSource

_DETAILS: dict[int, Detail] = {
    inference_pb2.Image.DETAIL_UNSPECIFIED: "auto",
    inference_pb2.Image.DETAIL_AUTO: "auto",
    inference_pb2.Image.DETAIL_LOW: "low",
    inference_pb2.Image.DETAIL_HIGH: "high",
}


def image_source(image: inference_pb2.Image, field: str) -> ImageSource:
    """An image of a request; `field` is the path of its part, `messages[0].content[1]`, say.

    A detail that this version does not know is `auto`. Raises InvalidImageError for one without a source; what it is
    otherwise `images.check_sources` checks, with all others of the request.
    """
    source = image.WhichOneof("source")
    if source is None:
        raise InvalidImageError(f"{field}.image is empty: it must have data or a url", field=f"{field}.image")
    return ImageSource(
        field=f"{field}.image.{source}",
        data=image.data,
        url=image.url,
        detail=_DETAILS.get(image.detail, "auto"),
    )
