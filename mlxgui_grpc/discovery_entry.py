"""What the hub's facts mean here: what a repository is for, what it takes, and whether this machine can run it."""

import re
from dataclasses import dataclass

from mlxgui_grpc.hub_frames import Repository
from mlxgui_grpc.memory import estimate, gigabytes_text, insufficient_memory_text
from mlxgui_grpc.model_types import SERVED_TYPES

MLX = "mlx"

NO_MLX_HARDWARE = "❌ MLX requires Apple Silicon (M1/M2/M3) hardware"
"""The document's sentence."""

# The words of the REST API for the hub's tasks; a task that is none of them is its own word.
_TYPES = {
    "text-generation": "text",
    "text2text-generation": "text",
    "image-text-to-text": "vision",
    "image-to-text": "vision",
    "visual-question-answering": "vision",
    "any-to-any": "multimodal",
    "automatic-speech-recognition": "audio",
    "audio-text-to-text": "audio",
    "audio-to-audio": "audio",
    "text-to-audio": "audio",
    "text-to-speech": "audio",
    "feature-extraction": "feature-extraction",
    "sentence-similarity": "feature-extraction",
}
# The words of `model_types` for those above, where they differ; a task of audio has one of two.
_KINDS = {"feature-extraction": "embedding", "multimodal": "vision", "text-ranking": "reranker"}
_QUANTIZATION = re.compile(r"[-_](mlx[-_])?(q?\d+bit|mxfp4|nvfp4|bf16|fp16|q\d+|dwq|mlx)\b.*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a model can run on this machine; None: not known."""

    is_compatible: bool | None
    message: str


def model_type(repository: Repository) -> str:
    """`text`, `vision`, `multimodal`, `audio`, `feature-extraction` or another task; empty: the hub does not say."""
    if repository.pipeline_tag:
        return _TYPES.get(repository.pipeline_tag, repository.pipeline_tag)
    return next((_TYPES[tag] for tag in repository.tags if tag in _TYPES), "")


def size_bytes(repository: Repository) -> int | None:
    """Bytes of the weights: by their tensors, else by their files; None: the hub tells neither."""
    return repository.tensor_bytes if repository.tensor_bytes is not None else repository.weight_file_bytes


def estimated_memory_bytes(repository: Repository, process_bytes: int) -> int | None:
    """What a load would take, by the same arithmetic as for an installed model; None: the size is not known.

    The KV cache is counted where the hub tells the model's dimensions, which a search does not. `process_bytes`: what
    a worker takes without a model.
    """
    size = size_bytes(repository)
    if size is None:
        return None
    return estimate(
        size,
        repository.kv_bytes_per_token,
        context_length=repository.context_length,
        process_bytes=process_bytes,
    ).required_bytes


def is_mlx(repository: Repository) -> bool:
    """The repository says that it is made for MLX."""
    return MLX in repository.tags or repository.library_name == MLX


def is_loadable(repository: Repository, architectures: frozenset[str]) -> bool:
    """MLX loads it as it is: made for MLX, or plain safetensors of an architecture that is built in.

    `architectures` are those of text models: of one that is made for MLX it must be too, as far as the hub tells.
    """
    if is_mlx(repository):
        return kind(repository) not in ("", "text") or not _foreign_architecture(repository, architectures)
    is_plain = repository.has_safetensors and not repository.quantization_method
    return is_plain and repository.architecture in architectures


def kind(repository: Repository) -> str:
    """The word of `model_types`, or that of a task which has none there; empty: the hub does not say."""
    word = model_type(repository)
    task = _KINDS.get(word, word)
    # The tags of a model that only was made from one for vision are often those of that one.
    return repository.type if repository.type and task in ("", "text", "vision") else task


def not_served(repository: Repository, architectures: frozenset[str]) -> str:
    """Why this version cannot serve it, as a sentence; empty: it can, as far as the hub tells."""
    word = kind(repository)
    if word and word not in SERVED_TYPES:
        return f"❌ This version does not serve {word} models"
    if _foreign_architecture(repository, architectures):
        return f"❌ This version does not serve {repository.architecture or 'such'} models"
    return ""


def _foreign_architecture(repository: Repository, architectures: frozenset[str]) -> bool:
    """It has another one; or none, where its config.json was read."""
    is_known = bool(repository.architecture or repository.type)
    return is_known and repository.architecture not in architectures


def description(repository: Repository) -> str:
    """What the card says, else a sentence of what the facts do; empty: they say nothing."""
    if repository.card_description:
        return repository.card_description
    name = repository.id.rpartition("/")[2]
    base = repository.base_model.rpartition("/")[2] or _QUANTIZATION.sub("", name)
    words = " ".join(re.split(r"[-_]+", base))
    suffix = " with MLX" if is_mlx(repository) else ""
    if repository.quantization_bits:
        return f"{words} quantized to {repository.quantization_bits}-bit{suffix}"
    if suffix:
        return f"{words} converted to run{suffix}"
    task = repository.pipeline_tag.replace("-", " ")
    if not (repository.architecture or task):
        return ""
    kind = f"{repository.architecture} model".strip()
    return f"{words}: {kind} for {task}" if task else f"{words}: {kind}"


def fit(
    repository: Repository,
    *,
    is_loadable: bool,
    refusal: str = "",
    required_bytes: int | None,
    available_bytes: int,
    hardware_error: str = "",
) -> Fit:
    """Whether this machine can run it, in the document's sentences; `refusal`: why this version does not serve
    it, `hardware_error`: why MLX does not run here."""
    if hardware_error:
        return Fit(False, NO_MLX_HARDWARE)
    if refusal and (is_loadable or is_mlx(repository)):
        return Fit(False, refusal)
    if not is_loadable:
        way_out = (
            f"install {repository.mlx_repository} instead"
            if repository.mlx_repository
            else "the hub has no MLX version of it"
        )
        return Fit(False, f"❌ Not in a form that MLX loads - {way_out}")
    if required_bytes is None:
        return Fit(
            None, f"Unknown - {gigabytes_text(available_bytes)} available, the hub does not tell the size"
        )
    if required_bytes > available_bytes:
        return Fit(False, insufficient_memory_text(required_bytes, available_bytes))
    return Fit(
        True,
        f"✅ Compatible - {gigabytes_text(available_bytes)} available, {gigabytes_text(required_bytes)} required",
    )
