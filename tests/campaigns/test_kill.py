"""kill -9 of the server, at random moments and at every failpoint: what it acknowledged is there at the next start.

`make kill` runs KILL_COUNT random moments and each failpoint KILL_REPEATS times; every test run has a sample.
"""

import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

import mlxgui_grpc
from mlxgui_grpc.hub_cache import PARTIAL_MAX_AGE_SECONDS
from tests.campaigns.victim import SETTINGS, Victim
from tests.conftest import TinyModels
from tests.loopback_hub import LoopbackHub
from tests.support_calls import CALL_SECONDS, failure_of
from tests.support_metrics import wait_until

COUNT = int(os.environ.get("KILL_COUNT", "200"))
REPEATS = int(os.environ.get("KILL_REPEATS", "20"))
SEED = int(os.environ.get("KILL_SEED", "1"))
SAMPLE_COUNT = 2

LIFE_SECONDS = 3.0
"""A random kill comes within so long of the first request."""
BYTES_PER_SECOND = 1_000_000
"""The hub's speed, at which an install takes about half a second: time enough to be killed in."""
PAUSE_SECONDS = 0.01
"""Of each client between two actions."""
ROUNDS = 4
"""How often clients go through all that a server does before it must have passed every failpoint."""

POINTS = sorted(
    {
        point
        for source in Path(mlxgui_grpc.__file__).parent.rglob("*.py")
        for point in re.findall(r'\bfailpoint\("(.+?)"\)', source.read_text())
        if not point.startswith("migration.")  # tests/unit/test_catalog_schema.py
    }
)
REGISTRY_POINTS = [point for point in POINTS if point.startswith("catalog.")]
PASSES = {
    **dict.fromkeys(REGISTRY_POINTS, 12),
    **dict.fromkeys(("hub.before-sync", "hub.before-rename", "hub.after-rename", "hub.after-blob"), 5),
}
"""How often a process passes them in one round at least: for each write, and for each file of a model. Others: once."""


@pytest.fixture
def own_hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


def until_it_dies(act: Callable[[], None], is_over: threading.Event) -> None:
    """Act until the server is gone. What it refuses, it refuses."""
    while not is_over.wait(PAUSE_SECONDS):
        try:
            act()
        except grpc.RpcError as error:
            if not failure_of(error).reason:
                return


def live_and_die(victim: Victim, choice: random.Random, number: int) -> None:
    """One life: two clients, each with a model of its own, and one who changes settings, until a random moment."""
    assert victim.start()
    victim.check()
    clients = [random.Random(choice.random()) for _ in range(2)]
    calls: list[Callable[[], None]] = [
        lambda client=client, name=name: victim.act(client, name)  # type: ignore[misc]
        for client, name in zip(clients, ("one", "two"), strict=True)
    ]
    calls.append(lambda: victim.set(choice.randint(1, 1000)))
    is_over = threading.Event()
    with ThreadPoolExecutor(len(calls)) as pool:
        clients_done = [pool.submit(until_it_dies, call, is_over) for call in calls]
        time.sleep(random.Random(f"{SEED} {number}").random() * LIFE_SECONDS)
        victim.kill()
        is_over.set()
        for client_done in clients_done:
            client_done.result(CALL_SECONDS)
    victim.bury()


def report(victim: Victim, kill_count: int) -> None:
    ledger, seconds, cpu = victim.ledger, sorted(victim.start_seconds), sorted(victim.start_cpu_seconds)
    acknowledged, cut_off = (
        f"{counts[SETTINGS]} of settings and {counts.total() - counts[SETTINGS]} of models"
        for counts in (ledger.acknowledged, ledger.unanswered)
    )
    print(
        f"{kill_count} kills. Writes acknowledged: {acknowledged}; cut off: {cut_off}. {len(seconds)} starts, ready "
        f"after {seconds[len(seconds) // 2]:.2f} s (median), {seconds[len(seconds) * 95 // 100]:.2f} s (95 %), "
        f"{seconds[-1]:.2f} s (longest); {cpu[len(cpu) // 2]:.2f} s and {cpu[-1]:.2f} s at most of processor time"
    )


