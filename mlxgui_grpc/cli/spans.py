"""Spans of time as users write them."""

import re

from mlxgui_grpc.cli.failures import EXIT_USAGE, CommandError

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_PARTS = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")


def parse_seconds(text: str | None, flag: str) -> float | None:
    """Seconds of `30`, `90s`, `5m`, `1h30m`, with a minus sign too; None for None.

    Anything else is a CommandError that names `flag`.
    """
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        pass
    sign, rest = (-1.0, text[1:]) if text.startswith("-") else (1.0, text)
    parts = _PARTS.findall(rest)
    if not parts or "".join(number + unit for number, unit in parts) != rest:
        raise CommandError(f"{flag} '{text}' is not a span: write seconds, or 90s, 5m, 1h30m", EXIT_USAGE)
    return sign * sum(float(number) * _SECONDS[unit] for number, unit in parts)
