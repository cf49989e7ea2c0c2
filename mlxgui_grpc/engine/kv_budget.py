"""How much KV cache the rows of a worker may take together, counted in tokens before it is allocated."""

from collections.abc import Sequence

STEP_TOKENS = 256
"""mlx-lm's caches grow in steps of so many tokens."""
AHEAD_TOKENS = 512
"""Reserved for the reply when a row is admitted; what it needs beyond them it gets step by step."""


class KvBudget:
    """The bytes there are, and what rows reserve of them.

    A batch is one array per layer, as long as its longest row: it takes rows x the longest reservation.
    """

    def __init__(self, bytes_per_token: int, budget_bytes: int) -> None:
        """0 bytes a token, or a budget of 0: nothing is bounded."""
        self._bytes_per_token = bytes_per_token
        self.budget_bytes = budget_bytes

    @property
    def is_bounded(self) -> bool:
        """False when everything fits."""
        return self._bytes_per_token > 0 and self.budget_bytes > 0

    def fits(self, batch: Sequence[int], aside: int) -> bool:
        """Whether rows that reserve `batch` tokens each fit, beside `aside` tokens outside the batch."""
        tokens = len(batch) * max(batch, default=0) + aside
        return not self.is_bounded or tokens * self._bytes_per_token <= self.budget_bytes


def first_reservation(length: int, final_length: int) -> int:
    """Tokens to reserve for a row of `length` tokens that can never have more than `final_length`."""
    return rounded_up(min(length + AHEAD_TOKENS, final_length))


def rounded_up(token_count: int) -> int:
    """To whole steps."""
    return -(-token_count // STEP_TOKENS) * STEP_TOKENS
