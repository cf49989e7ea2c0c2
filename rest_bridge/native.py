"""The documented native bodies as `mlxgui.v1` messages, and back. Pure: no Flask, no I/O.

Messages become JSON by their descriptors and a table of the documented names; a route adds what is its own.
"""

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

from google.protobuf import duration_pb2, field_mask_pb2, timestamp_pb2
from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message import Message

from mlxgui.v1 import common_pb2, inference_pb2, model_pb2, system_pb2
from rest_bridge.errors import ApiError, JsonObject, invalid, reason_name
from rest_bridge.json_body import Fields, type_name
from rest_bridge.openai import finish_reason, read_sampling, read_scheduling

GIB = 1024**3

# The contract's names on the left, the document's on the right.
_NAMES = {
    "state": "status",
    "create_time": "created_at",
    "update_time": "updated_at",
    "last_use_time": "last_used_at",
    "load_time": "loaded_at",
    "expire_time": "expires_at",
    "queue_time": "queued_at",
    "start_time": "started_at",
    "metadata_json": "metadata",
    "download_count": "downloads",
    "like_count": "likes",
    "loaded_model_count": "loaded_models_count",
    "queued_load_count": "queue_size",
    "inactivity_timeout": "inactivity_timeout_minutes",
}


def message_json(
    message: Message, names: Mapping[str, str] = _NAMES, *, exact_bytes: bool = False
) -> JsonObject:
    """Every field of a message: unset ones as null, enums as lower-case words, instants in UTC without a zone.

    Sizes are GiB under a name in `_gb`, as documented, or with `exact_bytes` what they are.
    """
    body: JsonObject = {}
    for field in message.DESCRIPTOR.fields:
        name = names.get(field.name, field.name)
        value = _field_json(message, field, names, exact_bytes)
        if field.name.endswith("_bytes") and not exact_bytes and not field.is_repeated:
            name = name.removesuffix("_bytes") + "_gb"
            value = None if value is None else gigabytes(value)
        elif name.endswith("_minutes") and field.name == "inactivity_timeout":
            value = None if value is None else _whole(value / 60)
        body[name] = value
    return body


def gigabytes(size_bytes: int) -> float:
    """GiB, to four significant digits."""
    if size_bytes == 0:
        return 0.0
    size = size_bytes / GIB
    return round(size, 3 - math.floor(math.log10(abs(size))))


def instant(time: timestamp_pb2.Timestamp) -> str:
    """The document's form of an instant: UTC, to the second, without a zone."""
    return time.ToDatetime().replace(microsecond=0).isoformat()


