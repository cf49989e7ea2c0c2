"""The bytes of server-sent events."""

import json

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


def event(payload: JsonObject) -> bytes:
    """One event."""
    return f"data: {encode(payload)}\n\n".encode()


def error_event(error: ApiError) -> bytes:
    """The event for a failure after the first one, when the status is long sent."""
    return event({"error": error.openai_error()})
