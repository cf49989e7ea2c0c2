"""What a model is for, by its config.json. Imports nothing, because the hub's children use it too."""

from collections.abc import Mapping
from typing import Any

SERVED_TYPES = frozenset({"text"})
"""Of those that `type_of` knows: what this version serves."""

_VISION_KEYS = ("vision_config", "vision_tower", "mm_vision_tower", "visual")
_EMBEDDING_TYPES = frozenset({"bert", "roberta", "xlm-roberta", "modernbert", "nomic_bert", "new"})


def type_of(architecture: str, config: Mapping[str, Any], *, has_pooling: bool) -> str:
    """text, vision, embedding or transcription; `architecture` is the `model_type` of the config, `has_pooling` says
    whether there is a folder `1_Pooling`."""
    if architecture == "whisper" or "n_mels" in config or "preprocessor" in config:
        return "transcription"
    if any(key in config for key in _VISION_KEYS) and architecture:
        return "vision"
    if architecture in _EMBEDDING_TYPES or has_pooling:
        return "embedding"
    return "text"