def _field_json(message: Message, field: Any, names: Mapping[str, str], exact_bytes: bool) -> Any:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(value)
    if field.is_repeated:
        return [_value_json(item, field, names, exact_bytes) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _value_json(value, field, names, exact_bytes)


def _value_json(value: Any, field: Any, names: Mapping[str, str], exact_bytes: bool) -> Any:
    match value:
        case timestamp_pb2.Timestamp():
            return instant(value)
        case duration_pb2.Duration():
            return _whole(value.seconds + value.nanos / 1e9)
        case Message():
            return message_json(value, names, exact_bytes=exact_bytes)
        case bytes():
            return base64.b64encode(value).decode()
        case str() if field.name.endswith("_json"):
            return json.loads(value) if value else {}
        # An empty text means "none" all over the contract, and the document says null.
        case "":
            return None
    if field.enum_type is not None:
        return _enum_word(field.enum_type, value)
    return value


def _enum_word(enum: EnumDescriptor, number: int) -> str | None:
    value = enum.values_by_number.get(number)
    if value is None or number == 0:
        return None
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return value.name.removeprefix(prefix).lower()


def _whole(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


# --- Models --------------------------------------------------------------------------------------


def model_json(model: model_pb2.Model) -> JsonObject:
    """One model as documented, which is OpenAI's model object too, but for `id`: that stays the number."""
    return {**message_json(model), **_openai_model(model), "id": model.id}


def model_list(models: list[model_pb2.Model]) -> JsonObject:
    """The body of /v1/models: what the document has there, both times."""
    return {
        "object": "list",
        "data": [_openai_model(model) for model in models],
        "models": [message_json(model) for model in models],
    }


def _openai_model(model: model_pb2.Model) -> JsonObject:
    return {
        "id": model.name,
        "object": "model",
        "created": model.create_time.seconds,
        "owned_by": "mlx-gui",
        "permission": [],
        "root": model.name,
        "parent": None,
    }


def install_request(body: JsonObject) -> model_pb2.InstallModelRequest:
    """What a body of /v1/models/install asks for. Raises ApiError (400)."""
    fields = Fields(body)
    request = model_pb2.InstallModelRequest(
        name=fields.text("name") or "",
        revision=fields.text("revision") or "",
        force=fields.boolean("force") or False,
    )
    model_id = fields.text("model_id")
    path = fields.text("path")
    fields.refuse_unread()
    if model_id and path:
        raise invalid("Send `model_id` or `path`, not both.", "path")
    if path:
        request.local_directory = path
    elif model_id:
        request.model_id = model_id
    else:
        raise invalid("`model_id` is missing; it names a repository of the hub, as `owner/name`.", "model_id")
    return request


def installed(operation: model_pb2.Operation, request: model_pb2.InstallModelRequest) -> JsonObject:
    """The documented answer to an installation that succeeded."""
    model = operation.success
    body: JsonObject = {
        "message": f"Model '{model.name}' installed successfully",
        "model_name": model.name,
        "model_id": model.huggingface_id or request.model_id or None,
        "status": "installed",
    }
    if request.local_directory:
        body["path"] = model.path
    return _with_warnings(body, operation.warnings)


def loaded(operation: model_pb2.Operation) -> JsonObject:
    """The documented answer to a load that succeeded."""
    name = operation.success.name or operation.model
    body: JsonObject = {"message": f"Model '{name}' loaded successfully", "status": "loaded"}
    if operation.load.memory_warning:
        body["memory_warning"] = operation.load.memory_warning
    if operation.load.evicted_models:
        body["evicted_models"] = list(operation.load.evicted_models)
    return _with_warnings(body, operation.warnings)


def unloaded(model: model_pb2.Model) -> JsonObject:
    """The documented answer to an unload."""
    return {"message": f"Model '{model.name}' unloaded successfully", "status": "unloaded"}


def deleted(response: model_pb2.DeleteModelResponse) -> JsonObject:
    """The documented answer to a deletion, and why files stayed if they did."""
    body: JsonObject = {
        "message": f"Model '{response.name}' deleted successfully",
        "removed_files": response.removed_files,
        "status": "deleted",
    }
    if response.kept_reason:
        body["reason"] = response.kept_reason
    if response.freed_bytes:
        body["freed_bytes"] = response.freed_bytes
    return body


def model_health(response: model_pb2.CheckModelHealthResponse) -> JsonObject:
    """The documented answer about a model's health."""
    body = message_json(response)
    answer: JsonObject = {
        "model": response.name,
        "status": body["status"],
        "healthy": response.healthy,
        "last_used": body["last_used_at"],
    }
    return {**answer, "reason": response.reason} if response.reason else answer


def operation_json(operation: model_pb2.Operation) -> JsonObject:
    """One operation: its state as a word, its progress, and its error or result once it is done."""
    body: JsonObject = {
        "id": operation.id,
        "kind": _enum_word(model_pb2.Operation.Kind.DESCRIPTOR, operation.kind),
        "model": operation.model,
        "status": operation_status(operation),
        "done": operation.done,
        "created_at": instant(operation.create_time) if operation.HasField("create_time") else None,
        "updated_at": instant(operation.update_time) if operation.HasField("update_time") else None,
        "progress": None,
        "error": None,
        "result": None,
        "warnings": list(operation.warnings),
    }
    progress = operation.WhichOneof("progress")
    if progress is not None:
        body["progress"] = message_json(getattr(operation, progress), exact_bytes=True)
    match operation.WhichOneof("result"):
        case "error":
            body["error"] = {
                "detail": operation.error.message,
                "reason": reason_name(operation.error.reason),
                "field": operation.error.field or None,
                "metadata": dict(operation.error.metadata),
            }
        case "success":
            body["result"] = model_json(operation.success)
        case "adapter":
            body["result"] = message_json(operation.adapter)
    return body


def operation_status(operation: model_pb2.Operation) -> str:
    """running, succeeded, failed or cancelled."""
    if not operation.done:
        return "running"
    if operation.WhichOneof("result") != "error":
        return "succeeded"
    cancelled = operation.error.reason == common_pb2.ERROR_REASON_CANCELLED
    return "cancelled" if cancelled else "failed"


# --- Generation ----------------------------------------------------------------------------------


def generate_request(name: str, body: JsonObject) -> inference_pb2.GenerateRequest:
    """What a body of /v1/models/{name}/generate asks for. Raises ApiError (400)."""
    fields = Fields(body)
    prompt = fields.text("prompt")
    if prompt is None:
        fields.missing("prompt")
    request = inference_pb2.GenerateRequest(
        model=name,
        prompts=[inference_pb2.Prompt(text=prompt)],
        load_policy=common_pb2.LOAD_POLICY_REQUIRE_LOADED,
    )
    read_sampling(fields, request.sampling)
    read_scheduling(fields, request)
    fields.refuse_unread()
    return request


def generated(response: inference_pb2.GenerateResponse, request: inference_pb2.GenerateRequest) -> JsonObject:
    """The documented answer to a generation."""
    choice = response.choices[0]
    usage = response.usage
    timing = response.timing
    seconds = sum(
        sign * span.ToTimedelta().total_seconds()
        for sign, span in ((1, timing.total), (-1, timing.queue), (-1, timing.load))
    )
    body: JsonObject = {
        "model": response.model or request.model,
        "prompt": request.prompts[0].text,
        "text": choice.text,
        "finish_reason": finish_reason(choice),
        "usage": {
            "prompt_tokens": usage.prompt_token_count,
            "completion_tokens": usage.completion_token_count,
            "total_tokens": usage.total_token_count,
        },
        # The document's rate is the quotient of its two other numbers.
        "timing": {
            "generation_time_seconds": round(seconds, 6),
            "tokens_per_second": round(usage.completion_token_count / seconds, 3) if seconds > 0 else 0.0,
        },
    }
    return _with_warnings(body, response.warnings)


# --- Manager, system, settings, catalogue --------------------------------------------------------


def manager_models(models: list[model_pb2.Model]) -> JsonObject:
    """The body of /v1/manager/models."""
    return {"models": [message_json(model) for model in models]}


def manager_status(response: model_pb2.GetManagerStatusResponse) -> JsonObject:
    """The body of /v1/manager/status."""
    snapshot = response.snapshot
    return {
        "loaded_models": {entry.name: _loaded_model(entry) for entry in snapshot.loaded_models},
        "system_status": message_json(snapshot.status),
        "queue_status": [message_json(load) for load in snapshot.queue],
    }


def model_status(response: model_pb2.GetModelStatusResponse) -> JsonObject:
    """The body of /v1/manager/models/{name}/status."""
    body = message_json(response.status)
    return {
        **body,
        "loaded": response.status.state == model_pb2.MODEL_STATE_LOADED,
        "memory_usage_gb": body["memory_gb"],
    }


def model_priority(response: model_pb2.SetModelPriorityResponse) -> JsonObject:
    """The documented answer to a change of priority."""
    return {
        "model": response.name,
        "priority": response.priority,
        "message": "Priority update requested",
        "queue_position": response.queue_position if response.HasField("queue_position") else None,
    }


def system_status(response: system_pb2.GetSystemStatusResponse) -> JsonObject:
    """The body of /v1/system/status."""
    body = message_json(response)
    return {**body, "mlx_compatible": response.system.mlx_compatible}


def settings(response: system_pb2.GetSettingsResponse) -> JsonObject:
    """The values in effect, by the document's keys."""
    return {
        field.name: getattr(response.settings, field.name) for field in system_pb2.Settings.DESCRIPTOR.fields
    }


def setting_request(key: str, body: JsonObject) -> system_pb2.UpdateSettingsRequest:
    """The change of one setting. Raises ApiError (400, 404)."""
    field = system_pb2.Settings.DESCRIPTOR.fields_by_name.get(key)
    if field is None:
        raise ApiError("SETTING_NOT_FOUND", f"Setting '{key}' not found")
    fields = Fields(body)
    value = fields.raw("value")
    fields.refuse_unread()
    if value is None:
        fields.missing("value")
    # ParseDict would take "5" for 5.
    kinds: dict[int, type] = {FieldDescriptor.TYPE_BOOL: bool, FieldDescriptor.TYPE_STRING: str}
    wanted = kinds.get(field.type, int)
    if type(value) is not wanted:
        raise invalid(f"`value` must be {type_name(wanted())}, not {type_name(value)}.", "value")
    request = system_pb2.UpdateSettingsRequest(update_mask=field_mask_pb2.FieldMask(paths=[key]))
    try:
        ParseDict({key: value}, request.settings)
    except ParseError:
        raise invalid("`value` is out of range.", "value") from None
    return request


def setting_updated(key: str, response: system_pb2.UpdateSettingsResponse) -> JsonObject:
    """The documented answer to a change of one setting."""
    body: JsonObject = {
        "key": key,
        "value": getattr(response.settings, key),
        "updated": True,
        "pending_restart": key in response.pending_restart.paths,
    }
    notes = [detail.note for detail in response.details if detail.key == key and detail.note]
    return {**body, "note": notes[0]} if notes else body


def catalog_page(response: model_pb2.SearchCatalogResponse) -> JsonObject:
    """The documented answer to a search of the hub."""
    return {"models": [message_json(model) for model in response.models], "total": len(response.models)}


def catalog_categories(response: model_pb2.ListCatalogCategoriesResponse) -> JsonObject:
    """The body of /v1/discover/categories."""
    return {"categories": {category.title: list(category.model_ids) for category in response.categories}}


def _loaded_model(entry: model_pb2.LoadedModel) -> JsonObject:
    body = message_json(entry)
    return {
        "loaded_at": body["loaded_at"],
        "last_used_at": body["last_used_at"],
        "memory_usage_gb": body["memory_gb"],
        "config": {"model_type": body["type"], "estimated_memory_gb": body["estimated_memory_gb"]},
        **{
            key: value
            for key, value in body.items()
            if key not in ("name", "memory_gb", "estimated_memory_gb")
        },
    }


def _with_warnings(body: JsonObject, warnings: Any) -> JsonObject:
    return {**body, "warnings": list(warnings)} if warnings else body
