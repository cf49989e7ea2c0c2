"""Which files of a hub repository are fetched, and which repositories are refused for their file names."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mlxgui_grpc.hub_frames import JobError

WEIGHT_SUFFIXES = frozenset({".safetensors", ".npz"})
TEXT_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken"})
PROSE_NAMES = frozenset({"license", "notice"})
FOREIGN_FOLDERS = frozenset({"coreml", "flax", "gguf", "metal", "onnx", "openvino", "original", "pytorch"})
"""Folders that hold the same weights once more, for other programs."""

MAX_FILE_COUNT = 4096
MAX_NAME_CHARACTERS = 512
MAX_PART_BYTES = 255
"""The longest name of one file or folder on the file systems of macOS and Linux."""
MAX_TEXT_FILE_BYTES = 256 * 1024 * 1024
"""Tokenizers of large vocabularies reach 35 MB; a larger text file is an attack on who parses it."""
MAX_WEIGHT_FILE_BYTES = 50 * 1000**3
"""huggingface_hub refuses a larger file over plain HTTP."""

_GIT_BLOB = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class RepositoryFile:
    """A file to fetch: its path in the repository, and the size and hash that the hub announces.

    `etag` is what the cache names the content by: the SHA-256 of a large file, or the SHA-1 of a small
    file's git blob.
    """

    name: str
    size_bytes: int
    etag: str

    def new_hash(self) -> "hashlib._Hash":
        """The hash, of nothing yet, whose hexdigest of the content is the etag."""
        if len(self.etag) == 64:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.size_bytes}\0".encode(), usedforsecurity=False)

    def is_content_of(self, path: Path) -> bool:
        """Whether that file is there and has this size and hash; reads all of it."""
        if not path.is_file() or path.stat().st_size != self.size_bytes:
            return False
        digest = self.new_hash()
        with path.open("rb") as content:
            while chunk := content.read(1024 * 1024):
                digest.update(chunk)
        return digest.hexdigest() == self.etag


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file as the hub's answer lists it; nothing in it is to be trusted."""

    name: str
    size_bytes: int | None
    git_blob: str | None
    sha256: str | None


def select_files(model_id: str, listed: Iterable[ListedFile]) -> list[RepositoryFile]:
    """The files to fetch, small ones first.

    Raises JobError: MODEL_UNSAFE for a name that could leave the folder, MODEL_INCOMPATIBLE for a
    repository without weights in a format that runs no code, HUB_UNAVAILABLE for a listing that makes
    no sense.
    """
    every = list(listed)
    for file in every:
        _check_name(model_id, file.name)
    chosen = [_checked(model_id, file) for file in every if is_wanted(file.name)]
    names = {file.name for file in chosen}
    if not any(PurePosixPath(name).suffix in WEIGHT_SUFFIXES for name in names):
        raise _no_weights(model_id, every)
    if "config.json" not in names:
        raise JobError(
            "MODEL_INCOMPATIBLE",
            f"Repository '{model_id}' has no config.json; choose a repository of MLX or safetensors weights.",
            model_id=model_id,
        )
    if len(chosen) > MAX_FILE_COUNT:
        raise JobError(
            "MODEL_UNSAFE",
            f"Repository '{model_id}' has {len(chosen)} files; more than {MAX_FILE_COUNT} are refused.",
            model_id=model_id,
        )
    _check_collisions(model_id, names)
    return sorted(chosen, key=lambda file: (file.size_bytes, file.name))


def is_wanted(name: str) -> bool:
    """Whether a file is on the allow-list: weights, texts and the licence; no code, no pickles."""
    path = PurePosixPath(name)
    if any(part.startswith(".") for part in path.parts):
        return False
    if path.parent.parts and path.parts[0].lower() in FOREIGN_FOLDERS:
        return False
    if path.suffix in WEIGHT_SUFFIXES or path.suffix in TEXT_SUFFIXES:
        return True
    return len(path.parts) == 1 and (path.suffix == ".md" or name.lower() in PROSE_NAMES)


def _check_name(model_id: str, name: str) -> None:
    parts = name.split("/")
    rule = ""
    if any(part in ("", ".", "..") for part in parts):
        rule = "leaves the repository's folder"
    elif "\\" in name or re.match(r"[A-Za-z]:", name):
        rule = "is a path of another system"
    elif not name.isprintable():
        rule = "has control characters"
    elif len(name) > MAX_NAME_CHARACTERS or any(
        len(part.encode("utf-8", "replace")) > MAX_PART_BYTES for part in parts
    ):
        rule = "is too long"
    if rule:
        # The name itself is the hub's text: shown escaped and cut.
        shown = name[:80].encode("unicode_escape").decode()
        raise JobError(
            "MODEL_UNSAFE",
            f"Repository '{model_id}' is refused: the file name '{shown}' {rule}.",
            model_id=model_id,
            file=shown,
        )


def _checked(model_id: str, file: ListedFile) -> RepositoryFile:
    etag = file.sha256 or file.git_blob or ""
    pattern = _SHA256 if file.sha256 else _GIT_BLOB
    if file.size_bytes is None or file.size_bytes < 0 or not pattern.fullmatch(etag):
        raise JobError(
            "HUB_UNAVAILABLE",
            f"The hub lists '{file.name}' of '{model_id}' without a size and a hash; try again later.",
            model_id=model_id,
            file=file.name,
        )
    is_weights = PurePosixPath(file.name).suffix in WEIGHT_SUFFIXES
    if not is_weights and file.size_bytes > MAX_TEXT_FILE_BYTES:
        raise JobError(
            "MODEL_UNSAFE",
            f"Repository '{model_id}' is refused: '{file.name}' claims {file.size_bytes} bytes, which no "
            "configuration has.",
            model_id=model_id,
            file=file.name,
        )
    return RepositoryFile(file.name, file.size_bytes, etag)


def _check_collisions(model_id: str, names: set[str]) -> None:
    """Refuse names that are one name on a file system that ignores case, or a file and a folder at once."""
    seen: dict[str, str] = {}
    folders = {str(parent).casefold() for name in names for parent in PurePosixPath(name).parents}
    for name in names:
        folded = name.casefold()
        if folded in seen or folded in folders:
            raise JobError(
                "MODEL_UNSAFE",
                f"Repository '{model_id}' is refused: '{name}' and another file would have the same path.",
                model_id=model_id,
                file=name,
            )
        seen[folded] = name


def _no_weights(model_id: str, listed: list[ListedFile]) -> JobError:
    foreign = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack", ".onnx", ".nemo"}
    kinds = sorted({PurePosixPath(file.name).suffix for file in listed} & foreign)
    found = f" (only {', '.join(kinds)})" if kinds else ""
    return JobError(
        "MODEL_INCOMPATIBLE",
        f"Repository '{model_id}' has no *.safetensors or *.npz weights{found}; choose an MLX version of it.",
        model_id=model_id,
    )
