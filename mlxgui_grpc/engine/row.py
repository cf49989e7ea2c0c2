"""One sequence: its tokens, its place in the queue, and what becomes of each token that is drawn for it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.detokenizer import Detokenizer, StopMatcher
from mlxgui_grpc.engine.kv_budget import first_reservation
from mlxgui_grpc.engine.sampling import RowSampling


@dataclass(eq=False, slots=True)
class EngineRow:
    """One sequence from its admission to its last token."""

    key: int
    prompt: list[int]
    sampling: RowSampling
    detokenizer: Detokenizer
    stop: StopMatcher
    token_limit: int
    priority: int = 0
    submit_time: float = field(default_factory=time.monotonic)
    prefill_time: float = 0.0
    decode_time: float = 0.0
    generated: list[int] = field(default_factory=list)
    unreported_count: int = 0
    """Tokens decoded whose text is still held back: they are counted with the next text."""
    reserved_count: int = 0
    """Tokens that there is cache for."""

    @property
    def place(self) -> tuple[float, int]:
        """Where it stands in the queue: the smallest is next."""
        return (self.submit_time - self.priority * frames.PRIORITY_SECONDS, self.key)

    @property
    def length(self) -> int:
        """Its tokens so far."""
        return len(self.prompt) + len(self.generated)

    @property
    def tokens(self) -> list[int]:
        """What a prefill has to compute: more than the prompt when the row was decoding before."""
        return self.prompt + self.generated if self.generated else self.prompt

    def reserve(self) -> int:
        """Decide how much cache to start with."""
        self.reserved_count = first_reservation(self.length, len(self.prompt) + self.token_limit)
        return self.reserved_count

    def advance(
        self, token: int, end_tokens: frozenset[int], clock: Callable[[], float]
    ) -> frames.Piece | None:
        """Account for one token; the piece to deliver, if there is one."""
        if not self.generated:
            self.decode_time = clock()
        self.generated.append(token)
        self.unreported_count += 1
        finish: Literal["", "stop", "length"] = ""
        if token in end_tokens:
            new, finish = self.detokenizer.flush(), "stop"
        else:
            new = self.detokenizer.add(token)
            if len(self.generated) >= self.token_limit:
                new, finish = new + self.detokenizer.flush(), "length"
        text, match = self.stop.add(new)
        if match:
            finish = "stop"
        elif finish:
            text += self.stop.flush()
        if not text and not finish:
            return None
        count, self.unreported_count = self.unreported_count, 0
        return frames.Piece(self.key, count, text, finish, match, self._spent(clock()) if finish else None)

    def _spent(self, now: float) -> frames.Spent:
        return frames.Spent(
            queue=self.prefill_time - self.submit_time,
            prefill=self.decode_time - self.prefill_time,
            decode=now - self.decode_time,
        )
