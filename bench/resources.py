"""Memory and idle CPU of every process of a system."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.process_tree import ProcessSample, sample, settle
from bench.stage import Stage
from bench.targets import Target

PROBE_REQUESTS = 4


@dataclass(frozen=True)
class ProcessUse:
    """One process at rest. A worker that decoded nothing for the probe requests is the standby."""

    role: str
    rss_mb: float
    # Share of one core (0-1) while nothing was asked.
    idle_cpu: float


@dataclass(frozen=True)
class SystemUse:
    model: str
    system: str
    idle_seconds: float
    processes: tuple[ProcessUse, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(stage: Stage, idle_seconds: float) -> list[SystemUse]:
    """Watch every started server doing nothing, all at the same time."""
    servers = {target.system: target for target in stage.targets if target.client != "engine"}
    working = {name: _working_pids(stage, target) for name, target in servers.items()}
    # A standby worker that the last load used up is made again first.
    pids = [stage.system(target).root_pid for target in servers.values()]
    settle(pids, quiet_seconds=2.0, limit_seconds=40)
    before = {name: _sample(stage, target) for name, target in servers.items()}
    time.sleep(idle_seconds)
    uses = []
    for name, target in servers.items():
        started = {process.pid: process.cpu_seconds for process in before[name]}
        processes = tuple(
            ProcessUse(
                role="standby"
                if process.role == "worker" and process.pid not in working[name]
                else process.role,
                rss_mb=round(process.rss_bytes / 1e6, 1),
                idle_cpu=round((process.cpu_seconds - started[process.pid]) / idle_seconds, 4),
            )
            for process in _sample(stage, target)
            if process.pid in started
        )
        uses.append(SystemUse(stage.workload.model, name, idle_seconds, processes))
    return uses


def _sample(stage: Stage, target: Target) -> list[ProcessSample]:
    system = stage.system(target)
    return sample(system.root_pid, system.roles)


def _working_pids(stage: Stage, target: Target) -> Sequence[int]:
    before = {process.pid: process.cpu_seconds for process in _sample(stage, target)}
    for index in range(PROBE_REQUESTS):
        stage.ask_once(target, 50 + index)
    return [p.pid for p in _sample(stage, target) if p.cpu_seconds - before.get(p.pid, 0.0) >= 0.02]
