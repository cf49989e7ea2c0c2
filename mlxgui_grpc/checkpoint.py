"""What a model directory is, and whether it is safe to load: read from its files, without MLX.

A model directory is untrusted input. Loaders never see it: they see a view, a folder of links to the files that
are only data, with JSON files that name code cleaned of it. A checkpoint that cannot load without its own code is
refused.
"""

import ast
import contextlib
import importlib.util
import json
import re
import shutil
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mlxgui_grpc import memory
from mlxgui_grpc.errors import ModelIncompatibleError, ModelUnsafeError
from mlxgui_grpc.model_types import SERVED_TYPES, type_of
from mlxgui_grpc.untrusted_json import mapping, positive

DATA_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".npz"})
"""What a view may hold; Python files and pickles are left out of it, whatever they are called otherwise."""
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
_CODE_KEYS = ("auto_map", "custom_pipelines")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the files say a model is."""

    path: Path
    type: str
    """text, vision, embedding, transcription or speech."""
    architecture: str
    """`model_type` of config.json."""
    context_length: int
    """Positions; 0 where config.json is silent."""
    size_bytes: int
    """All files of the directory."""
    weight_bytes: int
    """The tensors, as they are in memory."""
    kv_bytes_per_token: int
    """Keys and values of one token; 0 where config.json does not say."""
    memory_bytes: int
    """Estimate of what a load takes: weights, KV cache of some thousand tokens, process."""
    parameter_count: int
    quantization_bits: int
    """0: not quantized."""
    has_chat_template: bool
    template: str
    """Text of the chat template."""


def inspect(path: Path) -> Checkpoint:
    """Read a model directory; raises ModelIncompatibleError or ModelUnsafeError with the reason."""
    config = _read_config(path)
    _refuse_code(config)
    files = sorted(file for file in path.iterdir() if file.is_file())
    weights = [file for file in files if file.suffix == ".safetensors"]
    if not weights:
        raise ModelIncompatibleError(
            f"{_shown(path)} holds no .safetensors file: only checkpoints in that format can be loaded"
        )
    headers = [_read_header(file) for file in weights]
    weight_bytes = sum(size for size, _ in headers)
    text_config = {**config, **mapping(config.get("text_config"))}
    template = _template(path)
    quantization = mapping(config.get("quantization") or config.get("quantization_config"))
    context_length = positive(text_config.get("max_position_embeddings"))
    per_token = memory.kv_bytes_per_token(config)
    memory_bytes = memory.estimate(weight_bytes, per_token, context_length=context_length).required_bytes
    parameter_count = sum(count for _, count in headers)
    if max(memory_bytes, parameter_count) > MAX_COUNT:
        raise ModelIncompatibleError(f"{_shown(path)} claims sizes that no model has")
    return Checkpoint(
        path=path,
        type=type_of(_architecture(config), config, has_pooling=(path / "1_Pooling").is_dir()),
        architecture=_architecture(config),
        context_length=context_length,
        size_bytes=sum(file.stat().st_size for file in files),
        weight_bytes=weight_bytes,
        kv_bytes_per_token=per_token,
        memory_bytes=memory_bytes,
        parameter_count=parameter_count,
        quantization_bits=positive(quantization.get("bits")),
        has_chat_template=bool(template),
        template=template,
    )


def require_loadable(checkpoint: Checkpoint) -> None:
    """Raise ModelIncompatibleError when this version cannot serve such a model."""
    if checkpoint.type not in SERVED_TYPES:
        raise ModelIncompatibleError(
            f"{_shown(checkpoint.path)} is a model for {checkpoint.type}; this version serves text models"
        )
    if checkpoint.architecture not in text_architectures():
        raise ModelIncompatibleError(
            f"mlx-lm does not know the architecture '{checkpoint.architecture}' of {_shown(checkpoint.path)}"
        )


@cache
def text_architectures() -> frozenset[str]:
    """The architectures of the installed mlx-lm with its aliases, read from its source: importing it costs seconds."""
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    package = Path(spec.submodule_search_locations[0])
    names = {file.stem for file in package.joinpath("models").glob("*.py")} - {"__init__", "base", "cache"}
    for node in ast.parse(package.joinpath("utils.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODEL_REMAPPING":
            aliases: dict[str, str] = ast.literal_eval(node.value)
            names |= {alias for alias, target in aliases.items() if target in names}
    return frozenset(names)


def make_view(path: Path, view: Path) -> Path:
    """Build, anew, the folder that a loader sees of the model in `path`; returns it."""
    _refuse_code(_read_config(path))
    roots = _allowed_roots(path)
    if view.exists():
        shutil.rmtree(view)
    view.mkdir(parents=True, mode=0o700)
    for file in sorted(path.iterdir()):
        if file.suffix not in DATA_SUFFIXES or not file.is_file():
            continue
        target = file.resolve()
        if not any(target.is_relative_to(root) for root in roots):
            raise ModelUnsafeError(f"{_shown(path)}/{file.name} links to a place outside of the model")
        if cleaned := _cleaned_json(file):
            (view / file.name).write_text(cleaned)
        elif file.suffix == ".safetensors":
            _read_header(file)
            (view / _weight_name(file, path)).symlink_to(target)
        else:
            (view / file.name).symlink_to(target)
    return view


def remove_view(view: Path) -> None:
    """Forget a view."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(view)


