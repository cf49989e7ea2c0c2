"""The HTTP of the stand-in for the model hub: parses requests, asks `LoopbackHub`, and answers as the hub does."""

import contextlib
import json
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.loopback_repository import HubFile, Repository, entry, page_of, sibling, tree

if TYPE_CHECKING:
    from tests.loopback_hub import LoopbackHub

_SEND_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it arrived: `host` is hub or cdn, `file` the repository's path of a resolve."""

    host: str
    method: str
    path: str
    query: Mapping[str, list[str]]
    file: str
    range_start: int | None
    authorization: str
    """The header; empty: there was none."""

    @property
    def is_authorized(self) -> bool:
        """It came with a token, right or wrong."""
        return bool(self.authorization)


class LoopbackServer(ThreadingHTTPServer):
    """One of the two hosts: hub or cdn."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: "LoopbackHub", host: str, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.hub = hub
        self.host = host
        self._connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.append(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with contextlib.suppress(ValueError):
            self._connections.remove(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """End the connections that clients keep for later."""
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed in the middle of an answer is what tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackServer
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
        content = self._hub.stored(stored[1]) if stored and self.server.host == "cdn" else None
        self._hub.note(
            Request(
                host=self.server.host,
                method=self.command,
                path=path,
                query=query,
                file=content.name if content else unquote(resolve[3]) if resolve else "",
                range_start=self._range_start(),
                authorization=self.headers.get("Authorization", ""),
            )
        )
        self._hub.wait_for_stall(path)
        if (failure := self._hub.take_failure(path)) is not None:
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
    def _hub(self) -> "LoopbackHub":
        return self.server.hub

    def _has_token(self) -> bool:
        return self._hub.accepts(self.headers.get("Authorization", ""))

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
            answer = repository.described(commit)
            if "blobs" in query:
                answer["siblings"] = [
                    sibling(file, has_blobs=True) for file in repository.commits[commit].values()
                ]
            self._json(answer)
        elif verb == "tree":
            self._json(tree(repository.commits[commit], unquote(folder), is_recursive="recursive" in query))
        elif verb == "paths-info" and self.command == "POST":
            asked = set(parse_qs(body.decode()).get("paths", []))
            files = repository.commits[commit]
            self._json([entry(file) for file in files.values() if file.name in asked])
        else:
            self._error(404, "", "No such call.")

    def _list(self, query: Mapping[str, list[str]]) -> None:
        page, cursor = page_of(self._hub.find(query), query)
        headers = {}
        if cursor:
            kept = "".join(
                f"{key}={quote(value)}&"
                for key, values in query.items()
                if key != "cursor"
                for value in values
            )
            host = self._hub.link_endpoint or self._hub.endpoint
            headers["Link"] = f'<{host}/api/models?{kept}cursor={quote(cursor)}>; rel="next"'
        self._json([repository.listed(query) for repository in page], headers)

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
        repository = self._hub.repository(model_id)
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
        cut_bytes = self._hub.take_cut(file.name)
        hold = self._hub.take_hold(file.name)
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
