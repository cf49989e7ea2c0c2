"""Caches for Gemma 2 in a batch: its attention keeps the heads of a group on an axis of their own, which mlx-lm's masks
for rows of different lengths lack."""

from typing import Any, Self, cast

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache


class GroupedCache(KVCache):
    """Keys and values of one row."""

    @classmethod
    def of(cls, cache: KVCache) -> Self:
        """The same keys and values, which become this one's."""
        own = cls.__new__(cls)
        vars(own).update(vars(cache))
        return own

    @classmethod
    def merge(cls, caches: list[Any]) -> "GroupedBatchCache":
        """The cache of all rows."""
        return GroupedBatchCache.merge(caches)


class GroupedBatchCache(BatchKVCache):
    """Keys and values of the rows of a batch."""

    @classmethod
    def merge(cls, caches: list[Any]) -> Self:
        """The cache of all rows."""
        merged = cls([0] * len(caches))
        vars(merged).update(vars(BatchKVCache.merge(caches)))
        return merged

    def extract(self, index: int) -> GroupedCache:
        """The cache of one row."""
        return GroupedCache.of(cast(Any, super()).extract(index))

    def make_mask(self, *arguments: Any, **options: Any) -> mx.array:
        """Rows x KV heads x heads of a group x tokens x tokens kept."""
        return cast(mx.array, super().make_mask(*arguments, **options))[:, :, None]
