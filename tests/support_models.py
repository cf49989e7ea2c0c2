"""Builds tiny models with random weights from mlx-lm's own classes, on the demo model's tokenizer."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

import mlxgui_grpc

DEMO = Path(mlxgui_grpc.__file__).parent / "demo"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
END_TOKEN = 2


def build_tiny(
    folder: Path, family: str = "llama", *, context_length: int = 2048, layers: int = 1, seed: int = 1
) -> Path:
    """Write a checkpoint of family `llama` or `qwen3`, some 100,000 weights, that never ends by itself."""
    folder.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (DEMO / name).exists():
            shutil.copyfile(DEMO / name, folder / name)
    config: dict[str, Any] = {
        "model_type": family,
        "architectures": ["LlamaForCausalLM" if family == "llama" else "Qwen3ForCausalLM"],
        "vocab_size": 1024,
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": context_length,
        "tie_word_embeddings": False,
        "eos_token_id": END_TOKEN,
    }
    (folder / "config.json").write_text(json.dumps(config))
    module = importlib.import_module(f"mlx_lm.models.{family}")
    model = module.Model(module.ModelArgs.from_dict(config))
    mx.random.seed(seed)
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    weights = {
        name: mx.ones(value.shape)
        if value.ndim == 1
        else mx.random.normal(value.shape) * value.shape[-1] ** -0.5
        for name, value in sorted(parameters.items())
    }
    # The end token's logit is 0 always, which is never the largest of 1,024.
    keep = mx.array([0.0 if token == END_TOKEN else 1.0 for token in range(config["vocab_size"])])
    weights["lm_head.weight"] = weights["lm_head.weight"] * keep[:, None]
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder
