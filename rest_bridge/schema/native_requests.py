"""Bodies and query parameters of the documented routes."""

from typing import Any, Literal

from pydantic import Field

from rest_bridge.schema.base import StrictRequest


class InstallRequest(StrictRequest):
    """One of `model_id` and `path`."""

    model_id: str | None = Field(None, examples=["mlx-community/Qwen3-4B-4bit"])
    """A repository of the hub."""
    path: str | None = None
    """A directory of this machine, below a root that the server was told to trust."""
    name: str | None = None
    revision: str | None = None
    force: bool | None = None


class GenerateRequest(StrictRequest):
    prompt: str = Field(examples=["The capital of France is"])
    max_tokens: int | None = Field(None, ge=1, le=16384)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    repetition_context_size: int | None = Field(None, ge=0, le=16384)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    max_thinking_tokens: int | None = Field(None, ge=0, le=16384)
    priority: int | None = Field(None, ge=-100, le=100)
    keep_alive: int | str | None = None


class PriorityRequest(StrictRequest):
    priority: int = Field(ge=-100, le=100)


class SettingRequest(StrictRequest):
    value: Any = Field(examples=["INFO"])


class InstallQuery(StrictRequest):
    wait: bool | None = None
    """false answers 202 with an operation at once; `Prefer: respond-async` does the same."""


class UpdateParameters(InstallQuery):
    revision: str | None = None


class LoadParameters(StrictRequest):
    priority: int | None = Field(None, ge=-100, le=100)
    keep_alive: int | str | None = None
    """Seconds or `5m`; 0 at once, -1 never."""


class ForceParameters(StrictRequest):
    force: bool | None = None
    """End the requests that run."""


class DeleteParameters(ForceParameters):
    remove_files: bool | None = None
    """What this server downloaded; never a directory of the user's."""


class EstimateQuery(StrictRequest):
    concurrent_requests: int | None = Field(None, ge=1, lt=2**31)
    tokens_per_request: int | None = Field(None, ge=1, lt=2**31)


class OperationsQuery(StrictRequest):
    include_done: bool | None = None
    limit: int | None = Field(None, ge=1, le=1000)
    page_token: str | None = None


class ManagerModelsQuery(StrictRequest):
    include_available: bool | None = None
    """Also models that only lie in the hub's cache."""


class PageQuery(StrictRequest):
    limit: int | None = Field(None, ge=1, le=100)
    page_token: str | None = None


class WordsQuery(PageQuery):
    query: str | None = None


class SearchQuery(WordsQuery):
    sort: Literal["downloads", "likes", "created", "updated"] | None = None


class CompatibleQuery(WordsQuery):
    max_memory_gb: float | None = Field(None, gt=0, lt=2**33)


class SettingsQuery(StrictRequest):
    details: bool | None = None


class GraceParameters(StrictRequest):
    grace_seconds: float | None = Field(None, ge=0, le=3600)
