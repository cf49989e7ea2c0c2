"""Measures one cell: so many streaming clients on one target, with the CPU of its processes beside it."""

import os
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import psutil

from bench import machine
from bench.config import BenchConfig
from bench.process_tree import ProcessSample, cpu_by_role, sample, settle
from bench.protocol import Figures, Order
from bench.stage import Stage
from bench.targets import Target


@dataclass(frozen=True)
class Cell:
    model: str
    target: str
    clients: int
    repetition: int
    attempt: int
    figures: Figures
    # CPU milliseconds of the whole process tree per delivered token, and by role of the processes.
    cpu_ms_per_token: float | None
    cpu_ms_by_role: dict[str, float]
    rss_mb_by_role: dict[str, list[int]]
    load_average: float
    # Shares of the machine (0-1): stolen by its host; used by processes without part in the cell.
    steal: float
    other_cpu: float

    @property
    def is_valid(self) -> bool:
        return self.figures.tokens > 0 and not self.figures.errors

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": round(self.figures.tokens_per_second, 1)}


@dataclass
class _Meter:
    """Reads every counter at the two marks of a window."""

    stage: Stage
    target: Target
    clocks: list[machine.CpuClock] = field(default_factory=list)
    trees: list[list[ProcessSample]] = field(default_factory=list)
    harness_cpu: list[float] = field(default_factory=list)

    def __call__(self, mark: str) -> None:
        system = self.stage.system(self.target)
        self.trees.append(sample(system.root_pid, system.roles))
        self.clocks.append(machine.CpuClock.read())
        # The harness itself and the load generator are neither the target's nor a disturbance.
        own = sum(psutil.Process(os.getpid()).cpu_times()[:2])
        if system.own_driver() is None:
            own += sum(psutil.Process(self.stage.driver(self.target).pid).cpu_times()[:2])
        self.harness_cpu.append(own)


def measure(stage: Stage, target: Target, clients: int, repetition: int, config: BenchConfig) -> list[Cell]:
    """Every attempt at the cell, the one to use last; disturbance alone decides whether it is repeated."""
    attempts: list[Cell] = []
    for attempt in range(config.attempts):
        cell = _measure_once(stage, target, clients, repetition, attempt, config)
        attempts.append(cell)
        if cell.steal <= config.max_steal and cell.other_cpu <= config.max_other_cpu:
            return attempts
    return sorted(attempts, key=lambda cell: cell.steal + cell.other_cpu, reverse=True)


def warm_up(stage: Stage, target: Target, config: BenchConfig) -> None:
    """Run a short cell that counts for nothing: a process is slower with its first batches."""
    order = _order(stage, target, 4, stage.seed + 7, config)
    stage.driver(target).perform(replace(order, reply_tokens=order.warm_tokens, seconds=0.1))


def _order(stage: Stage, target: Target, clients: int, seed: int, config: BenchConfig) -> Order:
    system, workload = stage.system(target), stage.workload
    return Order(
        "run",
        system.endpoints[target.client],
        system.model,
        workload.prompt_words,
        workload.reply_tokens,
        seed,
        clients=clients,
        warm_tokens=workload.warm_tokens,
        seconds=workload.seconds,
        limit_seconds=workload.limit_seconds,
        spread_lengths=config.spread_lengths,
        mode=target.mode,
    )


def _measure_once(
    stage: Stage, target: Target, clients: int, repetition: int, attempt: int, config: BenchConfig
) -> Cell:
    workload = stage.workload
    # Replies that the cell before has dropped must be over, whoever decodes them.
    settle([running.root_pid for running in stage.running.values()], quiet_seconds=0.2, limit_seconds=10)
    # Every repetition sends other prompts; every target of a repetition the same.
    order = _order(stage, target, clients, stage.seed + 101 * repetition + 31 * attempt, config)
    meter = _Meter(stage, target)
    figures = stage.driver(target).perform(order, meter)
    if len(meter.trees) < 2:
        return Cell(
            workload.model,
            target.name,
            clients,
            repetition,
            attempt,
            figures,
            None,
            {},
            {},
            machine.load_average(),
            0,
            0,
        )
    (before, after), (start, end) = meter.trees, meter.clocks
    used = cpu_by_role(before, after)
    others = end.busy - start.busy - sum(used.values()) - (meter.harness_cpu[1] - meter.harness_cpu[0])
    tokens = figures.tokens
    rss: dict[str, list[int]] = {}
    for process in after:
        rss.setdefault(process.role, []).append(round(process.rss_bytes / 1e6))
    return Cell(
        model=workload.model,
        target=target.name,
        clients=clients,
        repetition=repetition,
        attempt=attempt,
        figures=figures,
        cpu_ms_per_token=round(sum(used.values()) / tokens * 1e3, 4) if tokens else None,
        cpu_ms_by_role={role: round(seconds / tokens * 1e3, 4) for role, seconds in used.items()}
        if tokens
        else {},
        rss_mb_by_role=rss,
        load_average=round(machine.load_average(), 2),
        steal=round(end.steal_share(start), 4),
        other_cpu=round(max(0.0, others) / max(1e-9, end.total - start.total), 4),
    )
