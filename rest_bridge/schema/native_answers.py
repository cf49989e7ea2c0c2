"""What the documented routes answer; most of it is a message of the contract."""

from typing import Any, Literal

from pydantic import RootModel

from mlxgui.v1 import model_pb2, system_pb2
from rest_bridge.errors import BY_REASON
from rest_bridge.schema.base import Answer, Instant, sometimes
from rest_bridge.schema.descriptors import answer_model, message_model, setting_fields, word_type
from rest_bridge.schema.openai_answers import FinishReason, OpenAIModel

ModelState: Any = word_type(model_pb2.ModelState.DESCRIPTOR)
OperationKind: Any = word_type(model_pb2.Operation.Kind.DESCRIPTOR)
ErrorReason: Any = Literal[tuple(BY_REASON)]
SettingSource: Any = word_type(system_pb2.SettingSource.DESCRIPTOR)
Setting = bool | int | float | str | list[str]


class NativeError(Answer):
    """The documented error."""

    detail: str


class Root(Answer):
    name: str
    version: str
    status: str


class Health(Answer):
    status: Literal["healthy"]


class Unhealthy(Answer):
    status: Literal["unhealthy"]
    detail: str


class Said(Answer):
    message: str


Model: Any = message_model(model_pb2.Model.DESCRIPTOR)
InstalledModel: Any = message_model(
    model_pb2.Model.DESCRIPTOR,
    "InstalledModel",
    {name: field.annotation for name, field in OpenAIModel.model_fields.items() if name != "id"},
)


class ModelList(Answer):
    """OpenAI's list in `data`, the documented one in `models`."""

    object: Literal["list"]
    data: list[OpenAIModel]
    models: list[Model]


class Installed(Answer):
    message: str
    model_name: str
    model_id: str | None
    status: Literal["installed"]
    path: str = sometimes()
    warnings: list[str] = sometimes()


class Updated(Answer):
    message: str
    model_name: str
    model_id: str | None
    revision: str | None
    status: Literal["updated", "up_to_date"]
    warnings: list[str] = sometimes()


class Loaded(Answer):
    message: str
    status: Literal["loaded"]
    memory_warning: str = sometimes()
    evicted_models: list[str] = sometimes()
    warnings: list[str] = sometimes()


class Unloaded(Answer):
    message: str
    status: Literal["unloaded"]


class Deleted(Answer):
    message: str
    removed_files: bool
    status: Literal["deleted"]
    reason: str = sometimes()
    """Why files stayed."""
    freed_bytes: int = sometimes()


class Pinned(Answer):
    message: str
    pinned: bool
    status: Literal["pinned", "unpinned"]


class ModelHealth(Answer):
    model: str
    status: ModelState | None
    healthy: bool
    last_used: Instant | None
    reason: str = sometimes()


LoadEstimate: Any = message_model(
    model_pb2.EstimateLoadResponse.DESCRIPTOR, "LoadEstimate", {"model": str, "refusal": str | None}
)


class GenerateUsage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class GenerateTiming(Answer):
    generation_time_seconds: float
    tokens_per_second: float


class Generated(Answer):
    model: str
    prompt: str
    text: str
    finish_reason: FinishReason
    usage: GenerateUsage
    timing: GenerateTiming
    warnings: list[str] = sometimes()


InstallProgress: Any = message_model(model_pb2.InstallProgress.DESCRIPTOR, exact_bytes=True)
LoadProgress: Any = message_model(model_pb2.LoadProgress.DESCRIPTOR, exact_bytes=True)
Adapter: Any = message_model(model_pb2.Adapter.DESCRIPTOR)


class OperationFailure(Answer):
    detail: str
    reason: ErrorReason
    field: str | None
    metadata: dict[str, str]


class Operation(Answer):
    id: str
    kind: OperationKind | None
    model: str
    status: Literal["running", "succeeded", "failed", "cancelled"]
    done: bool
    created_at: Instant | None
    updated_at: Instant | None
    progress: InstallProgress | LoadProgress | None
    error: OperationFailure | None
    result: InstalledModel | Adapter | None
    warnings: list[str]


class Operations(Answer):
    operations: list[Operation]
    next_page_token: str | None


class LoadedConfig(Answer):
    model_type: str | None
    """The hub's word for the task."""
    estimated_memory_gb: float


ManagerStatus: Any = message_model(model_pb2.ManagerStatus.DESCRIPTOR)
QueuedLoad: Any = message_model(model_pb2.QueuedLoad.DESCRIPTOR)
LoadedModel: Any = message_model(
    model_pb2.LoadedModel.DESCRIPTOR,
    more={"memory_usage_gb": float, "config": LoadedConfig},
    without=("name", "memory_gb", "estimated_memory_gb"),
)
ModelStatus: Any = message_model(
    model_pb2.LoadedModel.DESCRIPTOR, "ModelStatus", {"loaded": bool, "memory_usage_gb": float}
)


class ManagerModels(Answer):
    models: list[Model]


class ManagerSnapshot(Answer):
    """What is in memory by name, the manager's totals, and the loads that wait."""

    loaded_models: dict[str, LoadedModel]
    system_status: ManagerStatus
    queue_status: list[QueuedLoad]


class Priority(Answer):
    model: str
    priority: int
    message: str
    queue_position: int | None


SystemStatus: Any = message_model(
    system_pb2.GetSystemStatusResponse.DESCRIPTOR, "SystemStatus", {"mlx_compatible": bool}
)


class SettingInDetail(Answer):
    value: Setting
    source: SettingSource | None
    pending_restart: bool
    note: str | None


Settings: Any = answer_model("Settings", setting_fields())
SettingsInDetail: Any = answer_model("SettingsInDetail", dict.fromkeys(setting_fields(), SettingInDetail))


class AnySettings(RootModel[Settings | SettingsInDetail]):
    """The values in effect; with `details` where each comes from."""


class SettingUpdated(Answer):
    key: str
    value: Setting
    updated: Literal[True]
    pending_restart: Literal[True] = sometimes()
    note: str = sometimes()


CatalogModel: Any = message_model(model_pb2.CatalogModel.DESCRIPTOR)


class CatalogPage(Answer):
    models: list[CatalogModel]
    total: int
    next_page_token: str | None


class Categories(Answer):
    categories: dict[str, list[str]]
