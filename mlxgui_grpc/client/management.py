"""What callers say of settings and of the hub's catalogue, as requests of the contract."""

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, cast

from google.protobuf.field_mask_pb2 import FieldMask

from mlxgui.v1 import model_pb2, system_pb2
from mlxgui_grpc.client.messages import checked
from mlxgui_grpc.errors import InvalidRequestError, SettingNotFoundError

CatalogSort = Literal["downloads", "likes", "created", "updated"]
CatalogKind = Literal["any", "embedding"]

MAX_PAGE_SIZE = 100
"""Most models that one page of a search has."""

MAX_PAGES = 20
"""Pages that one search asks for at most."""

SETTING_KEYS = tuple(field.name for field in system_pb2.Settings.DESCRIPTOR.fields)


class SettingValues(TypedDict, total=False):
    """The fields of `Settings`, whose comments in the contract give ranges and defaults."""

    server_port: int
    max_concurrent_requests: int
    auto_unload_inactive_models: bool
    model_inactivity_timeout_minutes: int
    enable_system_tray: bool
    log_level: str
    huggingface_cache_dir: str
    enable_gpu_acceleration: bool
    bind_to_all_interfaces: bool
    max_concurrent_models: int
    default_model: str
    preload_models: Sequence[str]
    max_context_length: int
    max_model_memory_gb: float
    image_url_fetch: str


@checked
def search_request(
    query: str, sort: CatalogSort, kind: CatalogKind, max_memory_bytes: int | None, limit: int
) -> model_pb2.SearchCatalogRequest:
    """The request for the first page of `Client.search`."""
    if not 0 < limit <= 1000:
        raise InvalidRequestError(f"limit must be between 1 and 1000, not {limit}", field="limit")
    return model_pb2.SearchCatalogRequest(
        query=query,
        page_size=min(limit, MAX_PAGE_SIZE),
        sort=cast(
            model_pb2.CatalogSort.ValueType,
            _enum_value("sort", sort, model_pb2.CatalogSort.items(), "CATALOG_SORT_"),
        ),
        kind=cast(
            model_pb2.CatalogKind.ValueType,
            _enum_value("kind", kind, model_pb2.CatalogKind.items(), "CATALOG_KIND_"),
        ),
        max_memory_bytes=max_memory_bytes,
    )


def check_setting(key: str) -> None:
    """Raise SettingNotFoundError, with the key that was perhaps meant, unless there is such a setting."""
    if key in SETTING_KEYS:
        return
    near = difflib.get_close_matches(key, SETTING_KEYS, n=1)
    hint = f"did you mean {near[0]}?" if near else "`mlxgui settings` lists them"
    raise SettingNotFoundError(f"There is no setting '{key}': {hint}", field=key, key=key)


@checked
def settings_request(values: Mapping[str, Any]) -> system_pb2.UpdateSettingsRequest:
    """Change those settings; raises SettingNotFoundError for a key that there is not."""
    settings = system_pb2.Settings()
    for key, value in values.items():
        check_setting(key)
        if isinstance(value, str) and system_pb2.Settings.DESCRIPTOR.fields_by_name[key].is_repeated:
            raise InvalidRequestError(f"{key} must be a list, not the text {value!r}", field=key)
        try:
            settings.MergeFrom(system_pb2.Settings(**{key: value}))
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidRequestError(f"{key} cannot be {reprlib.repr(value)}: {error}", field=key) from error
    return system_pb2.UpdateSettingsRequest(settings=settings, update_mask=FieldMask(paths=list(values)))


@checked
def reset_request(keys: Sequence[str]) -> system_pb2.UpdateSettingsRequest:
    """Forget what was set for those; raises SettingNotFoundError for a key that there is not."""
    for key in keys:
        check_setting(key)
    return system_pb2.UpdateSettingsRequest(reset_mask=FieldMask(paths=list(keys)))


def _enum_value(field: str, word: str, members: Sequence[tuple[str, int]], prefix: str) -> int:
    words = {name.removeprefix(prefix).lower(): number for name, number in members if number}
    if word not in words:
        raise InvalidRequestError(f"{field} must be one of {', '.join(words)}, not '{word}'", field=field)
    return words[word]
