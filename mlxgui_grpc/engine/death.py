"""Why a worker process is gone, judged from what is known of it, and what its callers are told."""

import signal
import sys
from dataclasses import dataclass
from typing import Literal

from mlxgui_grpc.errors import BY_REASON, ModelServerError

EXIT_TEMPLATE = 70
"""A worker ends itself so when a chat template runs without end."""
EXIT_MEMORY = 71
"""A worker ends itself so when memory ran out and it lived to notice."""

MEMORY_WORDS = (
    "out of memory",
    "memory allocation",
    "insufficient memory",
    "unable to allocate",
    "cannot allocate memory",
    "bad_alloc",
    "memoryerror",
)
"""How exceptions and last words say that memory ran out; the first three are the document's, in lower case."""

STARVATION_WORDS = ("resource temporarily unavailable", "unable to read from file", "start new thread")
"""What MLX and Python say when a thread or a buffer cannot be had: of memory, if there is other evidence for it."""

_MEMORY_SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
"""What a process dies of whose memory ran out: the kernel's killer, or the use of what was not allocated."""

Kind = Literal["memory", "stall", "template", "stopped", "crash"]


@dataclass(frozen=True, slots=True)
class Death:
    """How a worker ended."""

    kind: Kind
    message: str
    """One sentence that names the model and the way out."""
    reason: str = "ENGINE_DEAD"
    """Of the error that its open calls end with."""

    def error(self, label: str) -> ModelServerError:
        """What a call is told that was open when the worker of model `label` ended."""
        return BY_REASON[self.reason](self.message, model=label)


def speaks_of_memory(text: str) -> bool:
    """True when a message or a last word says that memory ran out."""
    text = text.lower()
    return any(word in text for word in MEMORY_WORDS)


def is_memory_error(error: BaseException) -> bool:
    """The documented signs of memory running out, by type and by words."""
    return isinstance(error, MemoryError) or speaks_of_memory(str(error))


def speaks_of_starvation(text: str) -> bool:
    """True when a message may be about memory without saying so."""
    text = text.lower()
    return any(word in text for word in STARVATION_WORDS)


def judge(
    label: str,
    status: int | None,
    *,
    ended_by_us: bool,
    last_words: str,
    memory_evidence: str,
    said_memory: bool = False,
    platform: str = sys.platform,
) -> Death:
    """Judge an exit `status` (as subprocess has it: negative for a signal; None: unknown).

    `last_words` is the end of its output; `memory_evidence` says, in words, why memory is suspected, or nothing;
    `said_memory`: it reported a lack of memory before it ended.
    """
    words = exit_words(status)
    said_memory = said_memory or status == EXIT_MEMORY
    if ended_by_us and not said_memory:
        return Death("stopped", f"Model '{label}' was unloaded while the request ran ({words})")
    if status in (-signal.SIGALRM, EXIT_TEMPLATE):
        return Death(
            "template",
            f"The chat template of model '{label}' runs without end; its worker was stopped",
            # The kernel's alarm does not say whose template it was; a worker that ends itself has said so.
            "MODEL_UNSAFE" if status == -signal.SIGALRM else "ENGINE_DEAD",
        )
    cause = "it said so" if said_memory else _memory_cause(status, last_words, memory_evidence, platform)
    if cause:
        return Death(
            "memory",
            f"The worker of model '{label}' ran out of memory ({words}; {cause}); "
            "the model can be loaded again: send fewer or shorter requests at once, or unload other models",
            "OUT_OF_MEMORY",
        )
    message = f"The worker of model '{label}' ended ({words}); the model can be loaded again"
    # It ends so by itself after a load that failed, having said why: another try would fail as well.
    return Death("stopped" if status == 0 else "crash", message)


def judge_stall(label: str, words: str, memory_evidence: str) -> Death:
    """Judge a worker that did nothing any more, `words` saying for how long.

    While it loads, evidence of memory counts: MLX can wait for ever for memory that it did not get.
    """
    if memory_evidence:
        return Death(
            "memory",
            f"The worker of model '{label}' {words}: memory ran out ({memory_evidence}); unload other models",
            "OUT_OF_MEMORY",
        )
    return Death("stall", f"The worker of model '{label}' {words}; the model can be loaded again")


def _memory_cause(status: int | None, last_words: str, evidence: str, platform: str) -> str:
    if not status:
        return ""
    if speaks_of_memory(last_words):
        return "its last words say so"
    if evidence and (-status in _MEMORY_SIGNALS or speaks_of_starvation(last_words)):
        return evidence
    if platform == "darwin" and status == -signal.SIGKILL:
        # Only a Mac can show it: jetsam kills without a word, and nobody else here sends SIGKILL.
        return "the system killed it, as macOS does when memory is short"
    return ""


def exit_words(status: int | None) -> str:
    """An exit status in words."""
    if status is None:
        return "connection lost"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"
