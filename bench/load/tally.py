"""Counts what streams deliver inside one measured window."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.protocol import Figures


@dataclass
class Reply:
    """One streamed reply, as its client sees it. Instants are of time.perf_counter()."""

    sent: float
    expected_tokens: int
    first: float | None = None
    last: float | None = None
    # What its events say they carry (1 each where they do not say), and the part of it inside the window.
    counted: int = 0
    counted_in_window: int = 0
    # The server's own count, known when the reply has ended.
    tokens: int | None = None
    is_short: bool = False


@dataclass
class Tally:
    """The figures of one window: `open` it, feed it replies, `close` it. Only what falls inside counts."""

    opened: float | None = None
    closed: float | None = None
    was_cut: bool = False
    replies: list[Reply] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    events: int = 0
    finished: list[Reply] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    _cpu_at_open: float = 0.0
    _cpu_used: float = 0.0

    @property
    def is_open(self) -> bool:
        return self.opened is not None and self.closed is None

    def open(self) -> None:
        self._cpu_at_open = time.process_time()
        self.opened = time.perf_counter()

    def close(self, *, was_cut: bool = False) -> None:
        self.closed = time.perf_counter()
        self.was_cut = was_cut
        self._cpu_used = time.process_time() - self._cpu_at_open

    def begin(self, expected_tokens: int) -> Reply:
        """A request is being written now."""
        return Reply(time.perf_counter(), expected_tokens)

    def event(self, reply: Reply, now: float, token_count: int = 1) -> None:
        """`reply` delivered visible text at instant `now`."""
        reply.counted += token_count
        if self.is_open:
            if not reply.counted_in_window:
                self.replies.append(reply)
            reply.counted_in_window += token_count
            self.events += 1
            if reply.last is not None and self.opened is not None and reply.last >= self.opened:
                self.gaps.append(now - reply.last)
        if reply.first is None:
            reply.first = now
        reply.last = now

    def end(self, reply: Reply, tokens: int | None) -> None:
        """`reply` ended well with `tokens` tokens by the server's count; None: as many as its events said."""
        reply.tokens = tokens or reply.counted
        reply.is_short = reply.tokens != reply.expected_tokens
        if self.is_open:
            self.finished.append(reply)

    def fail(self, error: str) -> None:
        self.errors[error[:160]] = self.errors.get(error[:160], 0) + 1

    def figures(self) -> Figures:
        """Close must have been called, or nothing was measured."""
        if self.opened is None or self.closed is None:
            return Figures(0.0, 0.0, 0, was_cut=True, errors=self.errors)
        # A server may join tokens; replies cut off by the end of the window are scaled as the finished ones.
        total = sum(reply.tokens or 0 for reply in self.finished)
        counted = sum(reply.counted for reply in self.finished)
        scale = total / counted if counted else 1.0
        tokens = sum(
            reply.counted_in_window
            * (reply.tokens / reply.counted if reply.tokens and reply.counted else scale)
            for reply in self.replies
        )
        ttft = [r.first - r.sent for r in self.replies if r.first is not None and r.first >= self.opened]
        tpot = [
            (r.last - r.first) / (r.tokens - 1)
            for r in self.finished
            if r.first is not None and r.last is not None and r.tokens is not None and r.tokens > 1
        ]
        return Figures(
            tokens=round(tokens, 1),
            elapsed_seconds=round(self.closed - self.opened, 4),
            request_count=len(self.finished),
            tokens_per_event=round(tokens / self.events, 3) if self.events else None,
            ttft_p50_ms=milliseconds(percentile(ttft, 0.5)),
            ttft_p95_ms=milliseconds(percentile(ttft, 0.95)),
            itl_p50_ms=milliseconds(percentile(self.gaps, 0.5)),
            itl_p95_ms=milliseconds(percentile(self.gaps, 0.95)),
            tpot_p50_ms=milliseconds(percentile(tpot, 0.5)),
            tpot_p95_ms=milliseconds(percentile(tpot, 0.95)),
            client_cpu_seconds=round(self._cpu_used, 3),
            short_reply_count=sum(reply.is_short for reply in self.finished),
            was_cut=self.was_cut,
            errors=self.errors,
        )


def percentile(values: Sequence[float], share: float) -> float | None:
    """Linear interpolation between the closest ranks; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    rank = (len(ordered) - 1) * share
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
