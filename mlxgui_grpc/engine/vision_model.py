"""A vision model as the decode batch wants it: called with tokens and caches, it gives logits. Runs on the MLX thread.

What a row needs beside its keys and values travels in its list of caches, never on the model, which all rows share.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal, cast

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from mlxgui_grpc.engine.vision_prompts import ImageItem, RowImages
from mlxgui_grpc.errors import GenerationFailedError, InvalidRequestError

FEATURE_CACHE_BYTES = 256 * 1024 * 1024

PositionKind = Literal["offset", "grid", "own"]
"""Where a token's position comes from: its place in the row (offset); that and what the pictures before it add (grid);
or the language model itself, which may keep state between its calls, and has mlx-vlm's caches (own)."""


class PositionDelta:
    """A layer of a row's caches: what to add to its next places to get their positions, row by row.

    Pictures have fewer positions than tokens, so it is 0 or negative.
    """

    def __init__(self, deltas: mx.array) -> None:
        self.deltas = deltas

    @classmethod
    def merge(cls, layers: "list[PositionDelta]") -> "PositionDelta":
        """A layer of all rows."""
        return cls(mx.concatenate([layer.deltas for layer in layers]))

    def extend(self, other: "PositionDelta") -> None:
        """Take in the rows of `other`."""
        self.deltas = mx.concatenate([self.deltas, other.deltas])

    def filter(self, keep: Any) -> None:
        """Keep these rows, in this order, each as often as it is named."""
        self.deltas = self.deltas[mx.array(keep)]

    def extract(self, index: int) -> "PositionDelta":
        """The layer of one row."""
        return PositionDelta(self.deltas[index : index + 1])

    def prepare(self, **padding: Any) -> None:
        """Padding moves no position."""

    def finalize(self) -> None:
        """Nor does its end."""

    @property
    def state(self) -> mx.array:
        """What is to be evaluated."""
        return self.deltas

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self.deltas.nbytes)


class OwnState:
    """A layer of a row's caches for language models that may keep positions on themselves: one row's, between its
    calls.

    It cannot be merged: such models are served one row at a time, each on its own caches.
    """

    NAMES = ("_rope_deltas", "_position_ids")

    def __init__(self) -> None:
        self._values: dict[str, Any] = dict.fromkeys(self.NAMES)

    def swap(self, language_model: Any) -> None:
        """Put the state on the model, and take what was there; done again after the call, it changes them back."""
        for name in self.NAMES:
            if hasattr(language_model, name):
                self._values[name], value = getattr(language_model, name), self._values[name]
                setattr(language_model, name, value)

    @property
    def state(self) -> list[mx.array]:
        """What is to be evaluated."""
        return [value for value in self._values.values() if isinstance(value, mx.array)]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(int(array.nbytes) for array in self.state)


@dataclass(frozen=True, slots=True)
class Features:
    """What the tower made of an item: a vector a token, and, for some, what is added behind the first layers."""

    embeddings: mx.array
    deeper: tuple[mx.array, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self.embeddings.nbytes) + sum(int(array.nbytes) for array in self.deeper)


