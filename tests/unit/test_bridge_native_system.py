"""The documented bodies about the manager, the machine and settings as messages of the contract, and back."""

import math
from typing import Any

import pytest
from google.protobuf import field_mask_pb2

from mlxgui.v1 import common_pb2, model_pb2, system_pb2
from rest_bridge import native_system
from rest_bridge.errors import ApiError
from rest_bridge.message_json import GIB


def test_the_system_status_has_the_documented_keys() -> None:
    """GET /v1/system/status, key by key; no GPU is null."""
    response = system_pb2.GetSystemStatusResponse(state=system_pb2.SERVER_STATE_RUNNING)
    response.system.memory.total_bytes = 32 * GIB
    response.system.mlx_compatible = True
    response.model_manager.loaded_model_count = 1
    response.model_manager.inactivity_timeout.FromSeconds(1800)
    body = native_system.system_status(response)
    assert (body["status"], body["mlx_compatible"], body["system"]["gpu_memory"]) == ("running", True, None)
    assert body["system"]["memory"]["total_gb"] == 32
    manager = body["model_manager"]
    assert (manager["loaded_models_count"], manager["queue_size"], manager["inactivity_timeout_minutes"]) == (
        1,
        0,
        30,
    )
    assert {
        "max_concurrent_models",
        "total_model_memory_gb",
        "memory_usage_percent",
        "max_tokens_limit",
    } <= set(manager)
    assert "auto_unload_enabled" in manager
    response.system.gpu_memory.total_bytes = 8 * GIB
    response.system.gpu_memory.device_name = "Apple M2 Pro"
    gpu = native_system.system_status(response)["system"]["gpu_memory"]
    assert gpu == {"total_gb": 8.0, "available_gb": 0.0, "device_name": "Apple M2 Pro"}


def test_the_manager_s_status_is_the_documented_one() -> None:
    """A loaded model's task and estimate are its `config`; a load that waits is in the queue."""
    snapshot = model_pb2.ManagerSnapshot()
    entry = snapshot.loaded_models.add(
        name="llama",
        state=model_pb2.MODEL_STATE_LOADED,
        type=model_pb2.MODEL_TYPE_TEXT,
        memory_bytes=9 * GIB,
        estimated_memory_bytes=8 * GIB,
    )
    entry.load_time.FromJsonString("2025-01-04T09:15:00Z")
    snapshot.queue.add(operation_id="o", model="qwen", priority=10, position=1)
    body = native_system.manager_status(snapshot)
    llama = body["loaded_models"]["llama"]
    assert llama["config"] == {"model_type": "text-generation", "estimated_memory_gb": 8.0}
    assert (llama["loaded_at"], llama["last_used_at"], llama["memory_usage_gb"]) == (
        "2025-01-04T09:15:00",
        None,
        9.0,
    )
    assert not {"name", "memory_gb"} & set(llama)
    (load,) = body["queue_status"]
    assert (load["model"], load["priority"], load["position"], load["queued_at"]) == ("qwen", 10, 1, None)


def test_a_model_s_status_says_whether_it_is_loaded() -> None:
    """Its place in the queue is null unless it waits."""
    status = model_pb2.LoadedModel(name="m", state=model_pb2.MODEL_STATE_LOADED, memory_bytes=GIB)
    body = native_system.model_status(status)
    assert (body["loaded"], body["status"], body["memory_usage_gb"]) == (True, "loaded", 1.0)
    assert (body["loaded_at"], body["queue_position"]) == (None, None)
    status = model_pb2.LoadedModel(name="m", state=model_pb2.MODEL_STATE_QUEUED, queue_position=2)
    body = native_system.model_status(status)
    assert (body["loaded"], body["status"], body["queue_position"]) == (False, "queued", 2)


def test_an_estimate_says_why_a_load_would_be_refused() -> None:
    response = model_pb2.EstimateLoadResponse(required_bytes=32 * GIB, evicted_models=["a", "b"])
    response.refusal.CopyFrom(common_pb2.OperationError(code=9, message="Insufficient memory"))
    body = native_system.load_estimate("m", response)
    assert (body["model"], body["accepted"], body["refusal"]) == ("m", False, "Insufficient memory")
    assert (body["required_gb"], body["evicted_models"], body["memory_warning"]) == (32.0, ["a", "b"], None)
    response = model_pb2.EstimateLoadResponse(accepted=True)
    assert native_system.load_estimate("m", response)["refusal"] is None


# --- Settings ---


def test_the_settings_are_plain_values_by_key() -> None:
    response = system_pb2.GetSettingsResponse(
        settings=system_pb2.Settings(server_port=8000, preload_models=["a"], max_model_memory_gb=1.5)
    )
    body = native_system.settings(response)
    assert (body["server_port"], body["preload_models"], body["max_model_memory_gb"]) == (8000, ["a"], 1.5)
    assert body["huggingface_cache_dir"] == ""
    assert set(body) == set(system_pb2.Settings.DESCRIPTOR.fields_by_name)


