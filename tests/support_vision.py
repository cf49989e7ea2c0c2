"""Builds tiny vision models with random weights from mlx-vlm's own classes, on the demo model's tokenizer."""

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxgui_grpc.engine import frames
from tests.support_models import DEMO, END_TOKEN

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "llava", "gemma3")
CONTEXT_LENGTH = 2048

_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_IDEFICS_TOKENS = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)
_TOKENS = {
    "qwen2_vl": _QWEN_TOKENS,
    "qwen2_5_vl": _QWEN_TOKENS,
    "qwen3_vl": _QWEN_TOKENS,
    "idefics3": _IDEFICS_TOKENS,
    "smolvlm": _IDEFICS_TOKENS,
    "llava": ("<image>",),
    "gemma3": ("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
}
_PLACEHOLDERS = {"gemma3": "<start_of_image>"}
_SIDE = 56
"""Pixels of the pictures that the fixed-size towers see."""


def picture(seed: int, width: int = 64, height: int = 48) -> frames.Image:
    """Noise, another one for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return frames.Image(width, height, pixels.tobytes())


def build_tiny_vision(folder: Path, family: str, *, seed: int = 1) -> Path:
    """Write a checkpoint of one of `FAMILIES`, some 200,000 weights, that never ends by itself."""
    folder.mkdir(parents=True)
    ids = _write_tokenizer(folder, family)
    config, files = (_qwen if family.startswith("qwen") else _other)(family, ids)
    config |= {"eos_token_id": END_TOKEN}
    for name, content in {**files, "config.json": config}.items():
        (folder / name).write_text(json.dumps(content))
    model = _model(family, config)
    mx.random.seed(seed)
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    weights = {
        name: mx.ones(value.shape) * (1 if "weight" in name else 0)
        if value.ndim == 1
        else mx.random.normal(value.shape) * (value.size / value.shape[0]) ** -0.5
        for name, value in sorted(parameters.items())
    }
    # No token that ends the text or stands for a picture is ever the likeliest.
    keep = mx.array([0.0 if token == END_TOKEN or token >= 1024 else 1.0 for token in range(len(ids) + 1024)])
    weights["language_model.lm_head.weight"] = weights["language_model.lm_head.weight"] * keep[:, None]
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def _model(family: str, config: dict[str, Any]) -> Any:
    """As mlx-vlm's `load_model` makes it."""
    from mlx_vlm import utils

    module: Any = importlib.import_module(f"mlx_vlm.models.{family}")
    whole = {"text_config": {}, "vision_config": {}, **json.loads(json.dumps(config))}
    model_config = module.ModelConfig.from_dict(whole)
    update: Any = utils.update_module_configs
    return module.Model(update(model_config, module, whole, ["text", "vision"]))


def _write_tokenizer(folder: Path, family: str) -> dict[str, int]:
    """The demo's tokenizer and the tokens for pictures; their ids."""
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    ids = {token: 1024 + at for at, token in enumerate(_TOKENS[family])}
    for token, number in ids.items():
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": number, "content": token})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((DEMO / "tokenizer_config.json").read_text())
    if family == "gemma3":
        names = ("boi_token", "eoi_token", "image_token")
        settings["extra_special_tokens"] = dict(zip(names, _TOKENS[family], strict=True))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    place = _PLACEHOLDERS.get(family, _TOKENS[family][0])
    if family.startswith("qwen"):
        place = "<|vision_start|><|image_pad|><|vision_end|>"
    (folder / "chat_template.jinja").write_text(_template(place))
    return ids


def _template(placeholder: str) -> str:
    return (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
        "{%- if m.content is string %}{{- m.content }}{%- else %}{%- for c in m.content or [] %}"
        "{%- if c.type == 'image' %}{{- '" + placeholder + "' }}"
        "{%- elif c.type == 'text' %}{{- c.text }}{%- endif %}{%- endfor %}{%- endif %}"
        "{{- '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )


def _text(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": 1024 + len(ids),
        "max_position_embeddings": CONTEXT_LENGTH,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }


_NORMALIZED = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_normalize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
}


def _qwen(family: str, ids: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    patch = 16 if family == "qwen3_vl" else 14
    settings: dict[str, dict[str, Any]] = {
        "qwen2_vl": {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        "qwen2_5_vl": {"window_size": 56, "fullatt_block_indexes": [1]},
        "qwen3_vl": {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
    }
    vision = settings[family]
    if family != "qwen2_vl":
        vision |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
    vision |= {"model_type": family, "depth": 2, "num_heads": 2, "in_channels": 3, "patch_size": patch}
    vision |= {"spatial_patch_size": patch, "spatial_merge_size": 2, "temporal_patch_size": 2}
    image, video = ids["<|image_pad|>"], ids["<|video_pad|>"]
    config: dict[str, Any] = {
        "model_type": family,
        "vision_config": vision,
        "image_token_id": image,
        "image_token_index": image,
        "video_token_id": video,
        "video_token_index": video,
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    text: dict[str, Any] = {**_text(ids), "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    if family == "qwen3_vl":
        config["text_config"] = {**text, "model_type": "qwen3_vl_text", "head_dim": 16}
    else:
        config |= text
    smallest, largest = (2 * patch) ** 2, (8 * patch) ** 2
    names = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
    preprocessor: dict[str, Any] = {
        **_NORMALIZED,
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": smallest,
        "max_pixels": largest,
        "size": {"shortest_edge": smallest, "longest_edge": largest},
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": f"{names[family]}Processor",
    }
    return config, {"preprocessor_config.json": preprocessor}


def _other(family: str, ids: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    vision: dict[str, Any] = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_size": 64,
        "image_size": _SIDE,
        "patch_size": 14,
        "num_channels": 3,
        "model_type": {"idefics3": "idefics3", "llava": "clip_vision_model"}.get(
            family, "siglip_vision_model"
        ),
    }
    text: dict[str, Any] = {**_text(ids), "model_type": "llama"}
    config: dict[str, Any] = {"model_type": family, "vocab_size": 1024 + len(ids)}
    names = {"idefics3": "Idefics3", "smolvlm": "SmolVLM", "llava": "Llava", "gemma3": "Gemma3"}
    processor: dict[str, Any] = {"processor_class": f"{names[family]}Processor"}
    preprocessor: dict[str, Any] = {**_NORMALIZED, **processor, "do_resize": True}
    preprocessor["image_processor_type"] = f"{names[family]}ImageProcessor"
    if family in ("idefics3", "smolvlm"):
        config |= {"scale_factor": 2, "image_token_id": ids["<image>"], "image_token_index": ids["<image>"]}
        edge = {"longest_edge": _SIDE}
        preprocessor |= {"size": {"longest_edge": 2 * _SIDE}, "max_image_size": edge}
        preprocessor |= {"do_image_splitting": True, "do_pad": True, "do_convert_rgb": True}
        processor["image_seq_len"] = 4
    elif family == "llava":
        vision |= {"projection_dim": 32, "vocab_size": 100}
        config |= {"image_token_index": ids["<image>"], "vision_feature_layer": -2}
        config["vision_feature_select_strategy"] = "default"
        preprocessor |= {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True}
        preprocessor |= {"size": {"shortest_edge": _SIDE}, "crop_size": {"height": _SIDE, "width": _SIDE}}
        processor |= {"patch_size": 14, "vision_feature_select_strategy": "default", "image_token": "<image>"}
        processor["num_additional_image_tokens"] = 1
    else:
        text |= {"model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16}
        text |= {"sliding_window": 64, "sliding_window_pattern": 2, "mm_tokens_per_image": 4}
        config |= {"image_token_index": ids["<image_soft_token>"], "hidden_size": 64, "pad_token_id": 0}
        config["mm_tokens_per_image"] = 4
        preprocessor |= {"size": {"height": _SIDE, "width": _SIDE}, "image_seq_length": 4}
        processor["image_seq_length"] = 4
    config |= {"text_config": text, "vision_config": vision}
    return config, {"preprocessor_config.json": preprocessor, "processor_config.json": processor}
