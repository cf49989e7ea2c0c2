"""What a hub may send: so much and no more, and nothing that a terminal obeys."""

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelInfo

from mlxgui_grpc import hub_lookup
from mlxgui_grpc.errors import HubAccessDeniedError
from mlxgui_grpc.hub import check_access
from mlxgui_grpc.hub_frames import JobError, SearchJob

LIMIT_BYTES = 1 << 20
BOMB = gzip.compress(bytes(8 * LIMIT_BYTES))
SECRET = "hf_secret\nX-Evil: 1"


class Torrent(BaseHTTPRequestHandler):
    """Answers a path with more than anybody wants, until the client leaves."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        is_packed = "packed" in self.path
        self.send_response(307 if "moved" in self.path else 200)
        self.send_header("Location", "/small") if "moved" in self.path else None
        self.send_header("Content-Encoding", "gzip") if is_packed else None
        if self.path == "/small" or is_packed:
            content = BOMB if is_packed else b"[]"
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        try:
            for _ in range(1000):
                self.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        except OSError:
            self.server.left.set()  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Torrent) as server:
        server.left = threading.Event()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def client() -> hub_lookup._Client:
    client = hub_lookup._Client()
    client.begin(SearchJob("", (), "downloads", 1, "", endpoint=None, token=None, time_limit_seconds=30.0))
    return client


@pytest.mark.parametrize("path", ["endless", "packed", "endless-and-moved"])
def test_an_answer_without_end_is_cut_off(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """As it arrives and as it is unpacked; that of a redirect, which nobody looks at, too."""
    monkeypatch.setattr(hub_lookup, "MAX_BODY_BYTES", LIMIT_BYTES)
    with client() as asking, pytest.raises(JobError) as caught:
        asking.get(f"http://127.0.0.1:{server.server_port}/{path}")
    assert caught.value.failed.reason == "HUB_UNAVAILABLE" and "1 MiB" in caught.value.failed.message
    if path.startswith("endless"):
        assert server.left.wait(30)  # type: ignore[attr-defined]


def test_a_packed_redirect_is_not_unpacked(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_lookup, "MAX_BODY_BYTES", LIMIT_BYTES)
    with client() as asking:
        answer = asking.get(f"http://127.0.0.1:{server.server_port}/packed-and-moved")
    assert answer.json() == [] and len(answer.history) == 1
    assert len(answer.history[0].content) == len(BOMB)


def test_texts_of_a_hub_hold_nothing_that_a_terminal_obeys() -> None:
    """Neither a title nor a cleared screen, and no half of a character."""
    evil = "\x1b]0;owned\x07 Made \x1b[2J\x9b31m by\n hand\u202e \ud800."
    found = hub_lookup._repository(
        ModelInfo(  # type: ignore[no-untyped-call]
            id="maker/evil\x1b[2J", tags=["mlx", evil], cardData=None, pipeline_tag=evil
        )
    )
    assert found.tags[1] == found.pipeline_tag == "]0;owned Made [2J31m by hand ."
    assert found.id == "maker/evil[2J"
    assert hub_lookup._clip("\x1b" * 10_000 + "late") == ""


def test_a_token_that_is_none_is_said_so_and_never_shown() -> None:
    """It is no matter of the network."""
    check_access(None, "hf_aZ09.-_")
    for token in (SECRET, "hf_sécret", "hf_se cret"):
        with pytest.raises(HubAccessDeniedError) as caught:
            check_access(None, token)
        assert "HF_TOKEN" in caught.value.message and token[3:] not in caught.value.message
