"""How much memory a model takes and how much there is: estimates from a model's files, budgets from the machine."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from mlxgui_grpc.engine.control_group import MemoryGroup
from mlxgui_grpc.untrusted_json import mapping, positive

GIB = 1024**3

PROCESS_BYTES = 105 * 1024 * 1024
"""Footprint of a worker beside weights and caches, until the first one has told its own (measured on Linux: 103 to 108
MB after its imports and a warm-up; a Mac has to tell)."""
ESTIMATE_CONTEXT_TOKENS = 4096
"""Tokens, prompt and completion, of the one request that an estimate counts unless it is asked for another."""
KV_STEP_TOKENS = 256
"""mlx-lm's caches grow in steps of so many tokens."""
PREFILL_PER_KV = 1.9
"""Bytes that a prefill needs for a moment, per byte of the KV cache that it makes (measured, architecture notes)."""
ENCODER_BATCH_TOKENS = 4096
"""Tokens, padding included, of one forward pass of an embedding model."""
FUSED_HEAD_WIDTHS = frozenset({64, 80, 128})
"""Widths of attention heads for which MLX keeps no scores (`scaled_dot_product_attention` on Metal)."""
WARNING_SHARE = 0.8
"""A load that takes the models beyond this share of the budget carries a warning."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes that a load takes, by what takes them."""

    weight_bytes: int
    kv_bytes: int
    prefill_bytes: int
    process_bytes: int

    @property
    def required_bytes(self) -> int:
        """The sum."""
        return self.weight_bytes + self.kv_bytes + self.prefill_bytes + self.process_bytes


def estimate(
    weight_bytes: int,
    kv_bytes_per_token: int,
    *,
    context_length: int = 0,
    token_count: int = ESTIMATE_CONTEXT_TOKENS,
    request_count: int = 1,
    process_bytes: int = PROCESS_BYTES,
    batch_bytes: int = 0,
) -> Estimate:
    """What a model of these weights takes while `request_count` requests hold `token_count` tokens each.

    `context_length` (0: unknown) caps the tokens. One request prefills at a time, beside `batch_bytes`.
    """
    tokens = min(token_count, context_length) if context_length > 0 else token_count
    tokens = -(-tokens // KV_STEP_TOKENS) * KV_STEP_TOKENS
    kv_bytes = kv_bytes_per_token * tokens
    prefill_bytes = int(PREFILL_PER_KV * kv_bytes) + batch_bytes
    return Estimate(weight_bytes, kv_bytes * request_count, prefill_bytes, process_bytes)


def kv_bytes_per_token(config: Mapping[str, Any]) -> int:
    """Bytes of keys and values per token by a config.json; 0 where it does not say.

    2 (key and value) x layers x KV heads x head width x bytes of a number. Models whose layers do not all keep every
    token (windowed, recurrent) take less; multi-head latent attention keeps one low-rank row per layer.
    """
    text = {**config, **mapping(config.get("text_config"))}
    layers, heads = positive(text.get("num_hidden_layers")), positive(text.get("num_attention_heads"))
    number_bytes = 4 if str(text.get("torch_dtype") or text.get("dtype")) == "float32" else 2
    if rank := positive(text.get("kv_lora_rank")):
        return layers * (rank + positive(text.get("qk_rope_head_dim"))) * number_bytes
    kv_heads = positive(text.get("num_key_value_heads")) or heads
    width = positive(text.get("head_dim")) or (positive(text.get("hidden_size")) // heads if heads else 0)
    return 2 * layers * kv_heads * width * number_bytes


def encoder_batch_bytes(config: Mapping[str, Any]) -> int:
    """Bytes that one forward pass of an embedding model or a cross-encoder needs for a moment, by its config.json.

    Hidden states and the inner ones of a layer, and where no kernel of MLX's computes attention in one go, its scores.
    """
    width, heads = positive(config.get("hidden_size")), positive(config.get("num_attention_heads"))
    head_width = positive(config.get("head_dim")) or (width // heads if heads else 0)
    numbers = 4 * width + 2 * positive(config.get("intermediate_size"))
    if head_width not in FUSED_HEAD_WIDTHS:
        length = min(positive(config.get("max_position_embeddings")), ENCODER_BATCH_TOKENS)
        numbers += 2 * heads * length
    return ENCODER_BATCH_TOKENS * numbers * 4


def gigabytes_text(size_bytes: float) -> str:
    """`18.5GB`, in the document's form; the unit is GiB."""
    size = size_bytes / GIB
    return f"{size:.1f}GB" if size >= 0.05 else f"{size:.3f}GB"


def insufficient_memory_text(required_bytes: int, available_bytes: int) -> str:
    """The documented sentence."""
    return (
        f"❌ Insufficient memory - This model requires {gigabytes_text(required_bytes)} but you have "
        f"{gigabytes_text(max(0, available_bytes))} available"
    )


@dataclass(frozen=True, slots=True)
class MachineMemory:
    """The machine's memory, or what a container lets this process have of it."""

    total_bytes: int
    available_bytes: int
    """What can be had without swapping."""

    @property
    def used_bytes(self) -> int:
        """What is in use."""
        return self.total_bytes - self.available_bytes

    @property
    def percent_used(self) -> float:
        """`used_bytes` in percent of the whole."""
        return 100 * self.used_bytes / self.total_bytes if self.total_bytes else 0.0


def read_machine_memory() -> MachineMemory:
    """The memory there is now: psutil's view, narrowed by the control groups that this process is in."""
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    group = MemoryGroup.of(os.getpid())
    for one in group.limits() if group else ():
        if one.limit_bytes < total:
            total, available = one.limit_bytes, min(available, one.limit_bytes - one.used_bytes)
    return MachineMemory(total, max(0, min(available, total)))


def footprint_bytes(pid: int) -> int:
    """Resident memory of a process, 0 when it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except (psutil.Error, OSError):
        return 0
