"""Every option of the server, with its unit, its default and what it may be. Frozen; `options.py` reads it."""

import ipaddress
import math
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlxgui_grpc.errors import InvalidRequestError
from mlxgui_grpc.images.urls import DEFAULT_PORTS, ON, UrlPolicy, policy_of

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

MAX_PRELOAD_MODELS = 16
WILDCARD_HOSTS = ("0.0.0.0", "::")
"""Addresses that stand for all of the machine's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The server's options. Paths are absolute, times in seconds unless the name says otherwise."""

    home: Path = field(default_factory=lambda: Path("~/.mlxgui").expanduser())
    """State folder: database, socket, logs, views of models. Created 0700."""
    host: str = "127.0.0.1"
    """Address of the REST bridge."""
    port: int = 8000
    """Port of the REST bridge; 0 picks a free one."""
    bind_to_all_interfaces: bool = False
    """The bridge listens on all addresses. Goes with `host`: the one that comes from the stronger source counts."""
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
    """Workers kept warm without a model: 0.1 s to the first token in place of some seconds, for about 105 MB each."""
    max_concurrent_requests: int = 32
    """Sequences that decode at once, per model."""
    max_concurrent_models: int = 3
    """Models in memory at once."""
    auto_unload_inactive_models: bool = True
    """Unload models that are idle."""
    model_inactivity_timeout_minutes: int = 30
    """How long a model may be idle before that."""
    enable_gpu_acceleration: bool = True
    """Use the GPU where MLX has one."""
    enable_system_tray: bool = True
    """Documented, without effect: there is no icon."""
    default_model: str = ""
    """Model of requests that name none; empty refuses them."""
    preload_models: tuple[str, ...] = ()
    """Models to load at the start."""
    max_context_length: int = 0
    """Most tokens of prompt and completion together; 0 is what each model was made for."""
    max_model_memory_gb: float = 0.0
    """Memory that all models together may take, in GiB; 0 is what the machine has."""
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
    image_url_fetch: str = ON
    """Fetch images from URLs: `on`, `off`, or the hosts to fetch from with commas between them."""
    image_url_ports: tuple[int, ...] = DEFAULT_PORTS
    """Ports that images are fetched from."""
    image_url_trusted_addresses: tuple[str, ...] = ()
    """Addresses that images are fetched from though they are not public. Whatever answers there is then within reach of
    everybody who may send an image URL."""
    register_demo: bool = True
    """Register the built-in demo model on the first start."""

    def __post_init__(self) -> None:
        for name in RANGES:
            if words := out_of_range(name, getattr(self, name)):
                raise InvalidRequestError(f"{name} {words}", field=name)
        if len(self.preload_models) > MAX_PRELOAD_MODELS:
            raise InvalidRequestError(
                f"preload_models has more than {MAX_PRELOAD_MODELS} entries", field="preload_models"
            )
        for name in ("inference_seconds", "drain_seconds", "stall_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidRequestError(f"{name} must be more than 0, and finite", field=name)
        if self.log_level.upper() not in LOG_LEVELS:
            raise InvalidRequestError(f"log_level must be one of {', '.join(LOG_LEVELS)}", field="log_level")
        self.url_policy()
        self._check_tls()
        self._check_exposure()

    def url_policy(self) -> UrlPolicy:
        """Which image URLs are fetched; raises InvalidRequestError where the options are none that say."""
        if not all(0 < port <= 65_535 for port in self.image_url_ports):
            raise InvalidRequestError("image_url_ports must be between 1 and 65535", field="image_url_ports")
        try:
            trusted = [ipaddress.ip_address(address) for address in self.image_url_trusted_addresses]
        except ValueError as error:
            raise InvalidRequestError(
                f"image_url_trusted_addresses must be IP addresses: {error}",
                field="image_url_trusted_addresses",
            ) from None
        try:
            return policy_of(self.image_url_fetch, self.image_url_ports, trusted)
        except ValueError as error:
            raise InvalidRequestError(
                f"image_url_fetch must be on, off, or hosts with commas between them: {error}",
                field="image_url_fetch",
            ) from None

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


RANGES: Mapping[str, tuple[float, float]] = {
    "port": (0, 65_535),
    "grpc_port": (0, 65_535),
    "standby_count": (0, 4),
    "max_concurrent_requests": (1, 1024),
    "max_waiting_requests": (0, 65_536),
    "max_concurrent_models": (1, 64),
    "model_inactivity_timeout_minutes": (1, 10_080),
    "max_context_length": (16, 16_777_216),  # Less would lock every prompt out.
    "max_model_memory_gb": (0, 65_536),
}
"""Least and greatest value of an option; nan is outside of each."""
_OR_ZERO = ("max_context_length",)
"""Options that may be 0 as well."""


def out_of_range(option: str, value: float) -> str:
    """What an option must be, for `port ...`; empty when it is that."""
    low, high = RANGES[option]
    is_zero_too = option in _OR_ZERO
    if low <= value <= high or (is_zero_too and value == 0):
        return ""
    return f"must be between {low} and {high}{', or 0' if is_zero_too else ''}"
