"""Where the server's options come from: flags, environment, stored settings, config.toml, and which of them counts.

flag > environment > stored > config.toml in the state folder > default. Flags, environment and file are read once, in
the command line; the server adds what is stored.
"""

import os
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from pathlib import Path
from typing import Any

from mlxgui_grpc.config import WILDCARD_HOSTS, ServerConfig
from mlxgui_grpc.errors import InvalidRequestError
from mlxgui_grpc.setting_table import SETTINGS

_ENVIRONMENT = {
    "home": "MLX_GUI_HOME",
    "host": "MLX_GUI_HOST",
    "port": "MLX_GUI_PORT",
    "grpc_host": "MLX_GUI_GRPC_HOST",
    "grpc_port": "MLX_GUI_GRPC_PORT",
    "api_key": "MLX_GUI_API_KEY",
    "log_level": "MLX_GUI_LOG_LEVEL",
    "standby_count": "MLX_GUI_STANDBY",
    "hub_endpoint": "HF_ENDPOINT",
    "hub_cache": "MLX_GUI_HUB_CACHE",
    **{
        name: f"MLX_GUI_{name.upper()}"
        for name in (
            "bind_to_all_interfaces",
            "max_concurrent_requests",
            "max_concurrent_models",
            "auto_unload_inactive_models",
            "model_inactivity_timeout_minutes",
            "enable_gpu_acceleration",
            "enable_system_tray",
            "default_model",
            "preload_models",
            "max_context_length",
            "max_model_memory_gb",
            "image_url_fetch",
        )
    },
}
"""Variables by option. A list has commas between its parts."""

_FLAGS = {
    "standby_count": "--standby",
    "preload_models": "--preload",
    "image_url_ports": "--image-url-port",
    "image_url_trusted_addresses": "--image-url-trusted-address",
}
"""Flags that are not called as their option."""


_DEFAULTS = ServerConfig()


class Source(IntEnum):
    """Where a value comes from; a larger one wins. The numbers are those of `mlxgui.v1.SettingSource`."""

    DEFAULT = 1
    CONFIG_FILE = 2
    STORED = 3
    ENVIRONMENT = 4
    FLAG = 5


@dataclass(frozen=True, slots=True)
class Options:
    """What was given for each option, by where it was given, each value of its option's type."""

    home: Path
    given: Mapping[Source, Mapping[str, Any]]

    def config(self, stored: Mapping[str, Any] | None = None) -> ServerConfig:
        """All of it as one, with the stored values of options; raises InvalidRequestError."""
        values = {option.name: self.find(option.name, stored)[0] for option in fields(ServerConfig)}
        return ServerConfig(**{**values, "home": self.home})

    def find(self, name: str, stored: Mapping[str, Any] | None = None) -> tuple[Any, Source]:
        """The value of an option that counts, and where it comes from."""
        found = self._strongest(name, stored)
        if name not in ("host", "bind_to_all_interfaces"):
            return found
        (host, host_source), (to_all, source) = (
            self._strongest(each, stored) for each in ("host", "bind_to_all_interfaces")
        )
        if host_source > source:
            to_all, source = host in WILDCARD_HOSTS, host_source
        if name == "bind_to_all_interfaces":
            return to_all, source
        if to_all != (host in WILDCARD_HOSTS):
            host = WILDCARD_HOSTS[0] if to_all else "127.0.0.1"
        return host, source

    def words(self, name: str, source: Source) -> str:
        """What to call the place of a value, for people: a flag, a variable or the file."""
        if name == "bind_to_all_interfaces" and name not in self.given.get(source, {}):
            name = "host"
        return _words(name, source, self.home)

    def without(self, names: Collection[str]) -> "Options":
        """The same where no flag and no variable says what these options are."""
        # The two are one option.
        gone = {*names, "host"} if "bind_to_all_interfaces" in names else set(names)
        return Options(
            self.home,
            {
                source: {
                    name: value
                    for name, value in values.items()
                    if source is Source.CONFIG_FILE or name not in gone
                }
                for source, values in self.given.items()
            },
        )

    def read_again(self) -> "Options":
        """The same flags and variables with config.toml as it is now; raises InvalidRequestError."""
        return Options(self.home, {**self.given, Source.CONFIG_FILE: _from_file(self.home)})

    def _strongest(self, name: str, stored: Mapping[str, Any] | None) -> tuple[Any, Source]:
        for source in sorted(Source, reverse=True):
            values = (stored or {}) if source is Source.STORED else self.given.get(source, {})
            if name in values:
                return convert(name, values[name], _words(name, source, self.home)), source
        return getattr(_DEFAULTS, name), Source.DEFAULT


