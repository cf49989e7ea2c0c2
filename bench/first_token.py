"""Time to first token of single requests: what a server adds to the engine, what an unloaded model costs."""

import json
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from typing import Any

from bench.process_tree import sample, settle
from bench.stage import Stage
from bench.targets import Target

DEMO = "demo"


@dataclass(frozen=True)
class FirstTokens:
    """Milliseconds to first token, request by request, all targets with the same prompts."""

    model: str
    # None where a request failed.
    ttft_ms: dict[str, list[float | None]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def added_ms(self, target: str, base: str = "lock-step") -> list[float]:
        """What `target` adds to `base`, prompt by prompt; [] where one of them was not measured."""
        pairs = zip(self.ttft_ms.get(target, []), self.ttft_ms.get(base, []), strict=False)
        return [ours - bare for ours, bare in pairs if ours is not None and bare is not None]


@dataclass(frozen=True)
class UnloadedStarts:
    """Seconds from a chat to an unloaded model until its first token."""

    model: str
    target: str
    seconds: list[float]
    # How many workers were waiting when each request was sent; 0 means it met no standby.
    standby_workers: list[int]
    # The same chat once the model is loaded.
    loaded_seconds: list[float]
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(stage: Stage, request_count: int) -> FirstTokens:
    """Single requests in turn over all targets, which one comes first rotating."""
    # Both modes of the bare engine are one and the same for a single request.
    targets = [target for target in stage.targets if target.name != "staggered"]
    times: dict[str, list[float | None]] = {target.name: [] for target in targets}
    for index in range(request_count):
        turn = index % max(1, len(targets))
        for target in targets[turn:] + targets[:turn]:
            figures = stage.ask_once(target, 100 + index)
            times[target.name].append(figures.ttft_p50_ms)
    return FirstTokens(stage.workload.model, times)


def measure_unloaded(stage: Stage, request_count: int) -> list[UnloadedStarts]:
    """Chats to the demo model, unloaded before each, once a standby worker waits; by SSE and by gRPC."""
    targets = [target for target in stage.targets if target.system == "ours"]
    return [_unloaded(stage, target, request_count) for target in targets]


def _unloaded(stage: Stage, target: Target, request_count: int) -> UnloadedStarts:
    system = stage.system(target)
    base = system.endpoints["rest"]
    seconds: list[float] = []
    loaded: list[float] = []
    standby: list[int] = []

    def ask(index: int) -> float:
        figures = stage.driver(target).perform(stage.order_once(target, index, DEMO))
        if figures.ttft_p50_ms is None:
            raise RuntimeError("; ".join(figures.errors) or "no token came")
        return figures.ttft_p50_ms / 1e3

    try:
        ask(200)
        for index in range(request_count):
            # First the standby that the last load used up must be there again, then its model may go.
            _wait_for_workers(stage, target, 3)
            _unload(base)
            settle([system.root_pid], quiet_seconds=1.0, limit_seconds=20)
            standby.append(_worker_count(stage, target) - 1)
            seconds.append(ask(201 + index))
            loaded.append(ask(301 + index))
    except (OSError, RuntimeError) as error:
        return UnloadedStarts(DEMO, target.name, seconds, standby, loaded, str(error))
    return UnloadedStarts(DEMO, target.name, seconds, standby, loaded)


def _unload(base: str) -> None:
    request = urllib.request.Request(f"{base}/v1/models/{DEMO}/unload", data=b"", method="POST")
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            json.load(reply)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"unloading {DEMO}: HTTP {error.code} {error.read(200)!r}") from error


def _worker_count(stage: Stage, target: Target) -> int:
    system = stage.system(target)
    return sum(process.role == "worker" for process in sample(system.root_pid, system.roles))


def _wait_for_workers(stage: Stage, target: Target, count: int) -> None:
    """Wait, at most 40 s, for `count` workers (benchmark's model, demo model, standby) with nothing to do."""
    deadline = time.monotonic() + 40
    system = stage.system(target)
    while time.monotonic() < deadline:
        if _worker_count(stage, target) >= count and settle(
            [system.root_pid], quiet_seconds=1.0, limit_seconds=20
        ):
            return
        time.sleep(0.25)
