"""Workloads as data: what the streaming clients ask of one model, and for how long."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Closed-loop chat: every client sends its next request when its reply ends."""

    model: str
    # The model counts about one token a word and 5 for the chat template.
    prompt_words: int
    # Tokens of every reply. The models of make_models.py never end one earlier.
    reply_tokens: int
    # Longest first reply of a client, which only warms the cell up; from client to client they grow to it.
    warm_tokens: int
    # Shortest measured window; it is stretched to whole request cycles.
    seconds: float
    # A window still open after this is closed where it stands and marked as cut.
    limit_seconds: float


# A round of 32 small-fp32 streams takes over 10 s, so its windows are whole rounds and its warm-up is short.
WORKLOADS = {
    "micro": Workload("micro", 20, 64, 64, seconds=3.0, limit_seconds=30),
    "small-fp32": Workload("small-fp32", 20, 32, 16, seconds=4.0, limit_seconds=90),
}
QUICK_WORKLOADS = {"micro": Workload("micro", 20, 64, 24, seconds=1.0, limit_seconds=15)}
CLIENT_COUNTS = (1, 4, 16, 32)
