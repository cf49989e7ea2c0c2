"""What a model directory is, and whether it is safe to load: read from its files, without MLX.

A model directory is untrusted input. Loaders never see it: they see a view of it (`model_view`). A checkpoint that
cannot load without its own code is refused.
"""

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxgui_grpc import encoders, memory
from mlxgui_grpc.errors import ModelIncompatibleError, ModelUnsafeError
from mlxgui_grpc.known_architectures import text_architectures, vision_architectures
from mlxgui_grpc.model_types import POOLING_SIGNS, SERVED_TYPES, type_of
from mlxgui_grpc.untrusted_json import mapping, positive

MAX_CONFIG_BYTES = 16 * 1024 * 1024
MAX_HEADER_BYTES = 100 * 1024 * 1024
"""The safetensors format's own limit for its header."""
MAX_COUNT = 2**62
"""Bytes or weights beyond it are nobody's model, and no 64-bit number adds up to them."""

_ARCHITECTURE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ELEMENT_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
}
_GENERATING = {"text": ("mlx-lm", text_architectures), "vision": ("mlx-vlm", vision_architectures)}
"""The package that loads each type of model that generates, and what it knows."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the files say a model is."""

    path: Path
    type: str
    """In the words of `model_types`."""
    architecture: str
    """`model_type` of config.json."""
    context_length: int
    """Positions; 0 where config.json is silent."""
    size_bytes: int
    """All files of the directory."""
    weight_bytes: int
    """The tensors, as they are in memory."""
    kv_bytes_per_token: int
    """Keys and values of one token; 0 where config.json does not say, and for a model that keeps none."""
    batch_bytes: int
    """What one batch of texts takes for a moment in a model that keeps no keys and values; else 0."""
    memory_bytes: int
    """Estimate of what a load takes: weights, KV cache of some thousand tokens, process."""
    parameter_count: int
    quantization_bits: int
    """0: not quantized."""
    has_chat_template: bool
    template: str
    """Text of the chat template."""
    encoder: encoders.Encoder | None = None
    """What an embedding model or a reranker does with a text; None for other types."""


def inspect(path: Path) -> Checkpoint:
    """Read a model directory; raises ModelIncompatibleError or ModelUnsafeError with the reason."""
    config = read_config(path)
    refuse_code(config)
    files = sorted(file for file in path.iterdir() if file.is_file())
    weights = [file for file in files if file.suffix == ".safetensors"]
    if not weights:
        raise ModelIncompatibleError(
            f"{shown(path)} holds no .safetensors file: only checkpoints in that format can be loaded"
        )
    headers = [read_header(file) for file in weights]
    weight_bytes = sum(size for size, _ in headers)
    text_config = {**config, **mapping(config.get("text_config"))}
    template = _template(path)
    quantization = mapping(config.get("quantization") or config.get("quantization_config"))
    context_length = positive(text_config.get("max_position_embeddings"))
    type = type_of(
        _architecture(config),
        config,
        has_pooling=any((path / name).exists() for name in POOLING_SIGNS),
        repository=_repository(path),
    )
    encoder = None
    if type in ("embedding", "reranker"):
        encoder = encoders.read_encoder(path, config, is_reranker=type == "reranker")
        context_length = encoder.context_length
    per_token = 0 if encoder else memory.kv_bytes_per_token(config)
    batch_bytes = memory.encoder_batch_bytes(config) if encoder else 0
    memory_bytes = memory.estimate(
        weight_bytes, per_token, context_length=context_length, batch_bytes=batch_bytes
    ).required_bytes
    parameter_count = sum(count for _, count in headers)
    if max(memory_bytes, parameter_count) > MAX_COUNT:
        raise ModelIncompatibleError(f"{shown(path)} claims sizes that no model has")
    return Checkpoint(
        path=path,
        type=type,
        architecture=_architecture(config),
        context_length=context_length,
        size_bytes=sum(file.stat().st_size for file in files),
        weight_bytes=weight_bytes,
        kv_bytes_per_token=per_token,
        batch_bytes=batch_bytes,
        memory_bytes=memory_bytes,
        parameter_count=parameter_count,
        quantization_bits=positive(quantization.get("bits")),
        has_chat_template=bool(template),
        template=template,
        encoder=encoder,
    )


def require_loadable(checkpoint: Checkpoint) -> None:
    """Raise ModelIncompatibleError when this version cannot serve such a model."""
    if checkpoint.type not in SERVED_TYPES:
        raise ModelIncompatibleError(
            f"{shown(checkpoint.path)} is a model for {checkpoint.type}; this version serves models for "
            f"{', '.join(sorted(SERVED_TYPES))}"
        )
    if checkpoint.encoder is not None:
        if checkpoint.encoder.refusal:
            raise ModelIncompatibleError(f"{shown(checkpoint.path)} {checkpoint.encoder.refusal}")
        if not vision_architectures():
            raise ModelIncompatibleError(
                f"{shown(checkpoint.path)} is a model for {checkpoint.type}, which takes the package mlx-vlm: "
                "install mlxgui-grpc[embeddings]"
            )
        return
    package, architectures = _GENERATING[checkpoint.type]
    known = architectures()
    if not known:
        raise ModelIncompatibleError(
            f"{shown(checkpoint.path)} is a model for {checkpoint.type}, which takes the package {package}: "
            f"install mlxgui-grpc[{checkpoint.type}]"
        )
    if checkpoint.architecture not in known | text_architectures():
        raise ModelIncompatibleError(
            f"{package} does not know the architecture '{checkpoint.architecture}' of {shown(checkpoint.path)}"
        )


