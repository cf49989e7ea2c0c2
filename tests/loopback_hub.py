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
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.loopback_http import LoopbackServer, Request
from tests.loopback_repository import LARGE_SUFFIXES, HubFile, Repository, files_of

TOKEN = "hf_loopback"
"""The token that opens gated and private repositories here."""


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
class Failure:
    prefix: str
    status: int
    headers: Mapping[str, str]
    times: int | None


class LoopbackHub:
    """Two HTTP servers on loopback, hub and file host, with switches for what goes wrong out there.

    Switches may be set while requests run. `throttle_bytes_per_second` limits each file's rate;
    `has_ranges` off answers a Range with the whole file; `link_endpoint` is the host that links to next pages name,
    when it is not the hub.
    """

    def __init__(self, port: int = 0) -> None:
        self.requests: list[Request] = []
        self.throttle_bytes_per_second: int | None = None
        self.has_ranges = True
        self.link_endpoint = ""
        self._repositories: dict[str, Repository] = {}
        self._cuts: dict[str, list[int]] = {}
        self._holds: dict[str, Hold] = {}
        self._stalls: list[tuple[str, Hold]] = []
        self._failures: list[Failure] = []
        self._lock = threading.Lock()
        self._hub = LoopbackServer(self, "hub", port)
        self._cdn = LoopbackServer(self, "cdn", 0)

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
        """Stop answering: connections end, and new ones are refused from now on."""
        for hold in [*self._holds.values(), *(hold for _, hold in self._stalls)]:
            hold.release()
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()
            server.hang_up()

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
        files = {file.name: file for file in files_of(source)}
        base_model = facts.get("cardData", {}).get("base_model")
        base_tags = [f"base_model:{base_model}", f"base_model:quantized:{base_model}"] if base_model else []
        page = {
            "downloads": downloads,
            "likes": likes,
            "pipeline_tag": pipeline_tag,
            "library_name": "mlx" if "mlx" in tags else "transformers",
            "tags": [*dict.fromkeys((*tags, pipeline_tag, *base_tags))],
            **facts,
        }
        with self._lock:
            new = Repository.new(model_id, len(self._repositories))
            repository = self._repositories.setdefault(model_id, new)
            repository.gated, repository.private = gated, private
            return repository.publish(files, branch, page)

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
            self._failures.append(Failure(prefix, status, headers or {}, times))

    def stall(self, prefix: str) -> Hold:
        """Answer nothing whose path starts with `prefix` until the hold is released."""
        hold = Hold(0)
        with self._lock:
            self._stalls.append((prefix, hold))
        return hold

    def recover(self) -> None:
        """Forget cuts, failures and stalls."""
        with self._lock:
            self._failures.clear()
            self._cuts.clear()
            stalls, self._stalls = self._stalls, []
        for _, hold in stalls:
            hold.release()

    def searches(self, words: str) -> list[Request]:
        """The requests for lists of models with these words, in order."""
        with self._lock:
            return [
                request
                for request in self.requests
                if request.path == "/api/models" and request.query.get("search") == [words]
            ]

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

    def note(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def take_failure(self, path: str) -> Failure | None:
        with self._lock:
            for failure in self._failures:
                if path.startswith(failure.prefix) and failure.times != 0:
                    if failure.times is not None:
                        failure.times -= 1
                    return failure
        return None

    def take_cut(self, name: str) -> int | None:
        with self._lock:
            cuts = self._cuts.get(name)
            return cuts.pop(0) if cuts else None

    def take_hold(self, name: str) -> Hold | None:
        with self._lock:
            return self._holds.pop(name, None)

    def stored(self, etag: str) -> HubFile | None:
        with self._lock:
            for repository in self._repositories.values():
                for files in repository.commits.values():
                    for file in files.values():
                        if file.etag == etag:
                            return file
        return None

    def find(self, query: Mapping[str, list[str]]) -> list[Repository]:
        with self._lock:
            return [repository for repository in self._repositories.values() if repository.matches(query)]

    def repository(self, model_id: str) -> Repository | None:
        with self._lock:
            return self._repositories.get(model_id)

    def accepts(self, authorization: str) -> bool:
        return authorization == f"Bearer {TOKEN}"

    def wait_for_stall(self, path: str) -> None:
        with self._lock:
            holds = [hold for prefix, hold in self._stalls if path.startswith(prefix)]
        for hold in holds:
            hold.wait()


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
