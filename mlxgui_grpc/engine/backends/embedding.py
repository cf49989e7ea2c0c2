"""Loads embedding models and cross-encoders through mlx-vlm, and runs them on a batch. Runs on the MLX thread."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxgui_grpc import encoders
from mlxgui_grpc.engine.backends.text import Tokens, load_tokens

Forward = Callable[[mx.array, mx.array, mx.array], mx.array]


@dataclass(frozen=True, slots=True)
class EncoderModel:
    """A loaded embedding model or cross-encoder."""

    tokens: Tokens
    run: Forward
    """(token ids, mask, segment ids), each of rows x tokens, to rows x numbers of float32: a vector of length 1 for
    each row, or its one score from 0 to 1. The mask is 1 where a token is and 0 where a row is filled up."""
    padding_token: int
    end_token: int | None
    """What has to end a text, for it is what the vector is taken of; None: nothing."""
    weight_bytes: int
    batchable: bool = True
    kv_bytes_per_token: int = 0


def load_encoder_tokens(view: Path, *, is_reranker: bool) -> tuple[Tokens, int | None]:
    """Load the tokenizer alone, which neither cuts nor fills up; and what has to end a text."""
    config = _config(view)
    encoder = encoders.read_encoder(view, config, is_reranker=is_reranker)
    tokens = load_tokens(view)
    tokens.backend.no_truncation()
    tokens.backend.no_padding()
    end_token = config.get("eos_token_id") if encoder.pooling == "last_token" else None
    context_length = encoder.context_length or tokens.context_length
    return replace(tokens, context_length=context_length), end_token if isinstance(end_token, int) else None


def load_encoder(view: Path, *, is_reranker: bool) -> EncoderModel:
    """Load weights and tokenizer from a view that `checkpoint.py` has checked, and evaluate them."""
    from mlx_vlm.encoder_loader import load_encoder_model  # Costs a second of imports.

    config = _config(view)
    encoder = encoders.read_encoder(view, config, is_reranker=is_reranker)
    for file in view.glob("*.safetensors"):
        mx.load(str(file))  # mlx-vlm rewrites the headers of files with types that MLX does not know.
    overrides = {"num_labels": 1} if is_reranker else {}
    model: Any = load_encoder_model(
        view,
        model_remapping=encoders.MODULES,
        model_class_name="SequenceClassificationModel" if is_reranker else "Model",
        config={**config, **overrides},
    )
    for _, module in model.named_modules():
        if isinstance(getattr(module, "act", None), nn.GELU):
            module.act = (
                nn.GELU()
            )  # mlx-vlm takes the approximation with tanh for ModernBERT, which has the exact one.
    mx.eval(model.state)
    arrays: list[mx.array] = [array for _, array in cast(Any, tree_flatten(model.parameters()))]
    tokens, end_token = load_encoder_tokens(view, is_reranker=is_reranker)
    trunk = _trunk(model, config)
    pool = _POOLS[encoder.pooling] if encoder.pooling else None

    def embed(ids: mx.array, mask: mx.array, segments: mx.array) -> mx.array:
        assert pool is not None
        pooled = pool(trunk(ids, mask, segments).astype(mx.float32), mask)
        return pooled / mx.maximum(mx.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)

    def score(ids: mx.array, mask: mx.array, segments: mx.array) -> mx.array:
        return mx.sigmoid(model(ids, mask, token_type_ids=segments).logits.astype(mx.float32))

    return EncoderModel(
        tokens=replace(tokens, vocabulary_size=int(config["vocab_size"])),
        run=score if is_reranker else embed,
        padding_token=encoders.padding_token(config),
        end_token=end_token,
        weight_bytes=sum(array.nbytes for array in arrays),
    )


def _trunk(model: Any, config: dict[str, Any]) -> Forward:
    """The last hidden state of every token."""
    if config["model_type"] == "qwen3":
        # Tokens see only those before them, and rows are filled up behind: nothing has to be masked, which spares
        # a matrix of the square of the length.
        return lambda ids, mask, segments: model.model(ids)
    return lambda ids, mask, segments: model(ids, mask, token_type_ids=segments).last_hidden_state


def _mean(states: mx.array, mask: mx.array) -> mx.array:
    weights = mask[..., None]
    return (states * weights).sum(axis=1) / weights.sum(axis=1)


def _weighted_mean(states: mx.array, mask: mx.array) -> mx.array:
    return _mean(states, mask * mx.arange(1, mask.shape[1] + 1))


def _largest(states: mx.array, mask: mx.array) -> mx.array:
    return mx.where(mask[..., None] == 0, -mx.inf, states).max(axis=1)


def _first(states: mx.array, mask: mx.array) -> mx.array:
    return states[:, 0]


def _last(states: mx.array, mask: mx.array) -> mx.array:
    ends = mask.sum(axis=1).astype(mx.int32) - 1
    return states[mx.arange(states.shape[0]), ends]


_POOLS: dict[encoders.Pooling, Callable[[mx.array, mx.array], mx.array]] = {
    "cls": _first,
    "last_token": _last,
    "max": _largest,
    "mean": _mean,
    "weighted_mean": _weighted_mean,
}


def _config(view: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((view / "config.json").read_text())
    return loaded
