"""How many bytes of pictures wait for a model, and that they are not more than a machine can hold."""

import contextlib
from collections import Counter
from collections.abc import Iterator

from mlxgui_grpc.errors import QueueFullError

MAX_WAITING_BYTES = 512 * 1024 * 1024
"""Of one model's: eight requests of the largest, or hundreds of usual ones."""


class WaitingImages:
    """Decoded pictures, here or in the frames of a worker, until that has made its own arrays of them."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._bytes: Counter[str] = Counter()

    def refuse_crowd(self, model: str, newcomer_bytes: int = 0) -> None:
        """Raise QueueFullError when those of a model would be too many bytes, or are as many as may be."""
        if self._bytes[model] + max(1, newcomer_bytes) > self._limit_bytes:
            raise QueueFullError(
                f"the images of requests that wait for model '{model}' take {self._limit_bytes >> 20} MiB, as many as "
                "may; try again in a moment",
                retry_after_seconds=1.0,
                model=model,
            )

    @contextlib.contextmanager
    def held(self, model: str, byte_count: int) -> Iterator[None]:
        """Count so many bytes while the block runs; raises QueueFullError when they are too many."""
        self.refuse_crowd(model, byte_count)
        self._bytes[model] += byte_count
        try:
            yield
        finally:
            self._bytes[model] -= byte_count
            if not self._bytes[model]:
                del self._bytes[model]
