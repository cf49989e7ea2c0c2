"""What makes vectors or scores of a checkpoint, read from its files without MLX: architecture, pooling, limits.

The files are those of sentence-transformers: `modules.json` lists what a text goes through, `1_Pooling/config.json`
says how one vector is made of many. Where they are missing, the family's habit is taken, and it is said.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlxgui_grpc.errors import ModelIncompatibleError
from mlxgui_grpc.untrusted_json import mapping, positive

Pooling = Literal["cls", "mean", "max", "last_token", "weighted_mean"]

MODULES = {
    "bert": "bert",
    "camembert": "xlm_roberta",
    "modernbert": "modernbert",
    "qwen3": "qwen3_embedding",
    "roberta": "xlm_roberta",
    "xlm-roberta": "xlm_roberta",
}
"""The module of mlx-vlm that runs each architecture; RoBERTa and CamemBERT are XLM-RoBERTa with another vocabulary."""
RERANKERS = MODULES.keys() - {"qwen3"}
"""Architectures with a head for scores."""
POOLING_FILE = "1_Pooling/config.json"
MAX_FILE_BYTES = 1024 * 1024
"""Of a list of modules or a way of pooling."""

_POOLING_NAMES: dict[str, Pooling] = {
    "cls": "cls",
    "mean": "mean",
    # The sum over the root of the length: of the same direction as the mean, and every vector gets the length 1.
    "mean_sqrt_len_tokens": "mean",
    "max": "max",
    "lasttoken": "last_token",
    "weightedmean": "weighted_mean",
}
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_KNOWN_STAGES = frozenset({"Transformer", "Pooling", "Normalize"})
_OFFSET_FAMILIES = frozenset({"camembert", "roberta", "xlm-roberta"})
"""Their positions begin after the number of the padding token."""
_EXACT_GELU = frozenset({"", "gelu"})


@dataclass(frozen=True, slots=True)
class Encoder:
    """What an embedding model or a cross-encoder does with a text."""

    pooling: Pooling | None
    """How one vector is made of many; None: a cross-encoder, which has a head of its own."""
    is_pooling_assumed: bool
    """The checkpoint does not say how; it is what the family usually does."""
    dimensions: int
    """Numbers in a vector; 0: it makes none."""
    context_length: int
    """Most tokens of a text, special ones included. It is what the model has positions for: `max_seq_length` of
    sentence-transformers, where that tool cuts texts, is not a limit of the model."""
    refusal: str = ""
    """Why this version does not serve it, as the end of a sentence; empty: it does."""


def read_encoder(path: Path, config: Mapping[str, Any], *, is_reranker: bool) -> Encoder:
    """What the files say of a model that is one for embedding, or a cross-encoder."""
    architecture = str(config.get("model_type") or "")
    context_length = positive(config.get("max_position_embeddings"))
    if architecture in _OFFSET_FAMILIES and context_length:
        context_length -= padding_token(config) + 1
    reason = _refusal(config, is_reranker=is_reranker)
    if is_reranker:
        return Encoder(None, False, 0, context_length, reason)
    usual: Pooling = "last_token" if architecture == "qwen3" else "mean"
    named = None
    try:
        _refuse_other_stages(path)
        named = _pooling(path)
    except ModelIncompatibleError as error:
        reason = reason or error.message
    return Encoder(named or usual, named is None, positive(config.get("hidden_size")), context_length, reason)


def _refusal(config: Mapping[str, Any], *, is_reranker: bool) -> str:
    """Why the architecture is not served; empty: it is."""
    architecture = str(config.get("model_type") or "")
    served = RERANKERS if is_reranker else MODULES.keys()
    if architecture not in served:
        return f"has the architecture '{architecture}'; this version serves {', '.join(sorted(served))}"
    key = "hidden_activation" if architecture == "modernbert" else "hidden_act"
    activation = str(config.get(key) or "")
    if architecture != "qwen3" and activation not in _EXACT_GELU:
        return f"has the activation '{activation[:64]}'; this version computes gelu in such a model"
    if config.get("position_embedding_type") not in (None, "absolute"):
        return "has relative positions; this version serves absolute ones"
    return ""


def padding_token(config: Mapping[str, Any]) -> int:
    """The token that fills up the shorter texts of a batch."""
    given = config.get("pad_token_id")
    usual = 1 if config.get("model_type") in _OFFSET_FAMILIES else 0
    return usual if given is None else positive(given)


def _refuse_other_stages(path: Path) -> None:
    stages = _read_json(path / "modules.json")
    for stage in stages if isinstance(stages, list) else []:
        name = str(mapping(stage).get("type", "")).rpartition(".")[2]
        if name not in _KNOWN_STAGES:
            raise ModelIncompatibleError(
                f"sends its vectors through '{name[:64]}' (modules.json), which this version does not serve; "
                f"it serves {', '.join(sorted(_KNOWN_STAGES))}"
            )


def _pooling(path: Path) -> Pooling | None:
    """The way that the checkpoint names; None where it names none."""
    content = mapping(_read_json(path / POOLING_FILE))
    modes = [name for flag, name in _POOLING_FLAGS.items() if content.get(flag) is True]
    if not modes and (given := content.get("pooling_mode")) is not None:
        modes = [str(mode) for mode in given] if isinstance(given, list) else [str(given)]
    if not modes:
        return None
    if len(modes) > 1 or modes[0] not in _POOLING_NAMES:
        raise ModelIncompatibleError(
            f"pools by {' and '.join(mode[:64] for mode in modes[:8])} ({POOLING_FILE}); this version serves one "
            f"of {', '.join(_POOLING_NAMES)}"
        )
    if content.get("include_prompt") is False:
        raise ModelIncompatibleError(
            f"leaves a prompt out of its pooling ({POOLING_FILE}), which this version does not serve"
        )
    return _POOLING_NAMES[modes[0]]


def _read_json(file: Path) -> Any:
    """The content; None where there is no such file."""
    if not file.is_file():
        return None
    name = "/".join(file.parts[-2:])
    if file.stat().st_size > MAX_FILE_BYTES:
        raise ModelIncompatibleError(f"has a {name} larger than {MAX_FILE_BYTES >> 20} MiB")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelIncompatibleError(f"has a {name} that cannot be read: {error}") from error
