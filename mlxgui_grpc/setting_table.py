"""The settings of the contract as a table, and what the value of each may be. Pure, but for looking at folders."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxgui_grpc.config import LOG_LEVELS, MAX_PRELOAD_MODELS, RANGES, out_of_range
from mlxgui_grpc.errors import InvalidRequestError
from mlxgui_grpc.images.urls import OFF, ON, read_hosts

MAX_NAME_BYTES = 512
MAX_PATH_BYTES = 4096

Value = bool | int | float | str | list[str]


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: `key` of the contract, `option` of the server's configuration."""

    key: str
    option: str
    kind: type[Any]
    after_restart: bool = False
    """A change takes effect at the next start, not at once."""


SETTINGS = {
    setting.key: setting
    for setting in (
        Setting("server_port", "port", int, after_restart=True),
        Setting("max_concurrent_requests", "max_concurrent_requests", int),
        Setting("auto_unload_inactive_models", "auto_unload_inactive_models", bool),
        Setting("model_inactivity_timeout_minutes", "model_inactivity_timeout_minutes", int),
        Setting("enable_system_tray", "enable_system_tray", bool),
        Setting("log_level", "log_level", str),
        Setting("huggingface_cache_dir", "hub_cache", str),
        Setting("enable_gpu_acceleration", "enable_gpu_acceleration", bool),
        Setting("bind_to_all_interfaces", "bind_to_all_interfaces", bool, after_restart=True),
        Setting("max_concurrent_models", "max_concurrent_models", int),
        Setting("default_model", "default_model", str),
        Setting("preload_models", "preload_models", list, after_restart=True),
        Setting("max_context_length", "max_context_length", int),
        Setting("max_model_memory_gb", "max_model_memory_gb", float),
        Setting("image_url_fetch", "image_url_fetch", str),
    )
}
"""By key, in the order of the contract."""


def from_option(setting: Setting, value: Any) -> Value:
    """The value of a setting's option, in the form of the contract."""
    if setting.kind is list:
        return list(value)
    if setting.key == "log_level":
        return str(value).upper()
    return "" if value is None else setting.kind(value)


def checked(setting: Setting, value: Any) -> Value:
    """A value in its one spelling; raises InvalidRequestError where it is of another type or out of its range."""
    key, field = setting.key, f"settings.{setting.key}"
    if setting.kind is float and type(value) is int:
        value = float(value)
    if isinstance(value, bool) != (setting.kind is bool) or not isinstance(value, setting.kind):
        raise InvalidRequestError(f"{key} cannot be {json.dumps(value)}", field=field)
    if setting.option in RANGES and (words := out_of_range(setting.option, value)):
        raise InvalidRequestError(f"{key} {words}", field=field)
    if key == "log_level":
        return _log_level(value)
    if key == "image_url_fetch":
        return _url_fetch(value)
    if key == "huggingface_cache_dir" and value:
        return _folder(value)
    if key == "default_model" and value:
        _check_names(key, [value])
    if key == "preload_models":
        _check_names(key, value)
    result: Value = value
    return result


def read_stored(texts: Mapping[str, str]) -> tuple[dict[str, Value], dict[str, str]]:
    """From JSON texts by key, those of settings: the values, and why others cannot be used."""
    values, failures = {}, {}
    for key, setting in SETTINGS.items():
        if key in texts:
            try:
                values[key] = checked(setting, json.loads(texts[key]))
            except (InvalidRequestError, ValueError) as error:
                failures[key] = str(error)
    return values, failures


def why_not_writable(folder: Path) -> str:
    """Why nothing can be written to a folder that need not exist yet; empty when it can. Leaves nothing there."""
    try:
        existing = next(each for each in (folder, *folder.parents) if each.exists())
        with tempfile.TemporaryFile(dir=existing):
            return ""
    except OSError as error:
        return f"{folder} cannot be written to ({error.strerror or error})"


def _log_level(value: str) -> str:
    level = value.strip().upper()
    if level not in LOG_LEVELS:
        raise InvalidRequestError(
            f"log_level must be one of {', '.join(LOG_LEVELS)}", field="settings.log_level"
        )
    return level


def _url_fetch(value: str) -> str:
    word = value.strip().lower()
    if word in (ON, OFF):
        return word
    try:
        return ",".join(read_hosts(value))
    except ValueError as error:
        raise InvalidRequestError(
            f"image_url_fetch must be on, off, or hosts with commas between them: {error}",
            field="settings.image_url_fetch",
        ) from None


def _folder(value: str) -> str:
    if not os.path.isabs(value) or "\0" in value or len(value.encode()) > MAX_PATH_BYTES:
        raise InvalidRequestError(
            "huggingface_cache_dir must be an absolute path; empty is the Hugging Face cache",
            field="settings.huggingface_cache_dir",
        )
    # Two slashes at the beginning, which it keeps, are one on the systems that we run on.
    return "/" + os.path.normpath(value).lstrip("/")


def _check_names(key: str, names: list[Any]) -> None:
    field = f"settings.{key}"
    if len(names) > MAX_PRELOAD_MODELS:
        raise InvalidRequestError(f"{key} has more than {MAX_PRELOAD_MODELS} entries", field=field)
    for name in names:
        if not isinstance(name, str) or not name.strip() or len(name.encode()) > MAX_NAME_BYTES:
            raise InvalidRequestError(
                f"{key} must name models, in 1 to {MAX_NAME_BYTES} bytes each", field=field
            )
