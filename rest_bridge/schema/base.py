"""What the models of requests and answers have in common."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

INSTANT = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d$"
Instant = Annotated[str, Field(pattern=INSTANT, description="UTC, to the second, without a zone.")]

_COMMON = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())


class OpenRequest(BaseModel):
    """A body of which unknown fields are reported in the answer's warnings."""

    model_config = ConfigDict(**_COMMON, extra="allow")


class StrictRequest(BaseModel):
    """A body of which unknown fields are refused by name."""

    model_config = ConfigDict(**_COMMON, extra="forbid")


class Answer(BaseModel):
    """What this server says: nothing more, nothing of another type."""

    model_config = ConfigDict(**_COMMON, extra="forbid", strict=True)


def sometimes() -> Any:
    """For a field of an answer that is left out where it has nothing to say."""
    return Field(default_factory=lambda: None)