def served_architectures() -> frozenset[str]:
    """The architectures of all types that this version serves."""
    return text_architectures() | vision_architectures() | encoders.MODULES.keys()


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory; raises ModelIncompatibleError where there is none that can be read."""
    if not path.is_dir():
        raise ModelIncompatibleError(f"{path} is not a folder")
    file = path / "config.json"
    if not file.is_file():
        raise ModelIncompatibleError(f"{shown(path)} has no config.json: it is not a model directory")
    config = read_json(file)
    if not isinstance(config, dict):
        raise ModelIncompatibleError(f"{shown(path)}/config.json is not a JSON object")
    return config


def read_json(file: Path) -> Any:
    """The content of a JSON file; raises ModelIncompatibleError for one that cannot be read."""
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise ModelIncompatibleError(f"{file.name} is larger than {MAX_CONFIG_BYTES >> 20} MiB")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelIncompatibleError(f"{file.name} cannot be read: {error}") from error


def refuse_code(config: dict[str, Any]) -> None:
    """Raise ModelUnsafeError for a checkpoint that cannot load without code of its own."""
    if config.get("model_file") is not None:
        raise ModelUnsafeError(
            "config.json names a Python file to run (model_file); such a checkpoint is never loaded"
        )
    if config.get("auto_map") and _architecture(config) not in text_architectures() | vision_architectures():
        raise ModelUnsafeError(
            "config.json needs code of its own (auto_map) and the architecture is not a built-in one; "
            "such a checkpoint is never loaded"
        )


def read_header(file: Path) -> tuple[int, int]:
    """(tensor bytes, parameters) of a safetensors file; raises ModelIncompatibleError when it is damaged.

    The format: 8 bytes of little-endian header length, a JSON header, the data that its offsets cover.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"the header claims {length} bytes")
            header = json.loads(stream.read(length))
        tensors = [value for name, value in header.items() if name != "__metadata__"]
        spans = sorted(
            (_size(tensor["data_offsets"][0]), _size(tensor["data_offsets"][1])) for tensor in tensors
        )
        position = 0
        for start, end in spans:
            if start < position or end < start:
                raise ValueError("tensors overlap")
            position = end
        if position > size - 8 - length:
            raise ValueError(f"{position} bytes of tensors are promised, {size - 8 - length} are there")
        count = sum(_element_count(tensor) for tensor in tensors)
        if count > MAX_COUNT:
            raise ValueError("it claims more weights than any model has")
    except (
        ValueError,
        OverflowError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        RecursionError,
        struct.error,
    ) as error:
        raise ModelIncompatibleError(f"{file.name} is damaged: {error}; install the model again") from error
    return position, count


def _element_count(tensor: dict[str, Any]) -> int:
    """Elements of a tensor; raises ValueError where shape, element type and offsets contradict each other."""
    count = 1
    for size in tensor["shape"]:
        count *= _size(size)
        if count > MAX_COUNT:
            raise ValueError("a tensor claims more weights than any model has")
    bits = _ELEMENT_BITS.get(tensor["dtype"])
    start, end = tensor["data_offsets"]
    if bits is not None and count * bits != (end - start) * 8:
        raise ValueError(f"a tensor of {count} {tensor['dtype']} has {end - start} bytes")
    return count


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError("a size is not a whole number")
    return value


def _architecture(config: dict[str, Any]) -> str:
    """`model_type`; empty where there is none, as in the files of some models for transcription."""
    name = config.get("model_type")
    if name is None or name == "":
        return ""
    if not isinstance(name, str) or not _ARCHITECTURE.fullmatch(name):
        raise ModelIncompatibleError(
            "config.json has a model_type that is no name: 1 to 64 letters, digits, dots, dashes or underscores"
        )
    return name


def shown(path: Path) -> str:
    """What a user calls a model: its hub id where the name of its folder is a commit, else that name."""
    return _repository(path) or path.name


def _repository(path: Path) -> str:
    """The hub id of a folder in the hub's cache; empty elsewhere."""
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.removeprefix("models--").replace("--", "/")
    return ""


def _template(path: Path) -> str:
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        file = path / name
        if not file.is_file() or file.stat().st_size > MAX_CONFIG_BYTES:
            continue
        if file.suffix == ".jinja":
            return file.read_text(encoding="utf-8", errors="replace")
        content = mapping(read_json(file))
        if template := content.get("chat_template"):
            return template if isinstance(template, str) else json.dumps(template)
        if content.get("chat_template_type"):
            return str(content["chat_template_type"])
    return ""
