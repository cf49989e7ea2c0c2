"""Builds tiny embedding models and cross-encoders with random weights, the same ones on every machine.

Needs numpy, safetensors and tokenizers only, so that `tools/embedding_references.py` builds them beside torch.
"""

import json
import shutil
import string
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

Shapes = dict[str, tuple[int, ...]]

DEMO = Path(__file__).parents[1] / "mlxgui_grpc" / "demo"
REFERENCES = Path(__file__).parent / "fixtures" / "embeddings" / "references.json"
"""Vectors and scores that torch made of these models; `tools/embedding_references.py` writes it."""
QWEN3_END = 2
"""The demo tokenizer's end token, which that tokenizer does not add by itself."""
MAX_TOKENS = 96
"""Of a text, special tokens included, in every one of these models but the one of Qwen3."""

EMBEDDERS = ("bert", "bert-cls", "modernbert", "qwen3", "xlm-roberta")
RERANKERS = ("bert-reranker", "modernbert-reranker", "xlm-roberta-reranker")

_HIDDEN, _INNER, _LAYERS, _HEADS = 48, 96, 2, 4
_WORDS = (
    "the",
    "cat",
    "dog",
    "sat",
    "on",
    "mat",
    "runs",
    "world",
    "hello",
    "what",
    "is",
    "capital",
    "of",
    "france",
)
_BASE: dict[str, Any] = {
    "hidden_size": _HIDDEN,
    "intermediate_size": _INNER,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "torch_dtype": "float32",
}
_CLASSES = {"bert": "Bert", "modernbert": "ModernBert", "qwen3": "Qwen3", "xlm-roberta": "XLMRoberta"}


def build_encoder(folder: Path, name: str, *, with_pooling_file: bool = True) -> Path:
    """Write the checkpoint of this name, one of `EMBEDDERS` or `RERANKERS`, as the hub has such."""
    folder.mkdir(parents=True)
    is_reranker = name in RERANKERS
    family = name.removesuffix("-reranker").removesuffix("-cls")
    if family == "qwen3":
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(DEMO / file, folder / file)
        vocabulary_size = 1024
    else:
        vocabulary_size = _write_tokenizer(folder, family)
    suffix = "ForSequenceClassification" if is_reranker else "Model"
    config = {**_BASE, "model_type": family, "vocab_size": vocabulary_size, **_FAMILIES[family]}
    config["architectures"] = [_CLASSES[family] + suffix]
    if is_reranker:
        config["id2label"] = {"0": "LABEL_0"}
    (folder / "config.json").write_text(json.dumps(config))
    if not is_reranker and with_pooling_file:
        mode = "cls" if name.endswith("-cls") else "last" if family == "qwen3" else "mean"
        _write_pooling(folder, mode)
    shapes = _SHAPES[family](config)
    if is_reranker:
        prefix = {"bert": "bert.", "modernbert": "model.", "xlm-roberta": "roberta."}[family]
        shapes = {**{prefix + key: shape for key, shape in shapes.items()}, **_HEAD_SHAPES[family]}
    chance = np.random.default_rng(sum(name.encode()))
    save_file(
        {key: _weights(chance, key, shape) for key, shape in sorted(shapes.items())},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def _weights(chance: np.random.Generator, name: str, shape: tuple[int, ...]) -> Any:
    """Wide enough that texts get vectors of many directions."""
    noise = chance.standard_normal(shape, np.float32)
    if len(shape) == 1:
        return noise * np.float32(0.1) + np.float32(0.0 if name.endswith("bias") else 1.0)
    return noise if "embed" in name else noise * np.float32(1.5 * shape[-1] ** -0.5)


def _write_tokenizer(folder: Path, family: str) -> int:
    """WordPiece over single characters and some words; returns the size of its vocabulary."""
    if family == "xlm-roberta":
        first, padding, last, unknown = special = ("<s>", "<pad>", "</s>", "<unk>")
    else:
        padding, unknown, first, last = special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    characters = string.ascii_lowercase + string.digits + string.punctuation + "éüßあ"
    pieces = [*special, *characters, *(f"##{one}" for one in characters), *_WORDS]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # RoBERTa puts two marks between the texts of a pair and tells them apart by nothing else.
    pair = (
        f"{first} $A {last} {last} $B {last}"
        if family == "xlm-roberta"
        else f"{first} $A {last} $B:1 {last}:1"
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=pair,
        special_tokens=[(one, vocabulary[one]) for one in (first, last)],
    )
    # As the tokenizers of sentence-transformers are stored: a server that keeps these loses the ends of texts.
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16, pad_id=vocabulary[padding], pad_token=padding)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": unknown, "cls_token": first, "sep_token": last, "pad_token": padding}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names})
    )
    return len(vocabulary)


def _write_pooling(folder: Path, mode: str) -> None:
    stages = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize")]
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {
                    "idx": int(number),
                    "name": number,
                    "path": path,
                    "type": f"sentence_transformers.models.{kind}",
                }
                for number, path, kind in stages
            ]
        )
    )
    (folder / "1_Pooling").mkdir()
    flags = {
        "pooling_mode_cls_token": mode == "cls",
        "pooling_mode_mean_tokens": mode == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_lasttoken": mode == "last",
    }
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": _HIDDEN, **flags})
    )


_FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": MAX_TOKENS,
        "pad_token_id": 0,
        "type_vocab_size": 2,
    },
    "modernbert": {
        "global_attn_every_n_layers": 2,
        "global_rope_theta": 160000.0,
        "hidden_activation": "gelu",
        "local_attention": 16,
        "local_rope_theta": 10000.0,
        "max_position_embeddings": MAX_TOKENS,
        "norm_eps": 1e-5,
        "pad_token_id": 0,
        "classifier_pooling": "mean",
        "classifier_activation": "gelu",
        "bos_token_id": 2,
        "eos_token_id": 3,
        "cls_token_id": 2,
        "sep_token_id": 3,
    },
    "qwen3": {
        "eos_token_id": QWEN3_END,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
    "xlm-roberta": {
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": MAX_TOKENS + 2,
        "pad_token_id": 1,
        "type_vocab_size": 1,
    },
}


def _linear(name: str, width: int, height: int) -> Shapes:
    return {f"{name}.weight": (height, width), f"{name}.bias": (height,)}


def _bert_shapes(config: dict[str, Any]) -> Shapes:
    shapes: Shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], _HIDDEN),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], _HIDDEN),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], _HIDDEN),
        "embeddings.LayerNorm.weight": (_HIDDEN,),
        "embeddings.LayerNorm.bias": (_HIDDEN,),
    }
    for layer in range(_LAYERS):
        start = f"encoder.layer.{layer}"
        for name in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
        ):
            shapes |= _linear(f"{start}.{name}", _HIDDEN, _HIDDEN)
        shapes |= _linear(f"{start}.intermediate.dense", _HIDDEN, _INNER)
        shapes |= _linear(f"{start}.output.dense", _INNER, _HIDDEN)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{start}.{name}.weight": (_HIDDEN,), f"{start}.{name}.bias": (_HIDDEN,)}
    if config["model_type"] == "bert":
        shapes |= _linear("pooler.dense", _HIDDEN, _HIDDEN)
    return shapes


def _modernbert_shapes(config: dict[str, Any]) -> Shapes:
    shapes: Shapes = {
        "embeddings.tok_embeddings.weight": (config["vocab_size"], _HIDDEN),
        "embeddings.norm.weight": (_HIDDEN,),
        "final_norm.weight": (_HIDDEN,),
    }
    for layer in range(_LAYERS):
        start = f"layers.{layer}"
        shapes[f"{start}.attn.Wqkv.weight"] = (3 * _HIDDEN, _HIDDEN)
        shapes[f"{start}.attn.Wo.weight"] = (_HIDDEN, _HIDDEN)
        shapes[f"{start}.mlp.Wi.weight"] = (2 * _INNER, _HIDDEN)
        shapes[f"{start}.mlp.Wo.weight"] = (_HIDDEN, _INNER)
        shapes[f"{start}.mlp_norm.weight"] = (_HIDDEN,)
        if layer:
            shapes[f"{start}.attn_norm.weight"] = (_HIDDEN,)
    return shapes


def _qwen3_shapes(config: dict[str, Any]) -> Shapes:
    """Without the prefix `model.`, as the embedding models of the hub have them."""
    width, heads, kv_heads = config["head_dim"], _HEADS, config["num_key_value_heads"]
    shapes: Shapes = {"embed_tokens.weight": (config["vocab_size"], _HIDDEN), "norm.weight": (_HIDDEN,)}
    for layer in range(_LAYERS):
        start = f"layers.{layer}"
        for name, count in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
            shapes[f"{start}.self_attn.{name}.weight"] = (count * width, _HIDDEN)
        shapes[f"{start}.self_attn.o_proj.weight"] = (_HIDDEN, heads * width)
        shapes |= {f"{start}.self_attn.{name}_norm.weight": (width,) for name in "qk"}
        shapes |= {f"{start}.mlp.{name}_proj.weight": (_INNER, _HIDDEN) for name in ("gate", "up")}
        shapes[f"{start}.mlp.down_proj.weight"] = (_HIDDEN, _INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{start}.{name}.weight"] = (_HIDDEN,)
    return shapes


_SHAPES = {
    "bert": _bert_shapes,
    "modernbert": _modernbert_shapes,
    "qwen3": _qwen3_shapes,
    "xlm-roberta": _bert_shapes,
}
_HEAD_SHAPES: dict[str, Shapes] = {
    "bert": _linear("classifier", _HIDDEN, 1),
    "modernbert": {
        "head.dense.weight": (_HIDDEN, _HIDDEN),
        "head.norm.weight": (_HIDDEN,),
        **_linear("classifier", _HIDDEN, 1),
    },
    "xlm-roberta": {
        **_linear("classifier.dense", _HIDDEN, _HIDDEN),
        **_linear("classifier.out_proj", _HIDDEN, 1),
    },
}
