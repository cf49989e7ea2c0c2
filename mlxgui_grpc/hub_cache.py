"""The Hugging Face cache on disk: its layout, our partial files in it, and what is complete.

    <cache>/models--owner--name/
        blobs/<etag>                        content, named by its hash
        snapshots/<commit>/<file>           links into blobs
        refs/<branch or tag>                the commit it names
        .mlxgui/<etag>.part                 ours: a file on its way
        .mlxgui/<etag>.done                 ours: a verified file of an unfinished download
        .mlxgui/<commit>/<file>             ours: the links of a snapshot that is being put in place
        .mlxgui/<commit>.ours               ours: an empty mark of a revision that we downloaded
        .mlxgui/<commit>.superseded         ours: an empty mark of a revision that an update has replaced
    <cache>/.locks/models--owner--name/mlxgui.lock

Nothing but `.mlxgui` is ever incomplete, and no other tool looks there.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlxgui_grpc.failpoints import failpoint
from mlxgui_grpc.hub_files import WEIGHT_SUFFIXES, RepositoryFile

PARTIAL_MAX_AGE_SECONDS = 7 * 24 * 3600.0
"""How long an interrupted download is kept for whoever repeats it."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


class RepositoryBusyError(Exception):
    """Another process downloads into this repository's folder."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One revision of a model, complete on disk.

    `revision` is the commit hash, `path` the folder of links that loaders read, `size_bytes` what its
    files take. `is_ours` says that our download fetched it, so that deleting it is ours too.
    """

    model_id: str
    revision: str
    path: Path
    size_bytes: int
    file_count: int
    is_ours: bool


