"""Turns a chat with pictures into token ids and the arrays that a vision tower reads. Runs on the helper thread."""

import hashlib
import json
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlxgui_grpc.engine import frames
from mlxgui_grpc.errors import InvalidRequestError, QueueFullError

HELD_BYTES = 1024 * 1024 * 1024
"""Arrays of pictures of all rows of a worker, waiting ones included; beyond it no more rows with pictures come."""

_TEXT_ARRAYS = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})
_PROBE = "qxprobe"
_PROBE_IMAGE = [{"type": "image"}, {"type": "text", "text": _PROBE}]


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """How an architecture writes pictures into its prompts."""

    image: int
    """The id of the token that stands for each feature of a picture."""
    forbidden: frozenset[int] = frozenset()
    """Ids that no prompt with pictures may have: they stand for what it does not come with."""
    merge_size: int = 0
    """Patches per side that become one feature, where the processor says each picture's grid of patches; else 0."""


@dataclass(frozen=True, slots=True)
class ImageItem:
    """What the vision tower sees at once: a picture, or a tile of one."""

    key: bytes
    """Of the content: SHA-256 of the arrays."""
    token_count: int
    arrays: dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class RowImages:
    """The pictures of one prompt, in the order of their tokens."""

    items: tuple[ImageItem, ...]
    """Empty where the architecture's pictures cannot be told apart: then `arrays` has them all."""
    arrays: dict[str, NDArray[Any]]
    prompt: tuple[int, ...]
    at: NDArray[np.int64]
    """Places of the image tokens in the prompt."""
    positions: NDArray[np.int32] | None = None
    """Time, row and column of each token (3 x tokens), for rotary embeddings of three axes."""

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        parts = [self.arrays, *(item.arrays for item in self.items)]
        return sum(array.nbytes for arrays in parts for array in arrays.values())


class VisionPrompts:
    """The processor of one model. Not thread-safe: the helper thread uses it."""

    def __init__(
        self, processor: Any, tokens: ImageTokens | None, *, has_items: bool, limit_bytes: int = HELD_BYTES
    ) -> None:
        """`processor` is what mlx-vlm or transformers loaded; without `tokens` the architecture is not known here."""
        self._limit_bytes = limit_bytes
        self._held: weakref.WeakSet[RowImages] = weakref.WeakSet()
        processor.tokenizer = _PlainTokenizer(processor.tokenizer)
        self._image_token = str(getattr(processor, "image_token", "<image>"))
        self.placeholder = str(getattr(processor, "boi_token", None) or self._image_token)
        """What the processor replaces by a picture's tokens."""
        self._processor = processor
        self._tokens = tokens
        self._has_items = has_items

    def read_template(self, render: Callable[..., str]) -> None:
        """Take the token that the chat template writes for a picture: the processor of Gemma 3 replaces the one before
        a picture, that of Gemma 3n the one that stands for its features."""
        if not _shows(render, _PROBE_IMAGE, self.placeholder) and _shows(
            render, _PROBE_IMAGE, self._image_token
        ):
            self.placeholder = self._image_token

    def tokenize(self, text: str, images: Sequence[frames.Image]) -> tuple[list[int], RowImages]:
        """The token ids of a rendered chat, its placeholders filled, and its pictures; raises InvalidRequestError, or
        QueueFullError while other requests hold too many pictures."""
        if sum(held.nbytes for held in list(self._held)) >= self._limit_bytes:
            raise QueueFullError(
                f"the images of other requests to this model take {self._limit_bytes >> 20} MiB already; try again "
                "when some are answered"
            )
        others = 0 if self.placeholder == self._image_token else text.count(self._image_token)
        if self._has_items and text.count(self.placeholder) + others != len(images):
            raise InvalidRequestError(
                f"the messages have {len(images)} images, and as text the model's own tokens for images: leave those "
                "out",
                field="messages",
            )
        pictures = [Image.frombytes("RGB", (each.width, each.height), each.pixels) for each in images]
        try:
            with mx.stream(mx.cpu):  # Processors make MLX arrays of NumPy's.
                out = self._processor(text=[text], images=pictures)
                arrays = {name: _array(value) for name, value in out.items() if value is not None}
        except (ValueError, IndexError, StopIteration) as error:
            raise InvalidRequestError(
                f"the model's processor refuses these {len(images)} images: {error}", field="messages"
            ) from error
        prompt = [int(token) for token in arrays["input_ids"].reshape(-1)]
        arrays = {name: value for name, value in arrays.items() if name not in _TEXT_ARRAYS}
        found = self._split(prompt, arrays)
        self._held.add(found)
        return prompt, found

    def _split(self, prompt: list[int], arrays: dict[str, NDArray[Any]]) -> RowImages:
        tokens = self._tokens
        ids = np.array(prompt)
        if tokens is None:
            return RowImages((), arrays, tuple(prompt), np.zeros(0, dtype=np.int64))
        at = np.flatnonzero(ids == tokens.image)
        if tokens.forbidden.intersection(prompt):
            raise InvalidRequestError(
                "the messages hold a token that stands for a video, and there is none", field="messages"
            )
        if not self._has_items:
            return RowImages((), arrays, tuple(prompt), at)
        grids = arrays.get("image_grid_thw") if tokens.merge_size else None
        items = _grid_items(arrays, tokens.merge_size) if grids is not None else _tile_items(arrays, len(at))
        if sum(item.token_count for item in items) != len(at) or not len(at) or at[-1] == len(prompt) - 1:
            raise InvalidRequestError(
                "the prompt ends with an image: the model's chat template needs something behind it",
                field="messages",
            )
        positions = None if grids is None else grid_positions(ids == tokens.image, grids, tokens.merge_size)
        return RowImages(tuple(items), {}, tuple(prompt), at, positions)


