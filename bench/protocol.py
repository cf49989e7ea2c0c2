"""The JSON lines between the harness and its client processes: orders in, marks and figures out."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TextIO

Mode = Literal["lock-step", "staggered", ""]


@dataclass(frozen=True)
class Order:
    """One thing to do: ``run`` a cell of closed-loop clients, or send a request ``once``."""

    kind: Literal["run", "once"]
    # Base URL, gRPC address, or model folder, as the client understands it.
    endpoint: str
    model: str
    prompt_words: int
    reply_tokens: int
    seed: int
    # Which prompt of the seed's series a ``once`` sends.
    prompt_index: int = 0
    clients: int = 1
    warm_tokens: int = 0
    seconds: float = 0.0
    limit_seconds: float = 60.0
    # Draw reply lengths from 0.5 to 1.5 times reply_tokens, so that replies do not end together.
    spread_lengths: bool = False
    mode: Mode = ""

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "Order":
        return cls(**json.loads(line))


@dataclass(frozen=True)
class Figures:
    """What the clients of one cell saw in its window. Times in milliseconds, None where nothing was seen."""

    tokens: float
    elapsed_seconds: float
    request_count: int
    tokens_per_event: float | None = None
    # Request written to first visible text.
    ttft_p50_ms: float | None = None
    ttft_p95_ms: float | None = None
    # Gap between two events of one reply, as read by the client.
    itl_p50_ms: float | None = None
    itl_p95_ms: float | None = None
    # (last - first event) / (tokens - 1) of each reply: steady also where the client reads in bursts.
    tpot_p50_ms: float | None = None
    tpot_p95_ms: float | None = None
    client_cpu_seconds: float = 0.0
    short_reply_count: int = 0
    was_cut: bool = False
    errors: dict[str, int] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.elapsed_seconds if self.elapsed_seconds else 0.0

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Figures":
        return cls(**value)


def send(stream: TextIO, **message: object) -> None:
    """Write one message line and flush it: the harness reads the clock and the CPU counters on arrival."""
    stream.write(json.dumps(message) + "\n")
    stream.flush()
