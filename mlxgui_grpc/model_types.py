"""What a model is for, by its config.json. Imports nothing heavy, because the hub's children use it too."""

from collections.abc import Mapping
from typing import Any

from mlxgui_grpc.known_architectures import text_architectures, vision_architectures

SERVED_TYPES = frozenset({"embedding", "reranker", "text", "vision"})
"""Of those that `type_of` knows: what this version serves."""

_VISION_KEYS = ("vision_config", "vision_tower", "mm_vision_tower", "visual")
_VISION_WORDS = ("vision", "vlm", "multimodal", "llava", "qwen2-vl", "idefics", "gemma-3")
"""In the name of a repository (documented): for models whose files do not tell."""
_EMBEDDING_TYPES = frozenset(
    {"bert", "camembert", "distilbert", "modernbert", "mpnet", "new", "nomic_bert", "roberta", "xlm-roberta"}
)

POOLING_SIGNS = frozenset({"1_Pooling", "modules.json", "sentence_bert_config.json"})
"""Files and folders of sentence-transformers: beside a text architecture they make it one for embedding."""


def type_of(architecture: str, config: Mapping[str, Any], *, has_pooling: bool, repository: str = "") -> str:
    """text, vision, embedding, reranker, classification or transcription.

    `architecture` is the `model_type` of the config, `has_pooling` says whether there is one of `POOLING_SIGNS`,
    `repository` is the hub id, which decides only where the files leave it open.
    """
    if architecture == "whisper" or "n_mels" in config or "preprocessor" in config:
        return "transcription"
    # Conversions that leave the tower out set its config to null.
    if any(config.get(key) is not None for key in _VISION_KEYS) and architecture:
        return "vision"
    if any(name.endswith("ForSequenceClassification") for name in _class_names(config)):
        return "reranker" if _label_count(config) == 1 else "classification"
    if architecture in _EMBEDDING_TYPES or has_pooling:
        return "embedding"
    # Conversions leave the files of sentence-transformers behind.
    name = repository.rpartition("/")[2].lower()
    if "embedding" in name:
        return "embedding"
    if architecture not in text_architectures() and (
        architecture in vision_architectures() or any(word in name for word in _VISION_WORDS)
    ):
        return "vision"
    return "text"


def _class_names(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _label_count(config: Mapping[str, Any]) -> int:
    """Outputs of a classifier; transformers leaves out the number where it is 2."""
    labels = config.get("id2label")
    if isinstance(labels, dict):
        return len(labels)
    count = config.get("num_labels")
    return count if isinstance(count, int) else 2
