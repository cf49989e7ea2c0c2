"""The view of a model directory: a folder of links to the files that are only data, all that a loader sees of it.

JSON files that name code are copied, without those names.
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from mlxgui_grpc import encoders
from mlxgui_grpc.checkpoint import read_config, read_header, read_json, refuse_code, shown
from mlxgui_grpc.errors import ModelUnsafeError

DATA_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".npz"})
"""What a view may hold; Python files and pickles are left out of it, whatever they are called otherwise."""
_CODE_KEYS = ("auto_map", "custom_pipelines")


def make_view(path: Path, view: Path) -> Path:
    """Build, anew, the folder that a loader sees of the model in `path`; returns it."""
    refuse_code(read_config(path))
    roots = _allowed_roots(path)
    if view.exists():
        shutil.rmtree(view)
    view.mkdir(parents=True, mode=0o700)
    for file in (*sorted(path.iterdir()), path / encoders.POOLING_FILE):
        if file.suffix not in DATA_SUFFIXES or not file.is_file():
            continue
        target = file.resolve()
        if not any(target.is_relative_to(root) for root in roots):
            raise ModelUnsafeError(
                f"{shown(path)}/{file.relative_to(path)} links to a place outside of the model"
            )
        if file.parent != path:
            (view / file.parent.name).mkdir(mode=0o700)
            (view / file.parent.name / file.name).symlink_to(target)
            continue
        if cleaned := _cleaned_json(file):
            (view / file.name).write_text(cleaned)
        elif file.suffix == ".safetensors":
            read_header(file)
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


def _cleaned_json(file: Path) -> str | None:
    """The text of a JSON file without what names code, or None where there is nothing to clean."""
    if file.suffix != ".json" or file.name in {
        "tokenizer.json",
        "vocab.json",
        "model.safetensors.index.json",
    }:
        return None
    content = read_json(file)
    if not isinstance(content, dict):
        return None
    # mlx-lm imports modules of its own package by these two names.
    names = [content.get(key) for key in ("chat_template_type", "tool_parser_type")]
    if any(name is not None and not str(name).isidentifier() for name in names):
        raise ModelUnsafeError(f"{file.name} names a module that is none of mlx-lm's")
    cleaned = _without_code(content)
    return None if cleaned == content else json.dumps(cleaned)


def _without_code(value: Any) -> Any:
    """JSON without the keys that name code, at any depth: processors keep the settings of their parts in themselves."""
    if isinstance(value, dict):
        return {key: _without_code(inner) for key, inner in value.items() if key not in _CODE_KEYS}
    if isinstance(value, list):
        return [_without_code(inner) for inner in value]
    return value