def grid_positions(is_image: NDArray[np.bool_], grids: NDArray[Any], merge_size: int) -> NDArray[np.int32]:
    """Positions of Qwen's multimodal rotary embedding: text counts on in all three axes; a picture keeps one time and
    counts rows and columns; what follows begins after the largest of them (Qwen2-VL, arXiv 2409.12191, section 2.1)."""
    parts: list[NDArray[np.int32]] = []
    at, start = 0, 0
    for times, rows, columns in grids:
        first = at + int(np.argmax(is_image[at:]))
        text = np.arange(first - at, dtype=np.int32)
        parts.append(np.broadcast_to(text + start, (3, len(text))))
        start += len(text)
        sizes = (int(times), int(rows) // merge_size, int(columns) // merge_size)
        parts.append(np.indices(sizes, dtype=np.int32).reshape(3, -1) + start)
        start += max(sizes)
        at = first + sizes[0] * sizes[1] * sizes[2]
    rest = np.arange(len(is_image) - at, dtype=np.int32)
    parts.append(np.broadcast_to(rest + start, (3, len(rest))))
    return np.concatenate(parts, axis=1)


def normal_render(render: Callable[..., str]) -> Callable[..., str]:
    """`render` for messages whose content is text or parts, whichever of the two the template was written for."""
    takes_text = _shows(render, _PROBE)
    takes_parts = _shows(render, [{"type": "text", "text": _PROBE}])
    if takes_text or not takes_parts:
        return render

    def with_parts(messages: list[dict[str, Any]], **arguments: Any) -> str:
        in_parts = [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message.get("content"), str)
            else message
            for message in messages
        ]
        return render(in_parts, **arguments)

    return with_parts


def flat_images(render: Callable[..., str], placeholder: str) -> Callable[..., str]:
    """`render` for templates that know text only: an image part becomes the placeholder that the processor fills."""
    if _shows(render, _PROBE_IMAGE) and _shows(render, _PROBE_IMAGE, placeholder):
        return render

    def flattened(messages: list[dict[str, Any]], **arguments: Any) -> str:
        return render(
            [{**message, "content": _flat(message.get("content"), placeholder)} for message in messages],
            **arguments,
        )

    return flattened


def _flat(content: Any, placeholder: str) -> Any:
    if not isinstance(content, list):
        return content
    texts = [placeholder if part.get("type") == "image" else str(part.get("text") or "") for part in content]
    return "\n".join(text for text in texts if text)


def _shows(render: Callable[..., str], content: Any, wanted: str = _PROBE) -> bool:
    """Whether a template writes what a message of the user holds."""
    try:
        text = render([{"role": "user", "content": content}], add_generation_prompt=True)
    except Exception:  # Templates raise what they like.
        return False
    # A template for text writes a list of parts as Python does.
    return wanted in text and "'type':" not in text and '"type":' not in text


def _grid_items(arrays: dict[str, NDArray[Any]], merge_size: int) -> list[ImageItem]:
    """One item a picture: its rows of patches, cut by the grids."""
    items: list[ImageItem] = []
    start = 0
    for grid in arrays["image_grid_thw"]:
        patch_count = int(np.prod(grid))
        part = {
            "pixel_values": arrays["pixel_values"][start : start + patch_count],
            "image_grid_thw": grid[None],
        }
        items.append(ImageItem(_key(part), patch_count // merge_size**2, part))
        start += patch_count
    return items


def _tile_items(arrays: dict[str, NDArray[Any]], token_count: int) -> list[ImageItem]:
    """One item a tile, all of them equally large: `pixel_values` is tiles x channels x height x width, with or
    without a leading 1."""
    pixels = arrays["pixel_values"]
    has_batch = pixels.ndim == 5
    count = pixels.shape[1] if has_batch else pixels.shape[0]
    items: list[ImageItem] = []
    for at in range(count):
        cut = (slice(None), slice(at, at + 1)) if has_batch else (slice(at, at + 1),)
        part = {name: value[cut] for name, value in arrays.items()}
        items.append(ImageItem(_key(part), token_count // count, part))
    return items


def _key(arrays: dict[str, NDArray[Any]]) -> bytes:
    digest = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        digest.update(json.dumps([name, value.shape, str(value.dtype)]).encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.digest()


def _array(value: Any) -> NDArray[Any]:
    if isinstance(value, mx.array) and value.dtype == mx.bfloat16:
        value = value.astype(mx.float32)
    return np.array(value)


class _PlainTokenizer:
    """A tokenizer that adds nothing: the chat template has written every special token already.

    Processors pass their own arguments on to the tokenizer and the image processor alike, and LLaVA's stumbles over
    those that only one of them knows; so they are given none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: list[str], **arguments: Any) -> Any:
        return self._tokenizer(text, add_special_tokens=False, return_tensors=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
