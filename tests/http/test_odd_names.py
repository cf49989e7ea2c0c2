"""Names that try to be paths: refused or not found, and nothing changes outside the state directory.

1 % of the campaign in each run. The campaign: FUZZ_NAMES=10000 FUZZ_SEED=1 python -m pytest -m campaign
tests/http/test_odd_names.py
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import requests

from tests.conftest import RestSession
from tests.http.odd_names import OddRequest, make_request
from tests.http.routes import all_routes
from tests.support_http import PARIS, chat_body, native_error, openai_error
from tests.support_server import RunningServer, start

ROUTES = [route for route in all_routes() if route.rule.startswith("/v1/")]
# 501: audio, which issue 5 brings.
REFUSALS = (400, 403, 404, 405, 501)
Tree = dict[str, tuple[int, int, int]]


@pytest.fixture(scope="module")
def outside(
    server_environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningServer, Path]]:
    """A server some folders down in a tree of its own, its hub's cache and working directory beside it."""
    root = tmp_path_factory.mktemp("outside")
    home = root / "a" / "b" / "c" / "home"
    for folder in (root, root / "a", root / "a" / "b", root / "a" / "b" / "c"):
        (folder / "canary" / "deep").mkdir(parents=True)
        (folder / "canary" / "file").write_text("sing")
    for name in ("user", "temporary", "huggingface"):
        (root / "a" / name).mkdir()
    environment = {
        **server_environment,
        "HOME": str(root / "a" / "user"),
        "TMPDIR": str(root / "a" / "temporary"),
        "HF_HOME": str(root / "a" / "huggingface"),
    }
    running = start(home, environment, standby_count=0)
    with RestSession(running.rest_url) as http:
        assert http.post("/v1/models/demo/load").status_code == 200
    yield running, root
    assert running.stop() == 0


def snapshot(root: Path, home: Path) -> Tree:
    """Every file and folder of the tree but those of the state directory: size, mode, time."""
    tree: Tree = {}
    for parent, folders, files in os.walk(root):
        if Path(parent) == home:
            folders.clear()
            continue
        for name in (*folders, *files):
            path = Path(parent) / name
            if path != home:
                status = path.lstat()
                tree[str(path)] = (status.st_size, status.st_mode, status.st_mtime_ns)
    return tree


def send(http: RestSession, odd: OddRequest) -> requests.Response:
    """The path goes out as it is written."""
    request = http.prepare_request(requests.Request(odd.method, http.base_url + "/", json=odd.body))
    request.url = http.base_url + odd.path
    return http.send(request, timeout=60, allow_redirects=False)


def try_names(server: RunningServer, root: Path, seeds: range) -> dict[int, int]:
    """How often each status came."""
    before = snapshot(root, server.home)
    assert any(path.endswith("canary/file") for path in before)
    counts: dict[int, int] = {}
    with RestSession(server.rest_url) as http:
        for seed in seeds:
            odd = make_request(seed, ROUTES, root)
            answer = send(http, odd)
            words = f"seed {seed}: {str(odd)[:300]} gave {answer.status_code} {answer.text[:300]}"
            counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
            if answer.status_code == 200:
                # Nothing that is found, or a name that may be installed yet.
                assert odd.path.startswith(("/v1/discover/models?", "/v1/settings/preload_models")), words
                continue
            assert answer.status_code in REFUSALS, words
            try:
                if "error" in answer.json():
                    openai_error(answer, answer.status_code)
                else:
                    native_error(answer, answer.status_code)
            except AssertionError as error:
                raise AssertionError(words) from error
            # A name of 10 KB is not sent back whole, nor is anything of the server's.
            assert len(answer.content) < 8192 and "Traceback" not in answer.text, words
        assert [model["name"] for model in http.get("/v1/models").json()["models"]] == ["demo"]
        reply = http.post("/v1/chat/completions", json=chat_body()).json()
        assert reply["choices"][0]["message"]["content"] == PARIS
    assert snapshot(root, server.home) == before
    return counts


def test_a_hundred_odd_names_change_nothing_outside(outside: tuple[RunningServer, Path]) -> None:
    """In paths, bodies and queries of every route that takes a name, escaped in four ways."""
    counts = try_names(*outside, range(100))
    assert counts[404] > 20 and counts[400] > 10


@pytest.mark.campaign
@pytest.mark.timeout(24 * 3600)
def test_ten_thousand_odd_names_change_nothing_outside(outside: tuple[RunningServer, Path]) -> None:
    """The campaign; the failing seed is in the message."""
    first = int(os.environ.get("FUZZ_SEED", "1")) * 1_000_000
    try_names(*outside, range(first, first + int(os.environ.get("FUZZ_NAMES", "10000"))))


def test_the_snapshot_sees_what_changes(tmp_path: Path) -> None:
    """New, changed and removed files and folders, but none of the state directory."""
    (tmp_path / "home").mkdir()
    (tmp_path / "file").write_text("a")
    before = snapshot(tmp_path, tmp_path / "home")
    (tmp_path / "home" / "file").write_text("a")
    assert {
        path: what for path, what in snapshot(tmp_path, tmp_path / "home").items() if before.get(path) != what
    } == {}
    (tmp_path / "file").write_text("longer")
    assert snapshot(tmp_path, tmp_path / "home") != before
    (tmp_path / "file").write_text("a")
    (tmp_path / "folder").mkdir()
    assert set(snapshot(tmp_path, tmp_path / "home")) - set(before) == {str(tmp_path / "folder")}
