"""Which loader loads a model that generates, by its kind; mlx-vlm is imported only where a vision model is loaded."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.backends.text import TextModel, Tokens, load_text_model, load_tokens
from mlxgui_grpc.engine.death import speaks_of_memory
from mlxgui_grpc.errors import ModelLoadFailedError, ModelUnsafeError
from mlxgui_grpc.known_architectures import text_architectures

if TYPE_CHECKING:
    from mlxgui_grpc.engine.vision_prompts import VisionPrompts


def load_tokenizer(view: Path, kind: frames.ModelKind) -> "tuple[Tokens, VisionPrompts | None]":
    """Load what counting the tokens of a prompt takes."""
    if kind != "vision":
        return load_tokens(view), None
    from mlxgui_grpc.engine.backends.vision import load_vision_tokens

    try:
        return load_vision_tokens(view)
    except ModelUnsafeError:
        raise
    except Exception:
        return load_tokens(view), None


def _load_vision(view: Path) -> TextModel:
    """A vision model; where mlx-vlm cannot load it and mlx-lm can, the text model that is in it."""
    try:
        from mlxgui_grpc.engine.backends.vision import load_vision_model

        return load_vision_model(view)
    except (MemoryError, ModelUnsafeError):
        raise
    except Exception as error:  # mlx-vlm raises what the files make it raise.
        architecture = json.loads((view / "config.json").read_text()).get("model_type")
        if speaks_of_memory(str(error)) or architecture not in text_architectures():
            raise
        reason = _first_line(error)
    # Not before the exception is gone, and with it what its frames hold of the weights.
    print(f"mlx-vlm cannot load this checkpoint: {reason}", file=sys.stderr, flush=True)
    try:
        model = load_text_model(view)
    except Exception as error:
        if speaks_of_memory(str(error)):
            raise
        raise ModelLoadFailedError(
            f"mlx-vlm cannot load this checkpoint ({reason}), nor can mlx-lm ({_first_line(error)})"
        ) from error
    note = f"mlx-vlm cannot load this checkpoint ({reason}), so mlx-lm serves it, for text only; images are left out."
    return replace(model, notes=(*model.notes, note), warnings=(note,))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


LOADERS: dict[frames.ModelKind, Callable[[Path], TextModel]] = {
    "text": load_text_model,
    "vision": _load_vision,
}
