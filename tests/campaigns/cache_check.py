"""What must be true of a model's files in the cache at every moment: whole by hash, or not there for anybody."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from mlxgui_grpc.hub_cache import RepositoryFolder, is_complete


def check_repository(folder: RepositoryFolder, commits: Mapping[str, Mapping[str, bytes]]) -> list[str]:
    """The snapshots that are there: with every file, each as the hub has it. Nothing else may seem to be one.

    `commits` are the contents of files by commit.
    """
    for blob in _entries(folder.blobs):
        assert blob.name in _names_of(blob.read_bytes()), f"{blob} is not what it is named for"
    whole = [snapshot for snapshot in _entries(folder.snapshots) if is_complete(snapshot)]
    for snapshot in whole:
        for name, content in commits[snapshot.name].items():
            assert (snapshot / name).is_file(), f"{snapshot / name} is not there"
            assert (snapshot / name).read_bytes() == content, f"{snapshot / name} is damaged"
    return [snapshot.name for snapshot in whole]


def leftovers(folder: RepositoryFolder) -> list[str]:
    """What interrupted downloads and deletions have left in our partial area."""
    return sorted(path.name for path in _entries(folder.partials) if path.suffix != ".ours")


def orphans(folder: RepositoryFolder) -> list[str]:
    """Contents that no snapshot names, and snapshots that are not whole."""
    used = {path.resolve() for path in folder.snapshots.rglob("*")}
    blobs = [blob.name for blob in _entries(folder.blobs) if blob.resolve() not in used]
    return blobs + [snapshot.name for snapshot in _entries(folder.snapshots) if not is_complete(snapshot)]


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def all_files(folder: Path) -> list[str]:
    """Everything below a folder, by name."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _names_of(content: bytes) -> tuple[str, str]:
    """The names that the cache may give that content."""
    git = hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False)
    return hashlib.sha256(content).hexdigest(), git.hexdigest()
