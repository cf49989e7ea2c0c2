"""Medians, spreads and paired ratios over the repetitions of a run."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.cells import Cell
from bench.first_token import FirstTokens, UnloadedStarts
from bench.resources import SystemUse


@dataclass(frozen=True)
class Spread:
    """The median of several repetitions with the least and the most of them."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread | None":
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(statistics.median(known), min(known), max(known), len(known))


@dataclass
class Results:
    """Everything that one run measured."""

    cells: list[Cell] = field(default_factory=list)
    first_tokens: list[FirstTokens] = field(default_factory=list)
    uses: list[SystemUse] = field(default_factory=list)
    unloaded: list[UnloadedStarts] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def of(self, model: str, target: str, clients: int) -> list[Cell]:
        """The cells to use, one per repetition at most, failed ones left out."""
        return [
            cell
            for cell in self.cells
            if (cell.model, cell.target, cell.clients) == (model, target, clients) and cell.is_valid
        ]

    def spread(
        self, model: str, target: str, clients: int, value: Callable[[Cell], float | None]
    ) -> Spread | None:
        return Spread.of([value(cell) for cell in self.of(model, target, clients)])

    def throughput_ratio(self, model: str, target: str, base: str, clients: int) -> Spread | None:
        """Tokens per second of `target` over `base`, paired inside each repetition."""
        return self._ratio(model, target, base, clients, lambda cell: cell.figures.tokens_per_second)

    def cpu_ratio(self, model: str, target: str, base: str, clients: int) -> Spread | None:
        """CPU per token of `base` over that of `target`, paired; above 1 the target needs less."""
        return self._ratio(model, base, target, clients, lambda cell: cell.cpu_ms_per_token)

    def _ratio(
        self, model: str, above: str, below: str, clients: int, value: Callable[[Cell], float | None]
    ) -> Spread | None:
        denominators = {cell.repetition: value(cell) for cell in self.of(model, below, clients)}
        ratios = []
        for cell in self.of(model, above, clients):
            numerator, denominator = value(cell), denominators.get(cell.repetition)
            if numerator is not None and denominator:
                ratios.append(numerator / denominator)
        return Spread.of(ratios)
