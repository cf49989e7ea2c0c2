"""What readers of replies have in common: what they find, and how a row asks them for it."""

import json
from dataclasses import dataclass, field
from typing import Protocol

from mlxgui_grpc.engine.frames import ToolCallPart

_QUOTED_CHARACTERS = 60
"""Of what a model wrote, in a warning."""


@dataclass(slots=True)
class Reading:
    """What a reader has found since it was last asked, and what is final of it."""

    reasoning: str = ""
    text: str = ""
    calls: list[ToolCallPart] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Reader(Protocol):
    """One row's reply, split as it comes. However it is cut into pieces, what was found joins to the same."""

    stop_match: str
    """The stop string that was found; nothing after it counts."""
    is_done: bool
    """The reply ends here, after its calls, though the model may not know."""
    call_count: int

    @property
    def is_in_reasoning(self) -> bool:
        """The model is thinking."""

    def hides(self, token: int) -> bool:
        """Whether it is a special token that is no part of the text."""

    def feed(self, text: str) -> None:
        """Take the next text of the reply."""

    def finish(self, *, is_cut: bool) -> None:
        """The reply is over; `is_cut`: it reached its limit of tokens."""

    def take(self) -> Reading:
        """What is new."""


def quoted(text: str) -> str:
    """What a model wrote, short enough for a warning."""
    return text if len(text) <= _QUOTED_CHARACTERS else text[:_QUOTED_CHARACTERS] + "…"


def is_json(text: str) -> bool:
    """Whether it can be parsed."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