def test_details_say_where_a_value_comes_from() -> None:
    response = system_pb2.GetSettingsResponse(settings=system_pb2.Settings(server_port=9000))
    response.details.add(
        key="server_port", source=system_pb2.SETTING_SOURCE_FLAG, pending_restart=True, note="Words."
    )
    body = native_system.settings_in_detail(response)
    assert body["server_port"] == {
        "value": 9000,
        "source": "flag",
        "pending_restart": True,
        "note": "Words.",
    }
    assert body["log_level"]["source"] is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_inactivity_timeout_minutes", 60),
        ("auto_unload_inactive_models", False),
        ("huggingface_cache_dir", ""),
        ("preload_models", ["a", "b"]),
        ("preload_models", []),
        ("max_model_memory_gb", 8),
        ("max_model_memory_gb", 8.5),
    ],
)
def test_one_setting_is_changed_by_its_mask(key: str, value: Any) -> None:
    request = native_system.setting_request(key, {"value": value})
    assert getattr(request.settings, key) == value
    assert list(request.update_mask.paths) == [key]


NO_INTEGERS = ["5", 1.5, True, None, math.nan, math.inf, 2**31, -(2**31) - 1, 10**400, [5], {}]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        *(
            (field.name, NO_INTEGERS)
            for field in system_pb2.Settings.DESCRIPTOR.fields
            if field.type == field.TYPE_INT32
        ),
        ("auto_unload_inactive_models", ["true", 1, 0, None, [], {}]),
        ("log_level", [5, True, None, ["INFO"], {}, "\ud800"]),
        ("huggingface_cache_dir", [5, None, ["/x"]]),
        ("preload_models", ["a", 5, None, {}, [5], ["a", None], [["a"]], ["\ud800"]]),
        ("max_model_memory_gb", ["8", True, None, math.nan, math.inf, -math.inf, 10**400, 1e39, []]),
    ],
)
def test_a_setting_takes_its_own_type_only(key: str, values: list[Any]) -> None:
    """Whatever a lenient reader would make of the value."""
    for value in values:
        with pytest.raises(ApiError) as caught:
            native_system.setting_request(key, {"value": value})
        assert caught.value.http_status == 400, value
        assert str(caught.value.param).partition("[")[0] == "value"


@pytest.mark.parametrize("body", [{}, {"valeu": 5}, {"value": 5, "force": True}])
def test_a_setting_s_body_has_one_member(body: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        native_system.setting_request("server_port", body)
    assert caught.value.http_status == 400


def test_an_unknown_setting_is_404_whatever_its_value() -> None:
    for body in ({"value": 1}, {}):
        with pytest.raises(ApiError) as caught:
            native_system.setting_request("colour", body)
        assert (caught.value.http_status, caught.value.message) == (404, "Setting 'colour' not found")
    with pytest.raises(ApiError) as caught:
        native_system.reset_request("colour")
    assert caught.value.http_status == 404


def _updated(source: "system_pb2.SettingSource.ValueType", *, waits: bool, note: str = "") -> dict[str, Any]:
    request = native_system.setting_request("server_port", {"value": 9000})
    response = system_pb2.UpdateSettingsResponse(settings=system_pb2.Settings(server_port=8000))
    response.details.add(key="server_port", source=source, pending_restart=waits, note=note)
    if waits:
        response.pending_restart.CopyFrom(field_mask_pb2.FieldMask(paths=["server_port"]))
    return native_system.setting_updated("server_port", request, response)


def test_the_answer_to_a_change_says_what_is_to_be_known() -> None:
    """The three documented keys, and no more when there is nothing to say; the value is the one that was sent."""
    request = native_system.setting_request("model_inactivity_timeout_minutes", {"value": 60})
    response = system_pb2.UpdateSettingsResponse(
        settings=system_pb2.Settings(model_inactivity_timeout_minutes=60)
    )
    assert native_system.setting_updated("model_inactivity_timeout_minutes", request, response) == {
        "key": "model_inactivity_timeout_minutes",
        "value": 60,
        "updated": True,
    }
    stored = system_pb2.SETTING_SOURCE_STORED
    assert _updated(
        system_pb2.SETTING_SOURCE_ENVIRONMENT, waits=False, note="MLX_GUI_PORT overrides it."
    ) == {
        "key": "server_port",
        "value": 9000,
        "updated": True,
        "note": "MLX_GUI_PORT overrides it.",
    }
    assert _updated(stored, waits=True) == {
        "key": "server_port",
        "value": 9000,
        "updated": True,
        "pending_restart": True,
    }
    # In effect at once, and written in another way than it was sent.
    assert _updated(stored, waits=False)["value"] == 8000


def test_forgetting_a_value_answers_the_one_that_counts_now() -> None:
    request = native_system.reset_request("server_port")
    assert list(request.reset_mask.paths) == ["server_port"]
    response = system_pb2.UpdateSettingsResponse(settings=system_pb2.Settings(server_port=8000))
    response.details.add(key="server_port", source=system_pb2.SETTING_SOURCE_DEFAULT)
    body = native_system.setting_updated("server_port", request, response)
    assert body == {"key": "server_port", "value": 8000, "updated": True}


def test_a_page_of_the_catalogue_says_where_the_next_begins() -> None:
    """Also one that is empty; null: there is none."""
    response = model_pb2.SearchCatalogResponse(next_page_token="behind")
    assert native_system.catalog_page(response) == {"models": [], "total": 0, "next_page_token": "behind"}
    assert native_system.catalog_page(model_pb2.SearchCatalogResponse())["next_page_token"] is None