class FeatureCache:
    """Features by content, those used last; bounded in bytes."""

    def __init__(self, limit_bytes: int = FEATURE_CACHE_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._features: OrderedDict[bytes, Features] = OrderedDict()
        self.held_bytes = 0
        self.hit_count = 0
        self.miss_count = 0

    def __contains__(self, key: bytes) -> bool:
        """Whether `find` would find it; not counted."""
        return key in self._features

    def find(self, key: bytes) -> Features | None:
        """The features of that content, if they are here."""
        found = self._features.get(key)
        if found is None:
            self.miss_count += 1
        else:
            self.hit_count += 1
            self._features.move_to_end(key)
        return found

    def add(self, key: bytes, features: Features) -> None:
        """Keep features, unless they are larger than the whole cache."""
        if features.nbytes > self._limit_bytes:
            return
        self._features[key] = features
        self.held_bytes += features.nbytes
        while self.held_bytes > self._limit_bytes:
            _, oldest = self._features.popitem(last=False)
            self.held_bytes -= oldest.nbytes


class VisionAdapter:
    """mlx-vlm's model behind the signature of mlx-lm's."""

    def __init__(self, model: Any, position_kind: PositionKind) -> None:
        self.model = model
        self.position_kind = position_kind
        self.language_model = model.language_model
        self.features = FeatureCache()

    def __call__(self, tokens: mx.array, cache: list[Any], **inputs: Any) -> mx.array:
        """Logits of every token."""
        if self.position_kind == "offset":
            return cast(mx.array, self.language_model(tokens, cache=cache, **inputs).logits)
        *layers, extra = cache
        if self.position_kind == "grid":
            if "position_ids" not in inputs:
                starts = mx.array(layers[0].offset).reshape(-1, 1) + extra.deltas[:, None]
                positions = starts + mx.arange(tokens.shape[1])[None]
                inputs["position_ids"] = mx.broadcast_to(positions, (3, *tokens.shape))
            return cast(mx.array, self.language_model(tokens, cache=layers, **inputs).logits)
        extra.swap(self.language_model)
        try:
            return cast(mx.array, self.language_model(tokens, cache=layers, **inputs).logits)
        finally:
            extra.swap(self.language_model)

    def make_cache(self, delta: int = 0) -> list[Any]:
        """The caches of one row."""
        layers: list[Any] = make_prompt_cache(self.language_model)
        if self.position_kind == "own":  # It may ask more of its caches than those of mlx-lm know.
            return [*layers, OwnState()]
        layers = [_of_mlx_lm(layer) for layer in layers]
        if self.position_kind == "grid":
            layers.append(PositionDelta(mx.array([delta])))
        return layers

    def with_images(self, images: RowImages) -> "PromptWithImages":
        """The model for the prefill of one row, once it has looked at these pictures."""
        return PromptWithImages(self, images)

    def features_of(self, item: ImageItem) -> Features:
        """What the tower makes of a picture or a tile."""
        found = self.features.find(item.key)
        if found is None:
            found = self._compute(item)
            mx.eval(found.embeddings, *found.deeper)
            self.features.add(item.key, found)
        return found

    def _compute(self, item: ImageItem) -> Features:
        arrays = {name: mx.array(value) for name, value in item.arrays.items()}
        pixels = arrays.pop("pixel_values")
        if self.position_kind == "grid":
            tower = self.model.vision_tower
            out = tower(pixels.astype(tower.patch_embed.proj.weight.dtype), arrays["image_grid_thw"])
            # Qwen3-VL's gives (features, those for the first layers), the others' the features.
            return Features(out[0], tuple(out[1])) if isinstance(out, tuple) else Features(out)
        config = self.model.config
        image = getattr(config, "image_token_index", None)
        ids = mx.full((1, item.token_count), image if image is not None else config.image_token_id)
        out = self.model.get_input_embeddings(ids, pixels, mask=mx.ones_like(ids), **arrays)
        return Features(out.inputs_embeds[0])


class PromptWithImages:
    """The model while it prefills one row whose prompt has pictures: it gives their features where their tokens are.

    Called, after `look` has seen all, with the row's tokens from the first on, in chunks; those behind the prompt are a
    reply's that is computed again.
    """

    def __init__(self, adapter: VisionAdapter, images: RowImages) -> None:
        self._adapter = adapter
        self._images = images
        self._prompt_length = len(images.prompt)
        self._features: list[Features] = []
        self._inputs: dict[str, Any] | None = None
        """Of the whole prompt; None before all pictures are seen."""
        self._delta = 0
        if images.positions is not None:
            self._delta = int(images.positions[0, -1]) + 1 - self._prompt_length
        self._done = 0

    def look(self) -> int:
        """Look at one more picture whose features are not known, or at all where they cannot be told apart.

        Returns how many tokens were computed, 0 when nothing is left. Raises GenerationFailedError when the model
        cannot take these pictures.
        """
        if self._inputs is not None:
            return 0
        items, features, computed_count = self._images.items, self._features, 0
        try:
            if not items:
                self._inputs = _whole(self._adapter, self._images)
                return self._prompt_length
            while len(features) < len(items) and not computed_count:
                item = items[len(features)]
                if item.key not in self._adapter.features:
                    computed_count = item.token_count
                features.append(self._adapter.features_of(item))
            if len(features) == len(items):
                self._inputs = self._embedded(features)
                self._features = []
            return computed_count
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise GenerationFailedError(
                f"the model cannot read these images: {type(error).__name__}: {error}"
            ) from error

    def _embedded(self, features: list[Features]) -> dict[str, Any]:
        images, length = self._images, self._prompt_length
        prompt = mx.array([images.prompt])
        embeddings = self._adapter.model.get_input_embeddings(prompt, None).inputs_embeds
        at = mx.array(images.at)
        values = mx.concatenate([each.embeddings for each in features]).astype(embeddings.dtype)
        embeddings[0, at] = values
        inputs: dict[str, Any] = {"inputs_embeds": embeddings}
        if images.positions is not None:
            inputs["position_ids"] = mx.array(images.positions)[:, None]
        if deeper := [each.deeper for each in features if each.deeper]:
            inputs["visual_pos_masks"] = mx.array(np.isin(np.arange(length), images.at))[None]
            inputs["deepstack_visual_embeds"] = [
                mx.concatenate(list(layer)) for layer in zip(*deeper, strict=True)
            ]
        mx.eval(embeddings)
        return inputs

    def make_cache(self) -> list[Any]:
        """The caches of the row."""
        return self._adapter.make_cache(self._delta)

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """Logits of a chunk."""
        start, self._done = self._done, self._done + tokens.shape[1]
        cut = self._prompt_length - start
        if cut <= 0:
            return self._adapter(tokens, cache)
        out = self._adapter(
            tokens[:, :cut], cache, **self._slice(start, min(self._done, self._prompt_length))
        )
        if tokens.shape[1] > cut:
            out = mx.concatenate([out, self._adapter(tokens[:, cut:], cache)], axis=1)
        return out

    def _slice(self, start: int, stop: int) -> dict[str, Any]:
        """The inputs of the tokens from `start` to `stop`."""
        part: dict[str, Any] = {}
        assert self._inputs is not None, "it looks before it is called"
        for name, value in self._inputs.items():
            if name == "position_ids":
                part[name] = value[..., start:stop]
            elif name == "rope_deltas":
                part[name] = value
            elif name != "deepstack_visual_embeds":
                part[name] = value[:, start:stop]
        if (deeper := self._inputs.get("deepstack_visual_embeds")) is not None:
            mask = self._inputs["visual_pos_masks"]
            first, last = int(mask[:, :start].sum().item()), int(mask[:, :stop].sum().item())
            part["deepstack_visual_embeds"] = [layer[first:last] for layer in deeper]
        return part


_CARRIED = frozenset(
    {
        "inputs_embeds",
        "position_ids",
        "rope_deltas",
        "per_layer_inputs",
        "visual_pos_masks",
        "deepstack_visual_embeds",
    }
)
_IGNORED = frozenset({"attention_mask_4d", "attention_mask"})
"""Of ones only: a row is prefilled alone."""


def _whole(adapter: VisionAdapter, images: RowImages) -> dict[str, Any]:
    """The inputs of a prompt on an architecture whose pictures cannot be told apart: mlx-vlm embeds it as a whole."""
    arrays = {name: mx.array(value) for name, value in images.arrays.items()}
    ids = mx.array([images.prompt])
    pixels = arrays.pop("pixel_values", None)
    found = adapter.model.get_input_embeddings(ids, pixels, mask=mx.ones_like(ids), **arrays)
    inputs = {name: value for name, value in found.to_dict().items() if value is not None}
    if unknown := sorted(inputs.keys() - _CARRIED - _IGNORED):
        raise InvalidRequestError(
            f"this architecture's images need {', '.join(unknown)}, which this version does not serve; send text only",
            field="messages",
        )
    inputs = {name: value for name, value in inputs.items() if name in _CARRIED}
    mx.eval(inputs)
    return inputs


def _of_mlx_lm(layer: Any) -> Any:
    """mlx-vlm has cache classes of its own, equal to mlx-lm's in name; only those of mlx-lm can be batched here."""
    if type(layer).__name__ == "KVCache":
        return KVCache()
    if type(layer).__name__ == "RotatingKVCache":
        return RotatingKVCache(max_size=layer.max_size, keep=layer.keep)
    return layer
