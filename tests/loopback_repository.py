"""What the stand-in for the model hub has: repositories with commits, and the words its API has for them."""

import base64
import binascii
import hashlib
import json
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

LARGE_SUFFIXES = frozenset(
    {".bin", ".gguf", ".model", ".npz", ".onnx", ".pkl", ".pt", ".pth", ".safetensors"}
)

_EPOCH = datetime(2025, 1, 1, tzinfo=UTC)

# What a list has of each repository unless the request names other properties.
_BRIEF = ("createdAt", "downloads", "library_name", "likes", "pipeline_tag", "private", "tags")
_FULL = ("author", "gated", "lastModified", "sha", "siblings")
_ALWAYS = ("_id", "id", "modelId")


@dataclass(slots=True)
class HubFile:
    """One file of a commit. `size_bytes` and hashes are what the hub announces, which may be a lie."""

    name: str
    content: bytes | Path
    size_bytes: int
    git_blob: str
    sha256: str | None

    @property
    def etag(self) -> str:
        return self.sha256 or self.git_blob

    def read(self, start: int, byte_count: int) -> bytes:
        if isinstance(self.content, bytes):
            return self.content[start : start + byte_count]
        with self.content.open("rb") as stream:
            stream.seek(start)
            return stream.read(byte_count)

    def stored_bytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(slots=True)
