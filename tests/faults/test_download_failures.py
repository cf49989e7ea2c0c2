"""The process that downloads or deletes is killed, or its disk fails, at each step: all of a model or nothing."""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxgui_grpc import hub_cache, hub_download
from mlxgui_grpc.hub_cache import RepositoryFolder
from mlxgui_grpc.hub_frames import Deleted, Downloaded, Failed
from tests.campaigns.cache_check import all_files, check_repository, leftovers
from tests.faults.hub_forks import HubForks
from tests.loopback_hub import LoopbackHub

POINTS = re.findall(
    r'failpoint\("(hub\..+?)"\)',
    Path(hub_download.__file__).read_text() + Path(hub_cache.__file__).read_text(),
)
DELETE_POINTS = [point for point in POINTS if point.endswith("-delete")]
DOWNLOAD_POINTS = [point for point in POINTS if point not in DELETE_POINTS]

MODEL_ID = "acme/steps"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b'{"a": 1}' * 100,
    "model.safetensors": bytes(range(256)) * 1000,
    "README.md": b"steps",
    "copy.md": b"steps",
}


@pytest.fixture(scope="module")
def own_hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.add(MODEL_ID, FILES)
        yield hub


def is_whole(folder: RepositoryFolder) -> bool:
    """Whether the model is there with all that it has; half of it is an error."""
    return bool(check_repository(folder, defaultdict(lambda: FILES)))


@pytest.fixture
def folder(forks: HubForks, cache: Path) -> Iterator[RepositoryFolder]:
    """The repository's folder, not there yet, and gone again after the test."""
    folder = RepositoryFolder(cache, MODEL_ID)
    assert not folder.path.exists()
    yield folder
    done = forks.download(MODEL_ID)
    assert isinstance(done, Downloaded)
    assert isinstance(forks.delete(MODEL_ID, done.revision), Deleted)
    assert not folder.path.exists(), all_files(folder.path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def forks(own_hub: LoopbackHub, cache: Path) -> Iterator[HubForks]:
    running = HubForks(own_hub.endpoint, cache)
    yield running
    running.close()


@pytest.mark.parametrize("point", DOWNLOAD_POINTS)
def test_a_download_that_is_killed_leaves_all_or_nothing_and_is_resumed(
    point: str, forks: HubForks, folder: RepositoryFolder, own_hub: LoopbackHub
) -> None:
    """At each time that it passes the place. What was verified is not fetched again."""
    for number in itertools.count(1):
        before = len(own_hub.fetches())
        if forks.download(MODEL_ID, f"{point}:kill:{number}") is not None:
            break
        was_whole = is_whole(folder)
        assert was_whole == (point in ("hub.after-snapshot", "hub.after-commit"))
        done = forks.download(MODEL_ID)
        assert isinstance(done, Downloaded) and done.is_ours
        assert is_whole(folder) and not leftovers(folder)
        fetched = own_hub.fetches()[before:]
        # Four contents; those under way at the kill are asked for twice, to find that nothing is missing.
        assert len(fetched) <= 2 * 4
        if point in ("hub.after-staging", "hub.after-blob", "hub.before-snapshot"):
            assert len(fetched) == 4
        assert isinstance(forks.delete(MODEL_ID, done.revision), Deleted)
    assert number > 1, "the place is not on the way"


@pytest.mark.parametrize("point", DELETE_POINTS)
def test_a_deletion_that_is_killed_leaves_all_or_nothing_and_is_repeated(
    point: str, forks: HubForks, folder: RepositoryFolder
) -> None:
    done = forks.download(MODEL_ID)
    assert isinstance(done, Downloaded)
    assert forks.delete(MODEL_ID, done.revision, f"{point}:kill") is None
    assert is_whole(folder) == (point == "hub.before-delete")
    assert isinstance(forks.delete(MODEL_ID, done.revision), Deleted)
    assert not is_whole(folder)
    # What the kill left is removed as that of a download is, when it has not been repeated for long enough.
    hub_cache.sweep_partials(folder.path.parent, older_than_seconds=0)
    assert not folder.path.exists(), all_files(folder.path)


@pytest.mark.parametrize(
    ("point", "action", "reason"),
    [*((point, "enospc", "DISK_FULL") for point in DOWNLOAD_POINTS), ("hub.before-sync", "eio", "INTERNAL")],
)
def test_a_disk_that_fails_a_download_is_named_and_costs_nothing(
    point: str, action: str, reason: str, forks: HubForks, folder: RepositoryFolder
) -> None:
    failed = forks.download(MODEL_ID, f"{point}:{action}")
    assert isinstance(failed, Failed) and failed.reason == reason, failed
    assert str(folder.path.parent) in failed.message
    is_whole(folder)
    assert isinstance(forks.download(MODEL_ID), Downloaded)
    assert is_whole(folder) and not leftovers(folder)