def random_kills(victim: Victim, hub: LoopbackHub, count: int) -> None:
    hub.throttle_bytes_per_second = BYTES_PER_SECOND
    for number in range(count):
        live_and_die(victim, random.Random(f"{SEED} life {number}"), number)
    old, young = (
        victim.leftover(PARTIAL_MAX_AGE_SECONDS + 60),
        victim.leftover(PARTIAL_MAX_AGE_SECONDS - 3600),
    )
    victim.start()
    victim.check()
    wait_until(lambda: not old.exists(), "what nobody came back for is swept")
    assert young.exists(), "what somebody may come back for was swept"
    victim.finish(loads=count > SAMPLE_COUNT)
    victim.bury()
    report(victim, count)
    assert victim.ledger.acknowledged.total() > 0


def test_kills_at_random_moments_lose_nothing(
    own_hub: LoopbackHub, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """Installs, loads, deletions, pins and settings under way; afterwards all can be repeated and nothing stays."""
    victim = Victim(tmp_path, own_hub, tiny_models.llama, repository_count=1)
    random_kills(victim, own_hub, SAMPLE_COUNT)


@pytest.mark.campaign
@pytest.mark.timeout(0)
def test_many_kills_at_random_moments_lose_nothing(
    own_hub: LoopbackHub, tiny_models: TinyModels, tmp_path: Path
) -> None:
    random_kills(Victim(tmp_path, own_hub, tiny_models.llama), own_hub, COUNT)


def write_once(victim: Victim, number: int, *, is_quick: bool) -> None:
    """Everything that writes the registry; with a download and a deletion of files, which take longer."""
    victim.set(number + 1)
    victim.install_directory("local")
    victim.pin("local", number % 2 == 0)
    if not is_quick:
        victim.install("one", victim.repositories[0])
        victim.install("two", victim.repositories[1])
        victim.update("one")
        victim.delete("one")
        victim.delete("two")
    victim.delete("local")


def die_at(victim: Victim, point: str, passes: int, *, is_quick: bool) -> None:
    """Check what the last kill has left, and kill the server that found it at that point."""
    # Steps of a download or of a deletion are taken in a child: the server goes with it.
    action = "crash" if point.startswith("hub.") else "kill"
    if not victim.start(f"{point}:{action}:{passes}"):
        assert victim.start()
        victim.check()
        victim.bury()
        return
    victim.check()
    with pytest.raises(grpc.RpcError) as raised:
        for number in range(ROUNDS):
            write_once(victim, number, is_quick=is_quick)
    assert not failure_of(raised.value).reason, "it was not killed"
    assert victim.server is not None
    assert victim.server.process.wait(CALL_SECONDS) == -9
    victim.bury()


def test_a_kill_around_a_registry_write_loses_nothing(
    own_hub: LoopbackHub, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """Once at each place; tests/faults/test_download_failures.py has the places of downloads and deletions."""
    victim = Victim(tmp_path, own_hub, tiny_models.llama)
    for number, point in enumerate(REGISTRY_POINTS):
        die_at(victim, point, SEED + 2 * number, is_quick=True)
    assert victim.start()
    victim.check()
    victim.bury()
    report(victim, len(REGISTRY_POINTS))


@pytest.mark.campaign
@pytest.mark.timeout(0)
def test_many_kills_at_every_failpoint_lose_nothing(
    own_hub: LoopbackHub, tiny_models: TinyModels, tmp_path: Path
) -> None:
    victim = Victim(tmp_path, own_hub, tiny_models.llama)
    choice = random.Random(SEED)
    for _ in range(REPEATS):
        for point in POINTS:
            die_at(victim, point, choice.randint(1, PASSES.get(point, 1)), is_quick=False)
    assert victim.start()
    victim.check()
    victim.finish(loads=True)
    victim.bury()
    report(victim, REPEATS * len(POINTS))


def test_every_failpoint_is_known() -> None:
    """Those that the server passes, and nothing that only looks like one."""
    assert {point.partition(".")[0] for point in POINTS} == {"catalog", "hub"}
    assert set(PASSES) < set(POINTS) and len(POINTS) >= 14, POINTS
