"""Loads vision models through mlx-vlm. Runs on the MLX thread."""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_vlm import utils as mlx_vlm

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.architectures import unknown_cache
from mlxgui_grpc.engine.backends.text import (
    TextModel,
    Tokens,
    generation_config,
    sampling_defaults,
    tokens_of,
)
from mlxgui_grpc.engine.batch import kv_cost
from mlxgui_grpc.engine.vision_model import FeatureCache, PositionDelta, PositionKind, VisionAdapter
from mlxgui_grpc.engine.vision_prompts import ImageTokens, VisionPrompts, flat_images, normal_render
from mlxgui_grpc.errors import ModelUnsafeError

# On a data type that MLX does not know, this one rewrites the header of the user's own file for a moment.
mlx_vlm._load_safetensors = cast(Any, mx.load)


_LOOK_SIDE = 64


@dataclass(frozen=True, slots=True)
class _Family:
    """How an architecture is driven that tests/engine/test_vision.py has shown to be right, alone and in a batch."""

    position_kind: PositionKind = "offset"


_FAMILIES = {
    "qwen2_vl": _Family("grid"),
    "qwen2_5_vl": _Family("grid"),
    "qwen3_vl": _Family("grid"),
    "idefics3": _Family(),
    "smolvlm": _Family(),
    "llava": _Family(),
    "gemma3": _Family(),
}
"""Their pictures are embedded one by one, so that their features can be cached."""

_NOTES = {
    "gemma3n": (
        "prompts with images may be read wrongly: mlx-vlm 0.7.10 leaves out the scale of the embeddings there that it "
        "applies to text alone.",
    ),
}
"""What else a user should know of an architecture."""


def load_vision_model(view: Path) -> TextModel:
    """Load weights, tokenizer and processor from a view that `checkpoint.py` has checked, and evaluate them."""
    config = _checked_config(view)
    model = mlx_vlm.load_model(view, trust_remote_code=False)
    mx.eval(model.state)
    arrays: list[mx.array] = [array for _, array in cast(Any, tree_flatten(model.parameters()))]
    architecture = str(config["model_type"])
    family = _FAMILIES.get(architecture)
    adapter = VisionAdapter(model, family.position_kind if family else "own")
    tokens, prompts = _load_prompts(view, config, model.config)
    if family is not None:
        _look_once(adapter, prompts)
    cache = adapter.make_cache()
    width: int = adapter(mx.array([[0]]), cache).shape[-1]  # lazy: nothing is computed
    kinds = {type(layer) for layer in adapter.make_cache()} - {KVCache, RotatingKVCache, PositionDelta}
    batchable = family is not None and not kinds
    return TextModel(
        model=adapter,
        tokens=replace(tokens, vocabulary_size=width),
        defaults=sampling_defaults(generation_config(view)),
        weight_bytes=sum(array.nbytes for array in arrays),
        batchable=batchable,
        kv_cost=kv_cost(adapter),
        vision=prompts,
        notes=(*(() if batchable else (_serial_note(architecture, kinds),)), *_NOTES.get(architecture, ())),
    )


def _look_once(adapter: VisionAdapter, prompts: VisionPrompts) -> None:
    """Read a small picture: a tower or processor that cannot is known now, and no request pays for the first."""
    grey = frames.Image(_LOOK_SIDE, _LOOK_SIDE, bytes([100]) * (3 * _LOOK_SIDE**2))
    _, images = prompts.tokenize(f"a{prompts.placeholder}a", [grey])
    adapter.with_images(images).look()
    adapter.features = FeatureCache()


def load_vision_tokens(view: Path) -> tuple[Tokens, VisionPrompts]:
    """Load tokenizer and processor alone."""
    config = _checked_config(view)
    module, _ = mlx_vlm.get_model_and_args(config)  # Importing it makes its processor known.
    whole = {"text_config": {}, "vision_config": {}, **config}
    return _load_prompts(view, config, module.ModelConfig.from_dict(whole))


def _load_prompts(view: Path, config: dict[str, Any], model_config: Any) -> tuple[Tokens, VisionPrompts]:
    processor = mlx_vlm.load_processor(view, add_detokenizer=False, trust_remote_code=False)
    image_processor = mlx_vlm.load_image_processor(view, trust_remote_code=False)
    if image_processor is not None:
        processor.image_processor = image_processor
    tokens = tokens_of(view, config)
    if tokens.render is None and (template := getattr(processor, "chat_template", None)):
        tokens.tokenizer.chat_template = template
        tokens = replace(tokens, render=partial(tokens.tokenizer.apply_chat_template, tokenize=False))
    more_ends = getattr(processor, "additional_eos_token_ids", ())
    tokens = replace(tokens, end_tokens=tokens.end_tokens | frozenset(more_ends))
    has_items = config["model_type"] in _FAMILIES
    prompts = VisionPrompts(processor, _image_tokens(model_config, processor), has_items=has_items)
    if tokens.render is not None:
        prompts.read_template(tokens.render)
        tokens = replace(tokens, render=normal_render(flat_images(tokens.render, prompts.placeholder)))
    return tokens, prompts


def _image_tokens(config: Any, processor: Any) -> ImageTokens | None:
    image = getattr(config, "image_token_index", None)
    image = getattr(config, "image_token_id", None) if image is None else image
    if image is None:
        return None
    video = getattr(config, "video_token_id", None)
    merge_size = getattr(processor.image_processor, "merge_size", 0)
    return ImageTokens(int(image), frozenset() if video is None else frozenset({int(video)}), int(merge_size))


def _checked_config(view: Path) -> dict[str, Any]:
    """config.json; raises ModelUnsafeError where mlx-vlm would read files from outside of the view."""
    config: dict[str, Any] = json.loads((view / "config.json").read_text())
    if config.get("model_file") is not None:
        raise ModelUnsafeError("config.json names a Python file to run (model_file)")
    index = view / "model.safetensors.index.json"
    shards = json.loads(index.read_text()).get("weight_map", {}).values() if index.exists() else ()
    storage = (config.get("text_config") or {}).get("ple_storage") or {}
    for name in {*shards, storage.get("manifest") or ""}:
        if Path(name).name != name:
            raise ModelUnsafeError(f"the checkpoint names a file outside of its folder: {name}")
    return config


def _serial_note(architecture: str, kinds: set[type]) -> str:
    if architecture in _FAMILIES:
        return unknown_cache({kind.__name__ for kind in kinds})
    why = f"batching is not proven equal to serial decoding on mlx-vlm's architecture '{architecture}'"
    return f"Requests to this model run one at a time: {why}."
