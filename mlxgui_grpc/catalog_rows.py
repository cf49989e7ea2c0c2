"""The rows of the registry, as plain nouns."""

import sqlite3
import time
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any


class Origin(StrEnum):
    """Where the files of a model came from."""

    HUB = "hub"
    DIRECTORY = "directory"
    DEMO = "demo"


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledModel:
    """One row of the registry."""

    id: int = 0
    name: str
    origin: Origin
    path: Path
    huggingface_id: str = ""
    revision: str = ""
    is_download: bool = False
    type: str = "text"
    size_bytes: int = 0
    memory_bytes: int = 0
    context_length: int = 0
    metadata: str = "{}"
    error_message: str = ""
    use_count: int = 0
    create_time: float = field(default_factory=time.time)
    update_time: float = field(default_factory=time.time)
    last_use_time: float | None = None
    pinned: bool = False
    """Never evicted."""

    @property
    def author(self) -> str:
        """The owner part of the hub id."""
        return self.huggingface_id.partition("/")[0] if "/" in self.huggingface_id else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationRecord:
    """The durable part of a long operation."""

    id: str
    kind: str
    model: str
    request: str = "{}"
    state: str = "running"
    error_reason: str = ""
    error_message: str = ""
    create_time: float = field(default_factory=time.time)
    update_time: float = field(default_factory=time.time)


def name_key(name: str) -> str:
    """What names are compared by: they differ by more than case."""
    return name.casefold()


def columns_of_model(model: InstalledModel) -> dict[str, Any]:
    """What the table has of a model, but for its number."""
    values = {name: getattr(model, name) for name in InstalledModel.__slots__ if name != "id"}
    values |= {"path": str(model.path), "origin": str(model.origin)}
    values |= {"is_download": int(model.is_download), "pinned": int(model.pinned)}
    return {**values, "name_key": name_key(model.name)}


def model_of(row: sqlite3.Row) -> InstalledModel:
    """The model of a row."""
    values = dict(row)
    del values["name_key"]
    values |= {
        "path": Path(values["path"]),
        "origin": Origin(values["origin"]),
        "is_download": bool(values["is_download"]),
        "pinned": bool(values["pinned"]),
    }
    return InstalledModel(**values)


def columns_of_operation(record: OperationRecord) -> dict[str, Any]:
    """What the table has of an operation."""
    return {name: getattr(record, name) for name in OperationRecord.__slots__}
