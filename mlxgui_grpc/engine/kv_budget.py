"""How much cache the rows of a worker may take together, counted in tokens before it is allocated."""

from collections.abc import Sequence
from dataclasses import dataclass

STEP_TOKENS = 256
"""mlx-lm's caches grow in steps of so many tokens."""
AHEAD_TOKENS = 512
"""Reserved for the reply when a row is admitted; what it needs beyond them it gets step by step."""


@dataclass(frozen=True, slots=True)
class KvCost:
    """What all caches of one row take; nothing where it is unknown."""

    rates: tuple[tuple[int, int], ...] = ()
    """(bytes a token, window): keys and values of layers that keep so many tokens, 0 for all of them."""
    fixed_bytes: int = 0
    """What recurrent layers hold, whatever the length."""

    def of(self, token_count: int) -> int:
        """Bytes of a row of so many tokens."""
        grown = (rate * min(token_count, window or token_count) for rate, window in self.rates)
        return self.fixed_bytes + sum(grown)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token takes; a layer counts whose window, if it has one, is longer than 512 tokens."""
        return sum(rate for rate, window in self.rates if not 0 < window <= 512)


UNKNOWN_COST = KvCost()


class KvBudget:
    """The bytes there are, and what rows reserve of them.

    A batch is one array per layer, as long as its longest row: it takes rows x the longest reservation.
    """

    def __init__(self, cost: KvCost, budget_bytes: int) -> None:
        """An unknown cost, or a budget of 0: nothing is bounded."""
        self._cost = cost
        self.budget_bytes = budget_bytes

    @property
    def is_bounded(self) -> bool:
        """False when everything fits."""
        return self._cost.of(1) > 0 and self.budget_bytes > 0

    def fits(self, batch: Sequence[int], aside: Sequence[int]) -> bool:
        """Whether rows that reserve `batch` tokens each fit, beside rows outside the batch of `aside` tokens each."""
        if not self.is_bounded:
            return True
        needed = len(batch) * self._cost.of(max(batch, default=0)) + sum(map(self._cost.of, aside))
        return needed <= self.budget_bytes


def first_reservation(length: int, final_length: int) -> int:
    """Tokens to reserve for a row of `length` tokens that can never have more than `final_length`."""
    return rounded_up(min(length + AHEAD_TOKENS, final_length))


def rounded_up(token_count: int) -> int:
    """To whole steps."""
    return -(-token_count // STEP_TOKENS) * STEP_TOKENS