def load_options(flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Options:
    """Read flags (None is unset), environment and config.toml; raises InvalidRequestError."""
    from_environment = {
        name: _parts(name, value)
        for name, variable in _ENVIRONMENT.items()
        if (value := environ.get(variable, "").strip())
    }
    from_flags = {name: value for name, value in flags.items() if value is not None}
    home = Path(from_flags.get("home") or from_environment.get("home") or "~/.mlxgui").expanduser().absolute()
    return Options(
        home,
        {
            Source.CONFIG_FILE: _from_file(home),
            Source.ENVIRONMENT: _converted(from_environment, Source.ENVIRONMENT, home),
            Source.FLAG: _converted(from_flags, Source.FLAG, home),
        },
    )


def load_config(flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> ServerConfig:
    """Merge flags (None is unset), environment, config.toml and defaults; raises InvalidRequestError."""
    return load_options(flags, environ).config()


def _from_file(home: Path) -> dict[str, Any]:
    path = home / "config.toml"
    try:
        values = tomllib.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{path}: {error}", field="config.toml") from error
    except OSError as error:
        raise InvalidRequestError(f"{path}: {error.strerror or error}", field="config.toml") from error
    if "home" in values:
        raise InvalidRequestError(
            f"{path}: home is where this file is; say it with --home or MLX_GUI_HOME", field="home"
        )
    known = {option.name for option in fields(ServerConfig)}
    if unknown := sorted(values.keys() - known):
        setting = SETTINGS.get(unknown[0])
        hint = f", which is called {setting.option} here" if setting else ""
        raise InvalidRequestError(f"{path}: unknown option '{unknown[0]}'{hint}", field=unknown[0])
    return _converted(values, Source.CONFIG_FILE, home)


def _converted(values: Mapping[str, Any], source: Source, home: Path) -> dict[str, Any]:
    return {name: convert(name, value, _words(name, source, home)) for name, value in values.items()}


def _words(name: str, source: Source, home: Path) -> str:
    if source is Source.FLAG:
        return _FLAGS.get(name, "--" + name.replace("_", "-"))
    if source is Source.ENVIRONMENT:
        return _ENVIRONMENT[name]
    return "the settings" if source is Source.STORED else str(home / "config.toml")


def _parts(name: str, text: str) -> Any:
    """A variable's text; a list's parts."""
    kind = next(str(option.type) for option in fields(ServerConfig) if option.name == name)
    return [part for each in text.split(",") if (part := each.strip())] if "tuple" in kind else text


def convert(name: str, value: Any, place: str) -> Any:
    """Text, TOML and JSON values to the type of the option; raises InvalidRequestError, which names their place."""
    default = next(option for option in fields(ServerConfig) if option.name == name)
    kind = str(default.type)
    try:
        if "Path" in kind and "tuple" not in kind:
            return Path(value).expanduser().absolute() if value else None
        if "tuple[int" in kind:
            if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
                raise TypeError
            return tuple(value)
        if "tuple" in kind:
            if not isinstance(value, list | tuple) or not all(isinstance(item, str | Path) for item in value):
                raise TypeError
            return tuple(
                Path(item).expanduser().absolute() if "Path" in kind else str(item) for item in value
            )
        if "bool" in kind:
            if isinstance(value, bool):
                return value
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[
                value.lower()
            ]
        if isinstance(value, bool) or ("int" in kind and isinstance(value, float)):
            raise TypeError
        if "int" in kind:
            return int(value)
        if "float" in kind:
            return float(value)
        return str(value)
    except (KeyError, TypeError, ValueError, AttributeError):
        words = next(words for word, words in _KINDS.items() if word in kind)
        raise InvalidRequestError(f"{name} in {place}: '{value}' is not {words}", field=name) from None


_KINDS = {
    "tuple[pathlib.Path": "a list of paths",
    "tuple[int": "a list of whole numbers",
    "tuple": "a list of names",
    "Path": "a path",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
}
"""Words for the types of the options, by what their names contain; the first that fits."""
