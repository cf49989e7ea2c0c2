"""The bytes of server-sent events."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rest_bridge.errors import ApiError, JsonObject

DONE = b"data: [DONE]\n\n"

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    # Tells nginx, and what copies it, to pass each event on at once.
    "X-Accel-Buffering": "no",
}

# ASCII only: no character that some client takes for the end of a line can occur in an event.
encode = json.JSONEncoder(separators=(",", ":")).encode


def event(payload: JsonObject, name: str | None = None) -> bytes:
    """One event; the dialects that name their events do so in a line of its own."""
    line = "" if name is None else f"event: {name}\n"
    return f"{line}data: {encode(payload)}\n\n".encode()


def error_event(error: ApiError) -> bytes:
    """The event for a failure after the first one, when the status is long sent."""
    return event({"error": error.openai_error()})


@dataclass(frozen=True)
class Stream:
    """An answer as events, and what is sent where they fail, and where they end either way."""

    events: Iterator[bytes]
    failure: Callable[[ApiError], bytes] = error_event
    end: bytes = DONE