class RepositoryFolder:
    """One model repository in the cache; all paths of it come from here."""

    def __init__(self, cache_dir: Path, model_id: str) -> None:
        folder = "models--" + model_id.replace("/", "--")
        self.model_id = model_id
        self.path = cache_dir / folder
        self.blobs = self.path / "blobs"
        self.snapshots = self.path / "snapshots"
        self.refs = self.path / "refs"
        self.partials = self.path / ".mlxgui"
        self._lock_path = cache_dir / ".locks" / folder / "mlxgui.lock"

    def part(self, etag: str) -> Path:
        return self.partials / f"{etag}.part"

    def verified(self, etag: str) -> Path:
        return self.partials / f"{etag}.done"

    def staged(self, commit: str) -> Path:
        return self.partials / commit

    def mark_of_ours(self, commit: str) -> Path:
        return self.partials / f"{commit}.ours"

    def mark_of_superseded(self, commit: str) -> Path:
        return self.partials / f"{commit}.superseded"

    @contextlib.contextmanager
    def locked(self, *, wait: bool) -> Iterator[None]:
        """Hold the folder against other downloads, sweeps and deletions, of other servers too.

        The system drops the lock with the process that holds it. Raises RepositoryBusyError when it
        is taken and `wait` is false.
        """
        self._lock_path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock_path.open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RepositoryBusyError(self.model_id) from None
            yield

    def prepare(self) -> None:
        """Make the folders; `snapshots` too, because scans call a repository without it corrupt."""
        for folder in (self.blobs, self.snapshots, self.partials):
            folder.mkdir(parents=True, exist_ok=True)

    def has(self, file: RepositoryFile) -> bool:
        """Whether the content is there already, fetched by us or by another tool."""
        return any(
            path.is_file() and path.stat().st_size == file.size_bytes
            for path in (self.blobs / file.etag, self.verified(file.etag))
        )

    def has_intact(self, file: RepositoryFile) -> bool:
        """`has`, believing the hash and not the size; a damaged file of ours, which may go, goes."""
        verified = self.verified(file.etag)
        if file.is_content_of(verified):
            return True
        # Left there, it would take the place of an intact blob; a damaged blob stays until its successor is here.
        verified.unlink(missing_ok=True)
        return file.is_content_of(self.blobs / file.etag)

    def partial_bytes(self, file: RepositoryFile) -> int:
        """How much of the file an earlier attempt left."""
        try:
            return self.part(file.etag).stat().st_size
        except FileNotFoundError:
            return 0

    def commit(self, commit: str, revision: str, files: list[RepositoryFile], *, is_ours: bool) -> Path:
        """Put verified files in place so that the snapshot appears at once and complete.

        The staged links are written first: they tell a later sweep which blobs an interrupted commit
        moved. Returns the snapshot's folder.
        """
        staged, snapshot = self.staged(commit), self.snapshots / commit
        shutil.rmtree(staged, ignore_errors=True)
        for file in files:
            _link(self.path, staged / file.name, file.etag)
        failpoint("hub.after-staging")
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # Another tool, or an equal file, was first.
                os.replace(self.verified(file.etag), self.blobs / file.etag)
            failpoint("hub.after-blob")
        if is_ours:
            self.mark_of_ours(commit).touch()
        failpoint("hub.before-snapshot")
        try:
            os.rename(staged, snapshot)
        except OSError:
            if not snapshot.is_dir():
                raise
            # Another tool has fetched some files of this commit; add what it left out.
            for file in files:
                if not (snapshot / file.name).exists():
                    _link(self.path, snapshot / file.name, file.etag)
            shutil.rmtree(staged)
        failpoint("hub.after-snapshot")
        if revision != commit:
            ref = self.refs / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.partials / "ref"
            temporary.write_text(commit)
            os.replace(temporary, ref)
        for folder in (self.blobs, self.snapshots):
            _sync_folder(folder)
        failpoint("hub.after-commit")
        return snapshot

    @contextlib.contextmanager
    def hidden(self, commit: str) -> Iterator[Path]:
        """Take a snapshot out of the cache at once, and remove it when the block is done with its blobs.

        Yields the folder that it is moved to: what a kill leaves there is a leftover like that of an interrupted
        download, and never half a snapshot that seems whole.
        """
        staged = self.staged(commit)
        shutil.rmtree(staged, ignore_errors=True)
        os.rename(self.snapshots / commit, staged)
        for mark in (self.mark_of_ours(commit), self.mark_of_superseded(commit)):
            mark.unlink(missing_ok=True)
        yield staged
        shutil.rmtree(staged, ignore_errors=True)

    def find(self, revision: str | None) -> Snapshot | None:
        """The complete snapshot of a branch, tag or commit (default: main, else the newest), if there."""
        for commit in self._candidates(revision):
            if (snapshot := self._snapshot(commit)) is not None:
                return snapshot
        return None

    def sweep(self, older_than_seconds: float) -> int:
        """Remove what an interrupted download left, if untouched that long; bytes freed."""
        leftovers = [
            path
            for path in self.partials.iterdir()
            if path.suffix not in (".ours", ".superseded") or not (self.snapshots / path.stem).exists()
        ]
        newest = max((path.lstat().st_mtime for path in leftovers), default=0.0)
        if time.time() - newest < older_than_seconds:
            return 0
        freed_bytes = 0
        for path in leftovers:
            if path.is_dir():
                freed_bytes += self._remove_unreferenced(path)
                self._remove_dead_refs(path.name)
                shutil.rmtree(path)
            else:
                freed_bytes += path.lstat().st_size
                path.unlink()
        for folder in (self.partials, self.blobs, self.snapshots, self.refs, self.path):
            with contextlib.suppress(OSError):  # Not empty: somebody's files.
                folder.rmdir()
        return freed_bytes

    def _remove_unreferenced(self, staged: Path) -> int:
        """Remove blobs that an interrupted commit moved in place and that no snapshot names."""
        used = {path.resolve() for path in self.snapshots.rglob("*") if path.is_symlink()}
        freed_bytes = 0
        for link in staged.rglob("*"):
            blob = link.resolve()
            if (
                link.is_symlink()
                and blob.is_file()
                and blob.parent == self.blobs.resolve()
                and blob not in used
            ):
                freed_bytes += blob.stat().st_size
                blob.unlink()
        return freed_bytes

    def _remove_dead_refs(self, commit: str) -> None:
        """Remove the names of a commit whose deletion was interrupted."""
        if (self.snapshots / commit).exists():
            return
        for ref in self.refs.rglob("*"):
            if ref.is_file() and ref.read_bytes().strip() == commit.encode():
                ref.unlink()

    def _candidates(self, revision: str | None) -> list[str]:
        if revision is not None and _COMMIT.fullmatch(revision):
            return [revision]
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return [(self.refs / (revision or "main")).read_text().strip()]
        if revision is not None or not self.snapshots.is_dir():
            return []
        folders = sorted(self.snapshots.iterdir(), key=lambda path: path.lstat().st_mtime, reverse=True)
        return [path.name for path in folders]

    def _snapshot(self, commit: str) -> Snapshot | None:
        folder = self.snapshots / commit
        if not _COMMIT.fullmatch(commit) or not is_complete(folder):
            return None
        files = [path for path in folder.rglob("*") if path.is_file()]
        sizes = {path.resolve(): path.stat().st_size for path in files}
        return Snapshot(
            model_id=self.model_id,
            revision=commit,
            path=folder,
            size_bytes=sum(sizes.values()),
            file_count=len(files),
            is_ours=self.mark_of_ours(commit).exists(),
        )


