"""Builds the benchmark's random-weight models from a seed: no download, no real weights.

``python -m bench.make_models FOLDER [--seed 7] [--only micro,small-fp32]``

Rows of ``lm_head`` are zero for special tokens and for every token that is not plain printable ASCII. Under
greedy decoding such a token is never the argmax, so every reply has exactly ``max_tokens`` tokens (no end of
sequence) and every token has visible text (so that gaps can be measured from the streamed content).
"""

import argparse
import importlib
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SEED = 7
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
COMMON: Mapping[str, Any] = {
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "torch_dtype": "float32",
    "use_cache": True,
    "initializer_range": 0.02,
}
MODELS: Mapping[str, Mapping[str, Any]] = {
    # 2.2M parameters: the server's own work dominates.
    "micro": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 2048,
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    # 100M parameters: compute and memory bandwidth dominate.
    "small-fp32": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 16384,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "intermediate_size": 2048,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
}
# Written last: a folder without it is unfinished and built again.
COMPLETE = "complete.json"


def is_built(folder: Path, seed: int) -> bool:
    """True when the folder holds a finished model of this seed and of today's shapes."""
    stamp = folder / COMPLETE
    return stamp.is_file() and stamp.read_text() == _stamp(folder.name, seed)


def build(name: str, folder: Path, seed: int) -> None:
    """Write model `name` into `folder`, tokenizer included."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / COMPLETE).unlink(missing_ok=True)
    spec = {**COMMON, **MODELS[name]}
    (folder / "config.json").write_text(json.dumps(spec, indent=1))
    visible = _write_tokenizer(folder, spec["vocab_size"], seed)
    _write_weights(folder, spec, visible, seed)
    (folder / COMPLETE).write_text(_stamp(name, seed))


def _stamp(name: str, seed: int) -> str:
    return (
        json.dumps({"seed": seed, "spec": {**COMMON, **MODELS[name]}, "chat_template": CHAT_TEMPLATE}) + "\n"
    )


def _corpus(seed: int, word_count: int) -> Iterator[str]:
    rng = random.Random(seed)
    syllables = [c + v + e for c in "bcdfghjklmnprstvwz" for v in "aeiou" for e in ("", "n", "r", "s", "l")]
    words = ["".join(rng.choice(syllables) for _ in range(rng.randint(1, 4))) for _ in range(word_count)]
    for _ in range(word_count // 2):
        yield " ".join(rng.choice(words) for _ in range(16)) + ".\n"


def _write_tokenizer(folder: Path, vocab_size: int, seed: int) -> list[bool]:
    """Train and write a byte-level BPE tokenizer; returns, per token id, whether a reply may contain it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_corpus(seed, max(4000, vocab_size)), trainer)
    missing = vocab_size - tokenizer.get_vocab_size()
    if missing > 0:
        tokenizer.add_tokens([f" pad{i}x" for i in range(missing)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[3],
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 3}))
    return [
        token_id >= len(SPECIAL_TOKENS)
        and _is_visible(tokenizer.decode([token_id], skip_special_tokens=False))
        for token_id in range(vocab_size)
    ]


def _is_visible(text: str) -> bool:
    return text.isascii() and text.isprintable() and text.strip() != ""


def _write_weights(folder: Path, spec: Mapping[str, Any], visible: list[bool], seed: int) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    family = importlib.import_module(f"mlx_lm.models.{spec['model_type']}")
    model = family.Model(family.ModelArgs.from_dict(dict(spec)))
    mx.random.seed(seed)
    weights: dict[str, mx.array] = {}
    # Sorted, so that the same seed gives the same weights whatever order the module tree has.
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name, value in sorted(parameters.items()):
        if value.ndim == 1:
            weights[name] = mx.ones(value.shape)
        else:
            weights[name] = mx.random.normal(value.shape) * (value.shape[-1] ** -0.5)
    keep = mx.array([1.0 if is_kept else 0.0 for is_kept in visible])
    weights["lm_head.weight"] = weights["lm_head.weight"] * keep[:, None]
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    index = {
        "metadata": {"total_size": sum(value.nbytes for value in weights.values())},
        "weight_map": dict.fromkeys(weights, "model.safetensors"),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", default=",".join(MODELS), help="comma-separated model names")
    arguments = parser.parse_args()
    for name in arguments.only.split(","):
        build(name, arguments.folder / name, arguments.seed)
        print(f"built {name}")


if __name__ == "__main__":
    main()
