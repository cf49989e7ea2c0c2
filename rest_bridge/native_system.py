"""The manager, the machine, settings and the hub's catalogue: the documented bodies as messages, and back. Pure."""

from typing import Any

from google.protobuf import field_mask_pb2
from google.protobuf.descriptor import FieldDescriptor

from mlxgui.v1 import model_pb2, system_pb2
from rest_bridge.errors import ApiError, JsonObject, invalid
from rest_bridge.json_body import Fields, integer_value, number_value, text_value, type_name
from rest_bridge.message_json import enum_word, message_json

# What the document calls the type of a loaded model: the hub's words for tasks.
_TASKS = {
    model_pb2.MODEL_TYPE_TEXT: "text-generation",
    model_pb2.MODEL_TYPE_VISION: "image-text-to-text",
    model_pb2.MODEL_TYPE_EMBEDDING: "feature-extraction",
    model_pb2.MODEL_TYPE_TRANSCRIPTION: "automatic-speech-recognition",
    model_pb2.MODEL_TYPE_SPEECH: "text-to-speech",
    model_pb2.MODEL_TYPE_RERANKER: "text-ranking",
}
_SETTINGS = system_pb2.Settings.DESCRIPTOR.fields_by_name


# --- Manager -------------------------------------------------------------------------------------


def manager_models(models: list[model_pb2.Model]) -> JsonObject:
    """The body of /v1/manager/models."""
    return {"models": [message_json(model) for model in models]}


def manager_status(snapshot: model_pb2.ManagerSnapshot) -> JsonObject:
    """The body of /v1/manager/status."""
    return {
        "loaded_models": {entry.name: _loaded_model(entry) for entry in snapshot.loaded_models},
        "system_status": message_json(snapshot.status),
        "queue_status": [message_json(load) for load in snapshot.queue],
    }


def _loaded_model(entry: model_pb2.LoadedModel) -> JsonObject:
    body = message_json(entry)
    return {
        "loaded_at": body["loaded_at"],
        "last_used_at": body["last_used_at"],
        "memory_usage_gb": body["memory_gb"],
        "config": {
            "model_type": _TASKS.get(entry.type),
            "estimated_memory_gb": body["estimated_memory_gb"],
        },
        **{
            key: value
            for key, value in body.items()
            if key not in ("name", "memory_gb", "estimated_memory_gb")
        },
    }


def model_status(status: model_pb2.LoadedModel) -> JsonObject:
    """The body of /v1/manager/models/{name}/status."""
    body = message_json(status)
    return {
        **body,
        "loaded": status.state == model_pb2.MODEL_STATE_LOADED,
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


def load_estimate(name: str, response: model_pb2.EstimateLoadResponse) -> JsonObject:
    """What a load would take and do, and the sentence it would be refused with."""
    body = message_json(response)
    refusal = response.refusal.message if response.HasField("refusal") else None
    return {"model": name, **body, "refusal": refusal}


# --- System --------------------------------------------------------------------------------------


def system_status(response: system_pb2.GetSystemStatusResponse) -> JsonObject:
    """The body of /v1/system/status."""
    return {**message_json(response), "mlx_compatible": response.system.mlx_compatible}


# --- Settings ------------------------------------------------------------------------------------


def settings(response: system_pb2.GetSettingsResponse) -> JsonObject:
    """The values in effect, by the document's keys."""
    return {key: _setting(response.settings, key) for key in _SETTINGS}


def settings_in_detail(response: system_pb2.GetSettingsResponse) -> JsonObject:
    """Each setting with its value in effect, where that comes from, and what there is to know."""
    details = {detail.key: detail for detail in response.details}
    return {
        key: {"value": _setting(response.settings, key), **_detail(details.get(key))} for key in _SETTINGS
    }


def setting_request(key: str, body: JsonObject) -> system_pb2.UpdateSettingsRequest:
    """The change of one setting. Raises ApiError (400, 404). Ranges are the server's to check."""
    _check_known(key)
    fields = Fields(body)
    value = fields.raw("value")
    fields.refuse_unread()
    if "value" not in body:
        fields.missing("value")
    request = system_pb2.UpdateSettingsRequest(update_mask=field_mask_pb2.FieldMask(paths=[key]))
    field = _SETTINGS[key]
    if field.is_repeated:
        if not isinstance(value, list):
            raise invalid(f"`value` must be an array, not {type_name(value)}.", "value")
        items = [_setting_value(field, item, f"value[{index}]") for index, item in enumerate(value)]
        getattr(request.settings, key).extend(items)
    else:
        setattr(request.settings, key, _setting_value(field, value, "value"))
    return request


def reset_request(key: str) -> system_pb2.UpdateSettingsRequest:
    """Forgets the stored value of one setting. Raises ApiError (404)."""
    _check_known(key)
    return system_pb2.UpdateSettingsRequest(reset_mask=field_mask_pb2.FieldMask(paths=[key]))


def setting_updated(
    key: str, request: system_pb2.UpdateSettingsRequest, response: system_pb2.UpdateSettingsResponse
) -> JsonObject:
    """The documented answer to a change of one setting, and what a user should know about it."""
    detail = next((detail for detail in response.details if detail.key == key), None)
    waits = key in response.pending_restart.paths
    stored = detail is None or detail.source in (
        system_pb2.SETTING_SOURCE_STORED,
        system_pb2.SETTING_SOURCE_UNSPECIFIED,
    )
    is_in_effect = not request.update_mask.paths or (stored and not waits)
    body: JsonObject = {
        "key": key,
        "value": _setting(response.settings if is_in_effect else request.settings, key),
        "updated": True,
    }
    if waits:
        body["pending_restart"] = True
    if detail is not None and detail.note:
        body["note"] = detail.note
    return body


def _setting_value(field: Any, value: object, name: str) -> Any:
    """A value of the setting's type: JSON's own types, none taken for another."""
    if field.type == FieldDescriptor.TYPE_BOOL:
        if not isinstance(value, bool):
            raise invalid(f"`{name}` must be a boolean, not {type_name(value)}.", name)
        return value
    if field.type == FieldDescriptor.TYPE_STRING:
        return text_value(value, name)
    if field.type == FieldDescriptor.TYPE_DOUBLE:
        return number_value(value, name)
    return integer_value(value, name)


def _setting(settings: system_pb2.Settings, key: str) -> Any:
    value = getattr(settings, key)
    return list(value) if _SETTINGS[key].is_repeated else value


def _detail(detail: system_pb2.SettingDetail | None) -> JsonObject:
    if detail is None:
        return {"source": None, "pending_restart": False, "note": None}
    return {
        "source": enum_word(system_pb2.SettingSource.DESCRIPTOR, detail.source),
        "pending_restart": detail.pending_restart,
        "note": detail.note or None,
    }


def _check_known(key: str) -> None:
    if key not in _SETTINGS:
        raise ApiError("SETTING_NOT_FOUND", f"Setting '{key[:64]}' not found")


# --- Catalogue -----------------------------------------------------------------------------------


def catalog_page(response: model_pb2.SearchCatalogResponse) -> JsonObject:
    """The documented answer to a search of the hub, and the token of what follows; null: nothing does."""
    return {
        "models": [message_json(model) for model in response.models],
        "total": len(response.models),
        "next_page_token": response.next_page_token or None,
    }


def catalog_categories(response: model_pb2.ListCatalogCategoriesResponse) -> JsonObject:
    """The body of /v1/discover/categories."""
    return {"categories": {category.title: list(category.model_ids) for category in response.categories}}
