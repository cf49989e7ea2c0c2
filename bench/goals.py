"""The goals as data: each reads one figure from the results and says whether it is met."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from bench.summary import Results, Spread

MODEL = "micro"
IDLE_SHARE = 0.005


@dataclass(frozen=True)
class Goal:
    text: str
    kind: Literal["at least", "at most"]
    bound: float
    unit: str
    figure: Callable[[Results], Spread | None]

    def judge(self, results: Results) -> "Verdict":
        spread = self.figure(results)
        if spread is None:
            return Verdict(self, None, "not measured")
        is_met = spread.median >= self.bound if self.kind == "at least" else spread.median <= self.bound
        return Verdict(self, spread, "met" if is_met else "missed")


@dataclass(frozen=True)
class Verdict:
    goal: Goal
    spread: Spread | None
    outcome: Literal["met", "missed", "not measured"]

    def to_json(self) -> dict[str, Any]:
        figure = None if self.spread is None else [self.spread.median, self.spread.low, self.spread.high]
        return {
            "goal": self.goal.text,
            "kind": self.goal.kind,
            "bound": self.goal.bound,
            "unit": self.goal.unit,
            "figure": figure,
            "outcome": self.outcome,
        }


def _throughput(target: str, base: str, clients: int) -> Callable[[Results], Spread | None]:
    return lambda results: results.throughput_ratio(MODEL, target, base, clients)


def _added_first_token(target: str) -> Callable[[Results], Spread | None]:
    return lambda results: Spread.of(
        [added for first in results.first_tokens if first.model == MODEL for added in first.added_ms(target)]
    )


def _unloaded(target: str) -> Callable[[Results], Spread | None]:
    return lambda results: Spread.of(
        [seconds for start in results.unloaded if start.target == target for seconds in start.seconds]
    )


def _rss(role: str) -> Callable[[Results], Spread | None]:
    def figure(results: Results) -> Spread | None:
        resting = [
            p.rss_mb for use in results.uses if use.system == "ours" for p in use.processes if p.role == role
        ]
        loaded: list[float] = [max(cell.rss_mb_by_role.get(role, [0])) for cell in results.cells]
        values = [value for value in resting + loaded if value]
        # The largest ever seen is what is promised; the spread shows where it began.
        return Spread(max(values), min(values), max(values), len(values)) if values else None

    return figure


def _idle_cpu(results: Results) -> Spread | None:
    shares = [process.idle_cpu for use in results.uses if use.system == "ours" for process in use.processes]
    return Spread(max(shares), min(shares), max(shares), len(shares)) if shares else None


GOALS = (
    *(
        Goal(
            f"SSE over staggered, {n} clients, tokens/s",
            "at least",
            1.0,
            "x",
            _throughput("sse", "staggered", n),
        )
        for n in (16, 32)
    ),
    Goal("SSE over lock-step, 1 client, tokens/s", "at least", 0.60, "x", _throughput("sse", "lock-step", 1)),
    *(
        Goal(
            f"SSE over lock-step, {n} clients, tokens/s",
            "at least",
            0.55,
            "x",
            _throughput("sse", "lock-step", n),
        )
        for n in (16, 32)
    ),
    *(
        Goal(
            f"SSE over mlx_lm.server, {n} clients, tokens/s",
            "at least",
            1.3,
            "x",
            _throughput("sse", "mlx_lm", n),
        )
        for n in (16, 32)
    ),
    Goal("time to first token that SSE adds, 1 client", "at most", 5.0, "ms", _added_first_token("sse")),
    Goal("unloaded demo model, SSE request to first token", "at most", 0.5, "s", _unloaded("sse")),
    Goal("RSS of the control process, largest seen", "at most", 120, "MB", _rss("control")),
    Goal("RSS of the bridge, largest seen", "at most", 100, "MB", _rss("bridge")),
    Goal("idle CPU of the busiest process, share of a core", "at most", IDLE_SHARE, "", _idle_cpu),
)