def is_complete(folder: Path) -> bool:
    """Whether a snapshot has its configuration and weights, every shard of its index, and no dead link."""
    if not (folder / "config.json").is_file():
        return False
    paths = [path for path in folder.rglob("*") if not path.is_dir()]
    if any(not path.is_file() for path in paths):
        return False
    if not any(path.suffix in WEIGHT_SUFFIXES for path in paths):
        return False
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            return False
        if not all(isinstance(shard, str) and (folder / shard).is_file() for shard in shards):
            return False
    return True


def cached_models(cache_dir: Path) -> list[Snapshot]:
    """Every model of the cache that is complete, whoever fetched it; reads the disk."""
    folders = sorted(cache_dir.glob("models--*--*"))
    found = (RepositoryFolder(cache_dir, _model_id(folder)).find(None) for folder in folders)
    return [snapshot for snapshot in found if snapshot is not None]


def cache_dir_of(snapshot: Path) -> Path | None:
    """The cache that a snapshot's folder lies in; None for a folder that is laid out otherwise."""
    if snapshot.parent.name != "snapshots" or not snapshot.parents[1].name.startswith("models--"):
        return None
    return snapshot.parents[2]


def superseded_snapshots(cache_dir: Path) -> list[Path]:
    """The folders of revisions that updates have replaced and that wait for their removal; reads the disk."""
    marks = sorted(cache_dir.glob("models--*/.mlxgui/*.superseded"))
    return [mark.parents[1] / "snapshots" / mark.stem for mark in marks]


def model_id_of(snapshot: Path) -> str:
    """The hub id of a snapshot's folder."""
    return _model_id(snapshot.parents[1])


def sweep_partials(
    cache_dir: Path,
    *,
    keep: Collection[str] = (),
    older_than_seconds: float = PARTIAL_MAX_AGE_SECONDS,
) -> int:
    """Remove our leftovers of downloads that nobody repeated; reads the disk, returns the bytes freed.

    Left alone: the models in `keep` (hub ids that will be resumed), what was touched in the last
    `older_than_seconds`, and what another process downloads right now.
    """
    freed_bytes = 0
    for partials in sorted(cache_dir.glob("models--*/.mlxgui")):
        model_id = _model_id(partials.parent)
        if model_id in keep:
            continue
        folder = RepositoryFolder(cache_dir, model_id)
        with contextlib.suppress(RepositoryBusyError), folder.locked(wait=False):
            freed_bytes += folder.sweep(older_than_seconds)
    return freed_bytes


def _model_id(folder: Path) -> str:
    return folder.name.removeprefix("models--").replace("--", "/")


def _link(repository: Path, link: Path, etag: str) -> None:
    """Link to a blob, relatively, as the cache does; a staged link stays right when it is moved."""
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(repository / "blobs" / etag, link.parent))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
