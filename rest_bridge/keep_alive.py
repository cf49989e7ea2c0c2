"""Reads how long a model is to stay in memory: seconds, or a number with a unit."""

import re

from google.protobuf import duration_pb2

from rest_bridge.errors import invalid

_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)", re.ASCII)
_TEXT = re.compile(rf"-?(?:{_PART.pattern})+", re.ASCII)
_SECONDS = re.compile(r"-?\d+(?:\.\d+)?", re.ASCII)
# What protobuf's Duration can hold.
_MAX_SECONDS = 315_576_000_000


def read_keep_alive(value: object) -> duration_pb2.Duration:
    """`5m`, `1h30m`, `300` or 300; 0 unloads at once, a negative one never. Raises ApiError (400)."""
    seconds: float
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = value
    elif isinstance(value, str) and _SECONDS.fullmatch(value):
        seconds = float(value)
    elif isinstance(value, str) and _TEXT.fullmatch(value):
        seconds = sum(float(number) * _UNIT_SECONDS[unit] for number, unit in _PART.findall(value))
        if value.startswith("-"):
            seconds = -seconds
    else:
        raise invalid("`keep_alive` must be seconds or a span such as `5m`.", "keep_alive")
    if not -_MAX_SECONDS <= seconds <= _MAX_SECONDS:
        raise invalid("`keep_alive` is out of range.", "keep_alive")
    duration = duration_pb2.Duration()
    duration.FromMilliseconds(round(seconds * 1000))
    return duration
