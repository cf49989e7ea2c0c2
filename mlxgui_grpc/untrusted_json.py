"""Reads values of JSON that nobody vouches for: what is not of the kind that was asked for counts as absent."""

from typing import Any


def mapping(value: Any) -> dict[str, Any]:
    """An object, else an empty one."""
    return value if isinstance(value, dict) else {}


def positive(value: Any) -> int:
    """A whole number from 1 to 2**31 - 1, else 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31 else 0
