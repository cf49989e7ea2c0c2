"""Names of installed models: what they may be, and what a source is called by default."""

import re

from mlxgui_grpc.errors import InvalidRequestError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_DEVICES = frozenset(
    ["con", "prn", "aux", "nul", *(f"com{n}" for n in range(1, 10)), *(f"lpt{n}" for n in range(1, 10))]
)


def check_name(name: str) -> str:
    """The name, if an installed model may have it; else InvalidRequestError."""
    is_device = name.partition(".")[0].casefold() in _DEVICES
    if not _NAME.fullmatch(name) or ".." in name or is_device:
        raise InvalidRequestError(
            "name must be 1 to 96 letters, digits, dots, dashes or underscores, the first a letter or digit",
            field="name",
        )
    return name


def default_name(source: str) -> str:
    """The last part of a hub id or path in lower case, made to fit."""
    last = source.rstrip("/").rpartition("/")[2].lower()
    name = re.sub(r"[^a-z0-9._-]+", "-", last).strip("-._")
    return check_name(re.sub(r"\.{2,}", ".", name)[:96] or "model")


def suggested_name(name: str, author: str) -> str:
    """A free-standing alternative for a name that is taken."""
    return default_name(f"{author}-{name}" if author else f"{name}-2")
