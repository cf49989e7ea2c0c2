"""Loads text models through mlx-lm. Runs on the MLX thread."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, load_tokenizer

from mlxgui_grpc.engine.batch import kv_cost, why_serial
from mlxgui_grpc.engine.kv_budget import KvCost
from mlxgui_grpc.engine.reply_format import ReplyFormat, reply_format_of
from mlxgui_grpc.engine.sampling import SamplingDefaults

if TYPE_CHECKING:
    from mlxgui_grpc.engine.vision_prompts import VisionPrompts

DEFAULT_CONTEXT_LENGTH = 4096
"""For the rare checkpoint whose config.json does not say how many positions it was trained on."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenizer and what the checkpoint says about it."""

    tokenizer: Any  # transformers' tokenizer
    backend: Any  # the tokenizers.Tokenizer below it
    render: Callable[..., str] | None  # chat messages to prompt text; None: no chat template
    end_tokens: frozenset[int]
    vocabulary_size: int
    context_length: int
    reply_format: ReplyFormat = field(default_factory=ReplyFormat)


@dataclass(frozen=True, slots=True)
class TextModel:
    """A loaded text model."""

    model: Any
    tokens: Tokens
    defaults: SamplingDefaults
    weight_bytes: int
    batchable: bool
    kv_cost: KvCost
    vision: "VisionPrompts | None" = None
    """The processor, where prompts may have images."""
    notes: tuple[str, ...] = ()
    """What a user should know of how it is served, as sentences."""
    warnings: tuple[str, ...] = ()
    """Of those, what every answer has to say."""

    @property
    def kv_bytes_per_token(self) -> int:
        """What a row's caches grow by; 0, unknown."""
        return self.kv_cost.bytes_per_token


def load_tokens(view: Path) -> Tokens:
    """Load the tokenizer alone."""
    config = json.loads((view / "config.json").read_text())
    return tokens_of(view, config)


def load_text_model(view: Path) -> TextModel:
    """Load weights and tokenizer from a view that `checkpoint.py` has checked, and evaluate them."""
    model, config = load_model(view, trust_remote_code=False)
    # Arrays that are built lazily and are no parameters (RoPE frequencies) belong to this thread too.
    mx.eval(model.state)
    arrays: list[mx.array] = [array for _, array in cast(Any, tree_flatten(model.parameters()))]
    tokens = tokens_of(view, config)
    # The model's own output decides what a token is: a tokenizer may have more of them, a config.json none.
    width: int = model(mx.array([[0]]), cache=make_prompt_cache(model)).shape[-1]  # lazy: nothing is computed
    serial_note = why_serial(model)
    return TextModel(
        model=model,
        tokens=replace(tokens, vocabulary_size=width),
        defaults=sampling_defaults(generation_config(view)),
        weight_bytes=sum(array.nbytes for array in arrays),
        batchable=not serial_note,
        kv_cost=kv_cost(model),
        notes=(serial_note,) if serial_note else (),
    )


def tokens_of(view: Path, config: dict[str, Any]) -> Tokens:
    """The tokenizer of a view whose config.json says `config`."""
    end = config.get("eos_token_id")
    end = generation_config(view).get("eos_token_id", end)
    wrapper = load_tokenizer(view, eos_token_ids=end)
    tokenizer = wrapper._tokenizer
    # A few families have a template that is a module of mlx-lm, not a text of the checkpoint.
    render = wrapper._chat_template
    if render is None and tokenizer.chat_template is not None:
        render = partial(tokenizer.apply_chat_template, tokenize=False)
    text_config = {**config, **(config.get("text_config") or {})}
    reply_format = reply_format_of(wrapper)
    return Tokens(
        tokenizer=tokenizer,
        backend=tokenizer.backend_tokenizer,
        render=render,
        end_tokens=frozenset(wrapper.eos_token_ids) | reply_format.end_tokens,
        vocabulary_size=max(int(text_config.get("vocab_size") or 0), len(tokenizer)),
        context_length=int(text_config.get("max_position_embeddings") or DEFAULT_CONTEXT_LENGTH),
        reply_format=reply_format,
    )


def sampling_defaults(generation: dict[str, Any]) -> SamplingDefaults:
    """The recommended sampler; greedy decoding where none is recommended."""
    if "temperature" not in generation or not generation.get("do_sample", True):
        return SamplingDefaults()
    return SamplingDefaults(
        temperature=float(generation["temperature"]),
        top_p=float(generation.get("top_p") or 1.0),
        top_k=int(generation.get("top_k") or 0),
        min_p=float(generation.get("min_p") or 0.0),
        repetition_penalty=float(generation.get("repetition_penalty") or 1.0),
    )


def generation_config(view: Path) -> dict[str, Any]:
    """What generation_config.json says."""
    path = view / "generation_config.json"
    if not path.exists():
        return {}
    loaded = json.loads(path.read_text())
    return loaded if isinstance(loaded, dict) else {}
