"""A stand-in for the model hub on loopback: enough of its HTTP API for the real huggingface_hub client.

In a test:

    with LoopbackHub() as hub:
        hub.add("owner/name", directory)
        ... HF_ENDPOINT=hub.endpoint ...

By hand: `python -m tests.loopback_hub --add DIRECTORY as owner/name`, or `make hub`.

As on the real hub, large files are stored by SHA-256 and served by redirect from another host (here:
another port), which must never see a token.
"""

import argparse
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE_SUFFIXES = frozenset(
    {".bin", ".gguf", ".model", ".npz", ".onnx", ".pkl", ".pt", ".pth", ".safetensors"}
)
TOKEN = "hf_loopback"
"""The token that opens gated and private repositories here."""

_SEND_BYTES = 16 * 1024
_EPOCH = datetime(2025, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it arrived: `host` is hub or cdn, `file` the repository's path of a resolve."""

    host: str
    method: str
    path: str
    file: str
    range_start: int | None
    is_authorized: bool


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
    gated: bool
    private: bool
    facts: dict[str, Any]
    commits: dict[str, dict[str, HubFile]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)


class Hold:
    """Stops a file after some bytes until released, so that a test can act in the middle of it."""

    def __init__(self, after_bytes: int) -> None:
        self.after_bytes = after_bytes
        self.reached = threading.Event()
        self._released = threading.Event()

    def release(self) -> None:
        self._released.set()

    def wait(self) -> None:
        self.reached.set()
        self._released.wait()


@dataclass(slots=True)
class _Failure:
    prefix: str
    status: int
    headers: Mapping[str, str]
    times: int | None


class LoopbackHub:
    """Two HTTP servers on loopback, hub and file host, with switches for what goes wrong out there.

    Switches may be set while requests run. `throttle_bytes_per_second` limits each file's rate;
    `has_ranges` off answers a Range with the whole file.
    """

    def __init__(self, port: int = 0) -> None:
        self.requests: list[Request] = []
        self.throttle_bytes_per_second: int | None = None
        self.has_ranges = True
        self._repositories: dict[str, Repository] = {}
        self._cuts: dict[str, list[int]] = {}
        self._holds: dict[str, Hold] = {}
        self._failures: list[_Failure] = []
        self._lock = threading.Lock()
        self._hub = _Server(self, "hub", port)
        self._cdn = _Server(self, "cdn", 0)

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT has to be."""
        return f"http://127.0.0.1:{self._hub.server_port}"

    @property
    def cdn_endpoint(self) -> str:
        return f"http://127.0.0.1:{self._cdn.server_port}"

    def __enter__(self) -> "LoopbackHub":
        for server in (self._hub, self._cdn):
            # A short poll: closing waits for it.
            threading.Thread(target=server.serve_forever, args=(0.02,), name=server.host, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop answering; connecting is refused from now on."""
        for hold in self._holds.values():
            hold.release()
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()

    def add(
        self,
        model_id: str,
        source: Path | Mapping[str, bytes],
        *,
        branch: str = "main",
        gated: bool = False,
        private: bool = False,
        pipeline_tag: str = "text-generation",
        tags: Sequence[str] = ("mlx", "safetensors"),
        downloads: int = 0,
        likes: int = 0,
        **facts: Any,
    ) -> str:
        """Publish a directory, or names with contents, as a new commit of a branch; its hash.

        Names are taken as they are, evil ones too. More `facts` go into the model's description.
        """
        files = {file.name: file for file in _files(source)}
        listing = json.dumps([[file.name, file.etag, file.size_bytes] for file in files.values()])
        commit = hashlib.sha1(f"{model_id} {branch} {listing}".encode(), usedforsecurity=False).hexdigest()
        with self._lock:
            created = _EPOCH + timedelta(days=len(self._repositories))
            repository = self._repositories.setdefault(model_id, Repository(model_id, gated, private, {}))
            repository.gated, repository.private = gated, private
            repository.facts = {
                "downloads": downloads,
                "likes": likes,
                "pipeline_tag": pipeline_tag,
                "library_name": "mlx",
                "tags": [*tags, pipeline_tag],
                "createdAt": created.isoformat().replace("+00:00", ".000Z"),
                "lastModified": created.isoformat().replace("+00:00", ".000Z"),
                **facts,
            }
            repository.commits[commit] = files
            repository.refs[branch] = commit
        return commit

    def file(self, model_id: str, name: str, *, branch: str = "main") -> HubFile:
        """The published file, to make its announced size or hash, or its content, a lie."""
        repository = self._repositories[model_id]
        return repository.commits[repository.refs[branch]][name]

    def corrupt(self, model_id: str, name: str) -> None:
        """Serve other bytes of the same length than the hash promises."""
        file = self.file(model_id, name)
        file.content = bytes(byte ^ 0x55 for byte in file.read(0, file.stored_bytes()))

    def cut(self, name: str, after_bytes: int, *, times: int = 1) -> None:
        """Break the connection after some bytes of a file, the next `times` times."""
        with self._lock:
            self._cuts.setdefault(name, []).extend([after_bytes] * times)

    def hold(self, name: str, after_bytes: int) -> Hold:
        """Stop the next answer with a file after some bytes, until the hold is released."""
        hold = Hold(after_bytes)
        with self._lock:
            self._holds[name] = hold
        return hold

    def fail(
        self,
        status: int,
        *,
        prefix: str = "/",
        times: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Answer with an error whatever path starts with `prefix`, the next `times` times or for good."""
        with self._lock:
            self._failures.append(_Failure(prefix, status, headers or {}, times))

    def recover(self) -> None:
        """Forget cuts and failures."""
        with self._lock:
            self._failures.clear()
            self._cuts.clear()

    def fetches(self, name: str | None = None) -> list[Request]:
        """The GETs of files (of one name), in order; one for each whole file or range asked for."""
        with self._lock:
            return [
                request
                for request in self.requests
                if request.method == "GET"
                and request.file
                and (name is None or request.file == name)
                # A redirected file is two requests; the second has its bytes.
                and not (request.host == "hub" and Path(request.file).suffix in LARGE_SUFFIXES)
            ]

    # What the handlers ask.

    def _note(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def _take_failure(self, path: str) -> _Failure | None:
        with self._lock:
            for failure in self._failures:
                if path.startswith(failure.prefix) and failure.times != 0:
                    if failure.times is not None:
                        failure.times -= 1
                    return failure
        return None

    def _take_cut(self, name: str) -> int | None:
        with self._lock:
            cuts = self._cuts.get(name)
            return cuts.pop(0) if cuts else None

    def _take_hold(self, name: str) -> Hold | None:
        with self._lock:
            return self._holds.pop(name, None)

    def _stored(self, etag: str) -> HubFile | None:
        with self._lock:
            for repository in self._repositories.values():
                for files in repository.commits.values():
                    for file in files.values():
                        if file.etag == etag:
                            return file
        return None

    def _search(self, query: Mapping[str, list[str]]) -> list[Repository]:
        words = " ".join(query.get("search", [])).lower().split()
        wanted_tags = [*query.get("filter", []), *query.get("pipeline_tag", [])]
        author = query.get("author", [""])[0]
        with self._lock:
            found = [
                repository
                for repository in self._repositories.values()
                if not repository.private
                and all(word in repository.model_id.lower() for word in words)
                and all(tag in repository.facts["tags"] for tag in _comma_separated(wanted_tags))
                and (not author or repository.model_id.split("/")[0] == author)
            ]
        sort = query.get("sort", ["createdAt"])[0]
        is_ascending = query.get("direction", ["-1"])[0] == "1"
        return sorted(found, key=lambda repository: repository.facts.get(sort) or 0, reverse=not is_ascending)


def _comma_separated(values: Sequence[str]) -> Iterator[str]:
    for value in values:
        yield from (part for part in value.split(",") if part)


def _files(source: Path | Mapping[str, bytes]) -> Iterator[HubFile]:
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


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: LoopbackHub, host: str, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.hub = hub
        self.host = host

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed in the middle of an answer is what tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    headers: Message

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """`LoopbackHub.requests` is the log."""

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        query = parse_qs(url.query, keep_blank_values=True)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url.path)
        stored = re.fullmatch(r"/content/([0-9a-f]+)", path)
        content = self._hub._stored(stored[1]) if stored and self.server.host == "cdn" else None
        self._hub._note(
            Request(
                host=self.server.host,
                method=self.command,
                path=path,
                file=content.name if content else unquote(resolve[3]) if resolve else "",
                range_start=self._range_start(),
                is_authorized="Authorization" in self.headers,
            )
        )
        if (failure := self._hub._take_failure(path)) is not None:
            self._error(failure.status, "Failure", "A failure was asked for.", failure.headers)
        elif self.server.host == "cdn":
            if content is None:
                self._error(404, "", "No such content.")
            else:
                self._send_file(content, {})
        elif resolve:
            self._resolve(resolve[1], unquote(resolve[2]), unquote(resolve[3]))
        elif path == "/api/models":
            self._list(query)
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"), url.path.removeprefix("/api/models/"), query, body)
        elif path == "/api/whoami-v2" and self._has_token():
            self._json({"type": "user", "name": "loopback", "auth": {"type": "access_token"}})
        else:
            self._error(401 if path == "/api/whoami-v2" else 404, "", "No such page.")

    @property
    def _hub(self) -> LoopbackHub:
        return self.server.hub

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _range_start(self) -> int | None:
        match = re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range", ""))
        return int(match[1]) if match else None

    # The API.

    def _api(self, path: str, raw_path: str, query: Mapping[str, list[str]], body: bytes) -> None:
        # A revision with a slash arrives quoted: split before unquoting.
        owner, _, rest = raw_path.partition("/")
        name, *action = rest.split("/", 2)
        repository = self._repository(f"{unquote(owner)}/{unquote(name)}")
        if repository is None:
            return
        verb = action[0] if action else "revision"
        if verb == "refs":
            branches = [
                {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": commit}
                for ref, commit in repository.refs.items()
            ]
            self._json({"branches": branches, "tags": [], "converts": []})
            return
        revision, _, folder = (action[1] if len(action) > 1 else "main").partition("/")
        commit = self._commit(repository, unquote(revision))
        if commit is None:
            return
        if verb == "revision":
            self._json(_described(repository, commit, has_blobs="blobs" in query, has_files=True))
        elif verb == "tree":
            self._json(_tree(repository.commits[commit], unquote(folder), "recursive" in query))
        elif verb == "paths-info" and self.command == "POST":
            asked = set(parse_qs(body.decode()).get("paths", []))
            files = repository.commits[commit]
            self._json([_entry(file) for file in files.values() if file.name in asked])
        else:
            self._error(404, "", "No such call.")

    def _list(self, query: Mapping[str, list[str]]) -> None:
        found = self._hub._search(query)
        limit = int(query.get("limit", ["1000"])[0])
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + limit < len(found):
            kept = "&".join(
                f"{key}={quote(value)}"
                for key, values in query.items()
                if key != "cursor"
                for value in values
            )
            headers["Link"] = f'<{self._hub.endpoint}/api/models?{kept}&cursor={start + limit}>; rel="next"'
        has_files = "full" in query or "siblings" in query.get("expand", [])
        self._json(
            [
                _described(repository, repository.refs["main"], has_blobs=False, has_files=has_files)
                for repository in found[start : start + limit]
            ],
            headers,
        )

    def _resolve(self, model_id: str, revision: str, name: str) -> None:
        repository = self._repository(model_id)
        if repository is None:
            return
        if repository.gated and not self._has_token():
            status = 403 if "Authorization" in self.headers else 401
            self._error(status, "GatedRepo", f"Access to model {model_id} is restricted.")
            return
        commit = self._commit(repository, revision)
        if commit is None:
            return
        file = repository.commits[commit].get(name)
        if file is None:
            self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.sha256 is None:
            self._send_file(file, headers)
            return
        headers["X-Linked-Size"] = str(file.size_bytes)
        headers["X-Linked-Etag"] = f'"{file.sha256}"'
        headers["Location"] = f"{self._hub.cdn_endpoint}/content/{file.sha256}?signature=of-loopback"
        self._send(302, b"", headers)

    def _repository(self, model_id: str) -> Repository | None:
        """The repository, or None after an answer that says nothing about private ones."""
        repository = self._hub._repositories.get(model_id)
        if repository is not None and (not repository.private or self._has_token()):
            return repository
        if "Authorization" in self.headers:
            self._error(404, "RepoNotFound", "Repository not found")
        else:
            self._error(401, "RepoNotFound", "Invalid username or password.")
        return None

    def _commit(self, repository: Repository, revision: str) -> str | None:
        commit = repository.refs.get(revision, revision)
        if commit in repository.commits:
            return commit
        self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    # Answers.

    def _json(self, value: object, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self._send(200, body, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})

    def _error(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(
            status,
            json.dumps({"error": message}).encode(),
            {
                "Content-Type": "application/json; charset=utf-8",
                "X-Error-Message": message,
                **({"X-Error-Code": code} if code else {}),
                **(headers or {}),
            },
        )

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_file(self, file: HubFile, headers: Mapping[str, str]) -> None:
        stored_bytes = file.stored_bytes()
        start = self._range_start() if self._hub.has_ranges else None
        if start is not None and start >= stored_bytes:
            self._error(416, "", "Range not satisfiable", {"Content-Range": f"bytes */{stored_bytes}"})
            return
        self.send_response(200 if start is None else 206)
        for key, value in headers.items():
            self.send_header(key, value)
        if start is not None:
            self.send_header("Content-Range", f"bytes {start}-{stored_bytes - 1}/{stored_bytes}")
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(stored_bytes - (start or 0)))
        self.end_headers()
        if self.command != "HEAD":
            self._send_content(file, start or 0, stored_bytes)

    def _send_content(self, file: HubFile, start: int, stop: int) -> None:
        cut_bytes = self._hub._take_cut(file.name)
        hold = self._hub._take_hold(file.name)
        sent_bytes = 0
        while start + sent_bytes < stop:
            if hold is not None and sent_bytes >= hold.after_bytes:
                self.wfile.flush()
                hold.wait()
                hold = None
            chunk = file.read(start + sent_bytes, min(_SEND_BYTES, stop - start - sent_bytes))
            if cut_bytes is not None and sent_bytes + len(chunk) > cut_bytes:
                self.wfile.write(chunk[: max(0, cut_bytes - sent_bytes)])
                self.wfile.flush()
                self.close_connection = True
                return
            self.wfile.write(chunk)
            sent_bytes += len(chunk)
            if rate := self._hub.throttle_bytes_per_second:
                time.sleep(len(chunk) / rate)


def _described(repository: Repository, commit: str, *, has_blobs: bool, has_files: bool) -> dict[str, Any]:
    description: dict[str, Any] = {
        "_id": hashlib.sha1(repository.model_id.encode(), usedforsecurity=False).hexdigest()[:24],
        "id": repository.model_id,
        "modelId": repository.model_id,
        "author": repository.model_id.split("/")[0],
        "sha": commit,
        "gated": "manual" if repository.gated else False,
        "private": repository.private,
        "disabled": False,
        **repository.facts,
    }
    if has_files:
        description["siblings"] = [_sibling(file, has_blobs) for file in repository.commits[commit].values()]
    return description


def _sibling(file: HubFile, has_blobs: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": file.name}
    if has_blobs:
        sibling |= {"blobId": file.git_blob, "size": file.size_bytes}
        if file.sha256 is not None:
            sibling["lfs"] = {"sha256": file.sha256, "size": file.size_bytes, "pointerSize": 134}
    return sibling


def _entry(file: HubFile) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "path": file.name,
        "oid": file.git_blob,
        "size": file.size_bytes,
    }
    if file.sha256 is not None:
        entry["lfs"] = {"oid": file.sha256, "size": file.size_bytes, "pointerSize": 134}
    return entry


def _tree(files: Mapping[str, HubFile], folder: str, is_recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    entries: list[dict[str, Any]] = []
    folders: set[str] = set()
    for name, file in files.items():
        below = name.removeprefix(prefix)
        if not name.startswith(prefix):
            continue
        if is_recursive or "/" not in below:
            entries.append(_entry(file))
        parents = below.split("/")[:-1]
        depth = len(parents) if is_recursive else min(1, len(parents))
        folders |= {prefix + "/".join(parents[: level + 1]) for level in range(depth)}
    for path in sorted(folders):
        oid = hashlib.sha1(path.encode(), usedforsecurity=False).hexdigest()
        entries.append({"type": "directory", "path": path, "oid": oid, "size": 0})
    return entries


def main() -> None:
    """Serve directories until interrupted; the built-in demo model when none is named."""
    parser = argparse.ArgumentParser(prog="python -m tests.loopback_hub", description=main.__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument(
        "--add",
        nargs=3,
        action="append",
        default=[],
        metavar=("DIRECTORY", "as", "OWNER/NAME"),
        help="publish a model directory; repeatable",
    )
    parser.add_argument("--gated", action="store_true", help=f"ask for HF_TOKEN={TOKEN}")
    parser.add_argument("--throttle", type=int, metavar="BYTES", help="bytes per second of each file")
    arguments = parser.parse_args()
    models: list[tuple[Path, str]] = []
    for directory, word, model_id in arguments.add:
        if word != "as" or not Path(directory).is_dir() or model_id.count("/") != 1:
            parser.error(f"--add {directory} {word} {model_id}: write --add DIRECTORY as owner/name")
        models.append((Path(directory), model_id))
    demo = Path(__file__).parent.parent / "mlxgui_grpc" / "demo"
    if not models and demo.is_dir():
        models.append((demo, "loopback/demo"))
    with LoopbackHub(arguments.port) as hub:
        hub.throttle_bytes_per_second = arguments.throttle
        for path, model_id in models:
            hub.add(model_id, path, gated=arguments.gated)
            print(f"# serves {path} as {model_id}: mlxgui pull {model_id}")
        print(f"HF_ENDPOINT={hub.endpoint}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
