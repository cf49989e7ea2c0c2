"""What must be true of a model's files in the cache at every moment: whole by hash, or not there for anybody."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from mlxgui_grpc.hub_cache import RepositoryFolder
from tests.loopback_hub import LoopbackHub


def published(hub: LoopbackHub, model_id: str, names: list[str]) -> dict[str, bytes]:
    """Files of a repository, as the hub has them."""
    files = [hub.file(model_id, name) for name in names]
    return {file.name: file.read(0, file.stored_bytes()) for file in files}


def check_repository(folder: RepositoryFolder, contents: Mapping[str, bytes]) -> bool:
    """Whether the snapshot is there: with every file, each as the hub has it. Nothing may seem to be one."""
    for blob in folder.blobs.iterdir() if folder.blobs.is_dir() else ():
        assert blob.name in _names_of(blob.read_bytes()), f"{blob} is not what it is named for"
    if folder.find(None) is None:
        return False
    for snapshot in folder.snapshots.iterdir():
        for name, content in contents.items():
            assert (snapshot / name).is_file(), f"{snapshot / name} is not there"
            assert (snapshot / name).read_bytes() == content, f"{snapshot / name} is damaged"
    return True


def leftovers(folder: RepositoryFolder) -> list[str]:
    """What interrupted downloads and deletions have left in our partial area."""
    if not folder.partials.is_dir():
        return []
    return sorted(path.name for path in folder.partials.iterdir() if path.suffix != ".ours")


def all_files(folder: Path) -> list[str]:
    """Everything below a folder, by name."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _names_of(content: bytes) -> tuple[str, str]:
    """The names that the cache may give that content."""
    git = hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False)
    return hashlib.sha256(content).hexdigest(), git.hexdigest()
