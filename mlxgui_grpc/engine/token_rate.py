"""How many tokens a second a worker delivers."""

from collections import deque

WINDOW_SECONDS = 5.0
_SLOTS_PER_SECOND = 4


class TokenRate:
    """A sliding window of token counts. Times are of any one clock, in seconds."""

    def __init__(self) -> None:
        self._slots: deque[list[int]] = deque()  # [slot, tokens]

    def add(self, now: float, token_count: int) -> None:
        """Note tokens that came."""
        slot = int(now * _SLOTS_PER_SECOND)
        if self._slots and self._slots[-1][0] == slot:
            self._slots[-1][1] += token_count
            return
        self._slots.append([slot, token_count])
        self._forget(now)

    def per_second(self, now: float) -> float:
        """The mean over the window, or since its first token if that came later; 0 when nothing came in it."""
        self._forget(now)
        if not self._slots:
            return 0.0
        span = now - self._slots[0][0] / _SLOTS_PER_SECOND
        return sum(tokens for _, tokens in self._slots) / min(max(span, 1.0), WINDOW_SECONDS)

    def _forget(self, now: float) -> None:
        oldest = (now - WINDOW_SECONDS) * _SLOTS_PER_SECOND
        while self._slots and self._slots[0][0] < oldest:
            self._slots.popleft()