class Repository:
    """A model repository: commits by hash, branches and tags by name, and what its page says."""

    model_id: str
    created: datetime
    gated: bool = False
    private: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    commits: dict[str, dict[str, HubFile]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    @classmethod
    def new(cls, model_id: str, number: int) -> "Repository":
        """The repository that was made so many days after the first."""
        return cls(model_id, _EPOCH + timedelta(days=number))

    def publish(self, files: Mapping[str, HubFile], branch: str, facts: Mapping[str, Any]) -> str:
        """Make a commit the head of a branch; its hash."""
        listing = json.dumps([[file.name, file.etag, file.size_bytes] for file in files.values()])
        name = f"{self.model_id} {branch} {listing}"
        commit = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[branch] = commit
        updated = self.created + timedelta(hours=len(self.commits) - 1)
        self.facts = {
            "createdAt": _instant(self.created),
            "lastModified": _instant(updated),
            **_facts_of(files),
            **facts,
        }
        return commit

    def described(self, commit: str) -> dict[str, Any]:
        """Everything that the hub says of it but the sizes of its files."""
        return {
            "_id": hashlib.sha1(self.model_id.encode(), usedforsecurity=False).hexdigest()[:24],
            "id": self.model_id,
            "modelId": self.model_id,
            "author": self.model_id.split("/")[0],
            "sha": commit,
            "gated": "manual" if self.gated else False,
            "private": self.private,
            "disabled": False,
            **self.facts,
            "siblings": [sibling(file, has_blobs=False) for file in self.commits[commit].values()],
        }

    def listed(self, query: Mapping[str, list[str]]) -> dict[str, Any]:
        """What a list has of it: some properties, or those that the request names."""
        whole = self.described(self.refs.get("main") or next(iter(self.refs.values())))
        names = query.get("expand") or [*_BRIEF, *(_FULL if "full" in query else ())]
        names = [*_ALWAYS, *names, *(name for name in ("config", "cardData") if name in query)]
        return {name: whole[name] for name in names if name in whole}

    def matches(self, query: Mapping[str, list[str]]) -> bool:
        """Whether a list that is asked for so has it."""
        words = " ".join(query.get("search", [])).lower().split()
        tags = _comma_separated([*query.get("filter", []), *query.get("pipeline_tag", [])])
        author = query.get("author", [""])[0]
        return (
            not self.private
            and all(word in self.model_id.lower() for word in words)
            and all(tag in self.facts["tags"] for tag in tags)
            and (not author or self.model_id.split("/")[0] == author)
        )


def page_of(
    repositories: Sequence[Repository], query: Mapping[str, list[str]]
) -> tuple[list[Repository], str]:
    """The page that the request asks for, and the cursor of the next; empty: there is none.

    As on the real hub a cursor is the place behind the last model of its page, whatever comes or goes before it.
    """
    sort = query.get("sort", ["createdAt"])[0]
    limit = int(query.get("limit", ["1000"])[0])

    def place(repository: Repository) -> tuple[Any, str]:
        return repository.facts.get(sort) or 0, repository.model_id

    ordered = sorted(repositories, key=place, reverse=True)
    if cursor := query.get("cursor", [""])[0]:
        try:
            value, model_id = json.loads(base64.b64decode(cursor))
        except (ValueError, binascii.Error):
            return [], ""
        ordered = [repository for repository in ordered if place(repository) < (value, model_id)]
    page = ordered[:limit]
    if len(ordered) <= limit or not page:
        return page, ""
    return page, base64.b64encode(json.dumps(place(page[-1])).encode()).decode()


def files_of(source: Path | Mapping[str, bytes]) -> Iterator[HubFile]:
    contents: Mapping[str, bytes | Path]
    if isinstance(source, Path):
        contents = {
            path.relative_to(source).as_posix(): path for path in sorted(source.rglob("*")) if path.is_file()
        }
    else:
        contents = source
    for name, content in contents.items():
        size_bytes = len(content) if isinstance(content, bytes) else content.stat().st_size
        git_blob = hashlib.sha1(f"blob {size_bytes}\0".encode(), usedforsecurity=False)
        sha256 = hashlib.sha256()
        file = HubFile(name, content, size_bytes, "", None)
        for start in range(0, size_bytes, 1024 * 1024):
            chunk = file.read(start, 1024 * 1024)
            git_blob.update(chunk)
            sha256.update(chunk)
        file.git_blob = git_blob.hexdigest()
        if Path(name).suffix in LARGE_SUFFIXES or size_bytes > 10_000_000:
            file.sha256 = sha256.hexdigest()
        yield file


def _facts_of(files: Mapping[str, HubFile]) -> dict[str, Any]:
    """What the hub finds out from the files: counts of tensors' elements, and a digest of config.json."""
    facts: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    for file in files.values():
        if "/" not in file.name and file.name.endswith(".safetensors"):
            counts += _element_counts(file)
    if counts:
        facts["safetensors"] = {"parameters": dict(counts), "total": counts.total()}
    if (config := files.get("config.json")) is not None and config.size_bytes < 1_000_000:
        facts |= _config_digest(config.read(0, config.size_bytes))
    return facts


def _element_counts(file: HubFile) -> Counter[str]:
    """Elements by type, of the header of a safetensors file; none of a file that is no such."""
    counts: Counter[str] = Counter()
    start = file.read(0, 8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    try:
        header = json.loads(file.read(8, length)) if 0 < length < 10_000_000 else {}
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for side in tensor["shape"]:
                    size *= side
                counts[tensor["dtype"]] += size
    except (ValueError, KeyError, TypeError, AttributeError):
        return Counter()
    return counts


def _config_digest(content: bytes) -> dict[str, Any]:
    """`config` of the hub's answers: far from all of config.json."""
    try:
        config = json.loads(content)
        names = ("architectures", "model_type", "quantization_config")
        return {"config": {name: config[name] for name in names if name in config}}
    except (ValueError, TypeError, RecursionError):
        return {}


def _comma_separated(values: Sequence[str]) -> Iterator[str]:
    for value in values:
        yield from (part for part in value.split(",") if part)


def _instant(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", ".000Z")


def sibling(file: HubFile, *, has_blobs: bool) -> dict[str, Any]:
    """A file as a description lists it, with size and hashes or without."""
    answer: dict[str, Any] = {"rfilename": file.name}
    if has_blobs:
        answer |= {"blobId": file.git_blob, "size": file.size_bytes, **_large_file(file, "sha256")}
    return answer


def entry(file: HubFile) -> dict[str, Any]:
    """A file as a tree lists it."""
    return {
        "type": "file",
        "path": file.name,
        "oid": file.git_blob,
        "size": file.size_bytes,
        **_large_file(file, "oid"),
    }


def _large_file(file: HubFile, hash_name: str) -> dict[str, Any]:
    if file.sha256 is None:
        return {}
    return {"lfs": {hash_name: file.sha256, "size": file.size_bytes, "pointerSize": 134}}


def tree(files: Mapping[str, HubFile], folder: str, *, is_recursive: bool) -> list[dict[str, Any]]:
    """What lies in a folder, or anywhere below it."""
    prefix = f"{folder}/" if folder else ""
    entries: list[dict[str, Any]] = []
    folders: set[str] = set()
    for name, file in files.items():
        below = name.removeprefix(prefix)
        if not name.startswith(prefix):
            continue
        if is_recursive or "/" not in below:
            entries.append(entry(file))
        parents = below.split("/")[:-1]
        depth = len(parents) if is_recursive else min(1, len(parents))
        folders |= {prefix + "/".join(parents[: level + 1]) for level in range(depth)}
    for path in sorted(folders):
        oid = hashlib.sha1(path.encode(), usedforsecurity=False).hexdigest()
        entries.append({"type": "directory", "path": path, "oid": oid, "size": 0})
    return entries