def _weight_name(file: Path, path: Path) -> str:
    """mlx-lm loads `model*.safetensors` only: a lone file of another name is shown under that one."""
    if file.name.startswith("model") or any(path.glob("model*.safetensors")):
        return file.name
    return f"model-{file.name}"


def _allowed_roots(path: Path) -> list[Path]:
    """Where links of a model may point: its folder, or in the Hugging Face cache its repository's folder."""
    resolved = path.resolve()
    roots = [resolved]
    if resolved.parent.name == "snapshots":
        roots.append(resolved.parent.parent)
    return roots


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ModelIncompatibleError(f"{path} is not a folder")
    file = path / "config.json"
    if not file.is_file():
        raise ModelIncompatibleError(f"{_shown(path)} has no config.json: it is not a model directory")
    config = _read_json(file)
    if not isinstance(config, dict):
        raise ModelIncompatibleError(f"{_shown(path)}/config.json is not a JSON object")
    return config


def _read_json(file: Path) -> Any:
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise ModelIncompatibleError(f"{file.name} is larger than {MAX_CONFIG_BYTES >> 20} MiB")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelIncompatibleError(f"{file.name} cannot be read: {error}") from error


def _refuse_code(config: dict[str, Any]) -> None:
    if config.get("model_file") is not None:
        raise ModelUnsafeError(
            "config.json names a Python file to run (model_file); such a checkpoint is never loaded"
        )
    if config.get("auto_map") and _architecture(config) not in text_architectures():
        raise ModelUnsafeError(
            "config.json needs code of its own (auto_map) and the architecture is not a built-in one; "
            "such a checkpoint is never loaded"
        )


def _cleaned_json(file: Path) -> str | None:
    """The text of a JSON file without what names code, or None where there is nothing to clean."""
    if file.suffix != ".json" or file.name in {
        "tokenizer.json",
        "vocab.json",
        "model.safetensors.index.json",
    }:
        return None
    content = _read_json(file)
    if not isinstance(content, dict):
        return None
    # mlx-lm imports modules of its own package by these two names.
    names = [content.get(key) for key in ("chat_template_type", "tool_parser_type")]
    dirty = any(key in content for key in _CODE_KEYS)
    if any(name is not None and not str(name).isidentifier() for name in names):
        raise ModelUnsafeError(f"{file.name} names a module that is none of mlx-lm's")
    if not dirty:
        return None
    return json.dumps({key: value for key, value in content.items() if key not in _CODE_KEYS})


def _read_header(file: Path) -> tuple[int, int]:
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


def _shown(path: Path) -> str:
    """What a user calls a model: its hub id where the name of its folder is a commit, else that name."""
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.removeprefix("models--").replace("--", "/")
    return path.name


def _template(path: Path) -> str:
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        file = path / name
        if not file.is_file() or file.stat().st_size > MAX_CONFIG_BYTES:
            continue
        if file.suffix == ".jinja":
            return file.read_text(encoding="utf-8", errors="replace")
        content = mapping(_read_json(file))
        if template := content.get("chat_template"):
            return template if isinstance(template, str) else json.dumps(template)
        if content.get("chat_template_type"):
            return str(content["chat_template_type"])
    return ""
