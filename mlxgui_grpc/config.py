"""Every option of the server, with its unit, default and where it may come from.

flag > environment > config.toml in the state folder > default. Read once, in the command line; frozen after.
"""

import ipaddress
import math
import os
import ssl
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mlxgui_grpc.errors import InvalidRequestError

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

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
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The server's options. Paths are absolute, times in seconds unless the name says otherwise."""

    home: Path = field(default_factory=lambda: Path("~/.mlxgui").expanduser())
    """State folder: database, socket, logs, views of models. Created 0700."""
    host: str = "127.0.0.1"
    """Address of the REST bridge."""
    port: int = 8000
    """Port of the REST bridge; 0 picks a free one."""
    grpc_host: str = "127.0.0.1"
    grpc_port: int = 50051
    """Port of the gRPC server; 0 picks a free one. The unix socket is always there too."""
    bridge: bool = True
    """Start the REST bridge."""
    api_key: str = ""
    """The one key that is accepted; empty accepts any key, as documented, on loopback only."""
    require_key: bool = False
    """Refuse requests without the key; always so when `api_key` is set."""
    insecure: bool = False
    """Serve beyond loopback without key and TLS all the same."""
    tls_certificate: Path | None = None
    """PEM file; with `tls_key` the TCP port of gRPC speaks TLS."""
    tls_key: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    """Host names beside the loopback ones that requests to the bridge may name."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the bridge."""
    model_roots: tuple[Path, ...] = ()
    """Folders below which models may be installed by REST and TCP clients; the unix socket needs none."""
    log_level: str = "INFO"
    standby_count: int = 1
    """Workers kept warm without a model: 0.1 s to the first token in place of 6, for 360 MB each."""
    max_concurrent_requests: int = 32
    """Sequences that decode at once, per model."""
    max_waiting_requests: int = 128
    """Sequences that may wait beyond them, per model."""
    inference_seconds: float = 600.0
    """Longest inference call; a caller's earlier deadline wins."""
    drain_seconds: float = 30.0
    """How long running calls may go on once the server is asked to stop."""
    stall_seconds: float = 120.0
    """A worker that delivers nothing for so long while requests wait is killed."""
    hub_endpoint: str = ""
    """Base URL of the model hub; empty is the public one."""
    hub_cache: Path | None = None
    """Where models are downloaded to; None is the Hugging Face cache."""
    register_demo: bool = True
    """Register the built-in demo model on the first start."""

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            if not low <= getattr(self, name) <= high:
                raise InvalidRequestError(f"{name} must be between {low} and {high}", field=name)
        for name in ("inference_seconds", "drain_seconds", "stall_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidRequestError(f"{name} must be more than 0, and finite", field=name)
        if self.log_level.upper() not in LOG_LEVELS:
            raise InvalidRequestError(f"log_level must be one of {', '.join(LOG_LEVELS)}", field="log_level")
        self._check_tls()
        self._check_exposure()

    def _check_tls(self) -> None:
        """Refuse files that gRPC would only complain about in its own log."""
        if self.tls_certificate is None and self.tls_key is None:
            return
        if self.tls_certificate is None or self.tls_key is None:
            missing = "tls_key" if self.tls_key is None else "tls_certificate"
            raise InvalidRequestError("tls_certificate and tls_key go together: give both", field=missing)
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # With a password, even an empty one, a key that wants another is an error and not a prompt.
            context.load_cert_chain(self.tls_certificate, self.tls_key, password="")
        except (OSError, ValueError) as error:
            raise InvalidRequestError(
                f"tls_certificate {self.tls_certificate} and tls_key {self.tls_key} cannot be used: {error}",
                field="tls_certificate",
            ) from error

    def _check_exposure(self) -> None:
        """Refuse to serve strangers by accident."""
        if self.require_key and not self.api_key:
            raise InvalidRequestError(
                "a key is required and none is set: set MLX_GUI_API_KEY or --api-key", field="api_key"
            )
        if self.insecure:
            return
        if self.bridge and not is_loopback(self.host) and not self.api_key:
            raise InvalidRequestError(
                f"host {self.host} is reachable from other machines and no key is set: set MLX_GUI_API_KEY "
                "or --api-key, or say --insecure",
                field="host",
            )
        if not is_loopback(self.grpc_host) and not (self.api_key and self.tls_certificate and self.tls_key):
            raise InvalidRequestError(
                f"grpc_host {self.grpc_host} is reachable from other machines: give --tls-certificate, --tls-key "
                "and --api-key, or say --insecure",
                field="grpc_host",
            )

    @property
    def database(self) -> Path:
        """The catalog."""
        return self.home / "state.db"

    @property
    def run_directory(self) -> Path:
        """Lock, socket and addresses of the running server."""
        return self.home / "run"

    @property
    def log_directory(self) -> Path:
        """Rotating log files."""
        return self.home / "logs"

    @property
    def temporary_directory(self) -> Path:
        """TMPDIR of the workers."""
        return self.home / "tmp"

    @property
    def view_directory(self) -> Path:
        """What the loaders see of the models."""
        return self.home / "views"


def load_config(flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> ServerConfig:
    """Merge flags (None is unset), environment, config.toml and defaults; raises InvalidRequestError."""
    from_environment = {
        name: value for name, variable in _ENVIRONMENT.items() if (value := environ.get(variable, "").strip())
    }
    given = {name: value for name, value in flags.items() if value is not None}
    home = Path(given.get("home") or from_environment.get("home") or "~/.mlxgui").expanduser().absolute()
    merged = {**_read_toml(home / "config.toml"), **from_environment, **given, "home": home}
    return ServerConfig(**{name: _convert(name, value) for name, value in merged.items()})


def hub_cache_directory(environ: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps its models, by its own variables and order."""
    if cache := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    if home := environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "huggingface" / "hub"


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{path}: {error}", field="config.toml") from error
    known = {option.name for option in fields(ServerConfig)}
    if unknown := sorted(values.keys() - known):
        raise InvalidRequestError(f"{path}: unknown option '{unknown[0]}'", field=unknown[0])
    return values


def _convert(name: str, value: Any) -> Any:
    """Text and TOML values to the type of the option."""
    default = next(option for option in fields(ServerConfig) if option.name == name)
    kind = str(default.type)
    try:
        if "Path" in kind and "tuple" not in kind:
            return Path(value).expanduser().absolute() if value else None
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
        variable = _ENVIRONMENT.get(name)
        where = f" (variable {variable})" if variable else ""
        words = next(words for word, words in _KINDS.items() if word in kind)
        raise InvalidRequestError(f"{name}{where}: '{value}' is not {words}", field=name) from None


_KINDS = {
    "tuple[pathlib.Path": "a list of paths",
    "tuple": "a list of names",
    "Path": "a path",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
}
"""Words for the types of the options, by what their names contain; the first that fits."""

_RANGES = (
    ("port", 0, 65_535),
    ("grpc_port", 0, 65_535),
    ("standby_count", 0, 4),
    ("max_concurrent_requests", 1, 256),
    ("max_waiting_requests", 0, 65_536),
)
