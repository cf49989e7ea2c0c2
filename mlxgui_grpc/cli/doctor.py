"""`doctor`: looks at everything that the server needs, and says for each thing that is wrong the way out."""

import importlib.metadata
import os
import platform
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mlxgui.v1 import system_pb2
from mlxgui_grpc import __version__
from mlxgui_grpc.cli.connection import Connection
from mlxgui_grpc.cli.failures import explain
from mlxgui_grpc.cli.output import print_json, size
from mlxgui_grpc.client import ServerUnreachableError
from mlxgui_grpc.config import ServerConfig, hub_cache_directory
from mlxgui_grpc.engine.environment import find_openblas
from mlxgui_grpc.errors import InvalidRequestError, ModelServerError
from mlxgui_grpc.options import load_config
from mlxgui_grpc.ports import is_free, port_holder

LEAST_DISK_BYTES = 1_000_000_000
GOOD_DISK_BYTES = 10_000_000_000
PROBE_SECONDS = 120.0

# What a worker needs of MLX: that it imports, and that a product of matrices comes out right.
_PROBE = """
import mlx.core as mx
product = mx.ones((8, 8)) @ mx.ones((8, 8))
assert product.sum().item() == 512.0
print(mx.__version__, str(mx.default_device()).replace("Device(", "").split(",")[0])
"""

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    detail: str
    way_out: str = ""


def doctor(connection: Connection, as_json: bool, environ: Mapping[str, str] = os.environ) -> int:
    """Look at everything; 1 when something is wrong that must be mended, else 0."""
    found: list[Finding] = []
    for finding in findings(connection, environ):
        found.append(finding)
        if not as_json:
            print(f"{finding.verdict:<4}  {finding.name}: {finding.detail}", flush=True)
            if finding.way_out:
                print(f"      {finding.way_out}", flush=True)
    is_well = all(finding.verdict != "fail" for finding in found)
    if as_json:
        print_json({"ok": is_well, "checks": [asdict(finding) for finding in found]})
    return 0 if is_well else 1


def findings(connection: Connection, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Every check, cheap ones first."""
    yield check_python(sys.version_info[:3])
    yield check_platform(sys.platform, platform.machine())
    info, server = check_server(connection)
    yield server
    yield check_mlx(info)
    if sys.platform == "linux":
        yield check_openblas(find_openblas())
    try:
        config = load_config({"home": connection.home}, environ)
    except InvalidRequestError as error:
        yield Finding("config", "fail", error.message, "Correct the variable or the line of config.toml.")
        return
    yield check_state_directory(config.home)
    if info is None:
        yield from check_ports(config)
    yield check_disk(config.hub_cache or hub_cache_directory(environ))
    yield check_token(environ)


def check_python(version: tuple[int, ...]) -> Finding:
    """3.11 or newer."""
    words = ".".join(map(str, version))
    if version < (3, 11):
        return Finding("python", "fail", words, "Install Python 3.11 or newer and run `make run` with it.")
    return Finding("python", "ok", words)


def check_platform(system: str, machine: str) -> Finding:
    """Apple silicon, or Linux for the processor."""
    words = f"{system} {machine}"
    if system == "darwin" and machine == "arm64":
        return Finding("platform", "ok", f"{words}, models run on the GPU")
    if system == "linux":
        return Finding("platform", "ok", f"{words}, models run on the processor")
    return Finding("platform", "fail", words, "MLX needs a Mac with Apple silicon, or Linux.")


def check_server(connection: Connection) -> tuple[system_pb2.GetServerInfoResponse | None, Finding]:
    """Whether a server answers, and whether it is of this version."""
    try:
        with connection.open() as client:
            info = client.server_info()
    except ServerUnreachableError as error:
        return None, Finding("server", "warn", error.message)
    except ModelServerError as error:
        return None, Finding("server", "fail", explain(error)[0])
    addresses = ", ".join([info.rest_url or "no REST", *info.grpc_addresses])
    words = f"{info.version}, process {info.process_id}, {addresses}"
    if info.version != __version__:
        return info, Finding(
            "server", "warn", words, f"This is {__version__}: restart the server to bring it along."
        )
    return info, Finding("server", "ok", words)


def check_mlx(info: system_pb2.GetServerInfoResponse | None) -> Finding:
    """What the running server found out, else a short process that imports MLX and computes."""
    if info is not None and info.engine_versions:
        versions = ", ".join(f"{name} {version}" for name, version in sorted(info.engine_versions.items()))
        return Finding("mlx", "ok", f"{versions} (says the server)")
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding(
            "mlx", "fail", f"no answer within {PROBE_SECONDS:.0f} s", "Look at what else the machine does."
        )
    if probe.returncode == 0:
        version, _, device = probe.stdout.strip().partition(" ")
        return Finding(
            "mlx", "ok", f"mlx {version} on the {device}, mlx-lm {importlib.metadata.version('mlx-lm')}"
        )
    last_line = (probe.stderr.strip().splitlines() or [f"the process ended with {probe.returncode}"])[-1]
    return Finding("mlx", "fail", last_line, "Install again with `make run`; on an Intel Mac MLX cannot run.")


def check_openblas(library: str | None) -> Finding:
    """The BLAS that makes MLX fast on Linux; never required."""
    if library:
        return Finding("openblas", "ok", library)
    return Finding(
        "openblas",
        "warn",
        "not found: models answer 20 to 200 times slower",
        "Install it, on Debian `apt install libopenblas0-pthread`, and restart the server.",
    )


def check_state_directory(home: Path) -> Finding:
    """Ours, closed to others, and writable."""
    if not home.exists():
        parent = next(folder for folder in home.parents if folder.exists())
        if os.access(parent, os.W_OK):
            return Finding("state", "ok", f"{home} does not exist yet: `mlxgui serve` makes it")
        return Finding(
            "state", "fail", f"{parent} is not writable", "Choose another folder with MLX_GUI_HOME."
        )
    if not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
        return Finding(
            "state", "fail", f"{home} is not a writable folder", "Choose another one with MLX_GUI_HOME."
        )
    mode = stat.S_IMODE(home.stat().st_mode)
    if mode & 0o077:
        return Finding("state", "warn", f"{home} is open to others ({mode:04o})", f"chmod 700 {home}")
    return Finding("state", "ok", str(home))


def check_ports(config: ServerConfig) -> Iterator[Finding]:
    """Whether a server could listen; asked only when none of ours runs."""
    for name, host, port, flag in (
        ("REST port", config.host, config.port, "--port"),
        ("gRPC port", config.grpc_host, config.grpc_port, "--grpc-port"),
    ):
        if not port or is_free(host, port):
            yield Finding(name, "ok", f"{host}:{port or 'any'} is free")
        else:
            holder = port_holder(port) or "another program"
            yield Finding(
                name, "fail", f"{host}:{port} is used by {holder}", f"Stop it, or choose another with {flag}."
            )


def check_disk(cache: Path) -> Finding:
    """Room for downloads."""
    folder = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    words = f"{size(free) or '0 B'} free for models in {cache}"
    if not os.access(folder, os.W_OK):
        return Finding(
            "disk", "fail", f"{folder} is not writable", "Choose another folder with HF_HUB_CACHE."
        )
    if free < LEAST_DISK_BYTES:
        return Finding("disk", "fail", words, "Remove models with `mlxgui rm`, or set HF_HUB_CACHE.")
    if free < GOOD_DISK_BYTES:
        return Finding("disk", "warn", words, "Many models are larger: remove some, or set HF_HUB_CACHE.")
    return Finding("disk", "ok", words)


def check_token(environ: Mapping[str, str]) -> Finding:
    """Whether there is a Hugging Face token; what it is, is never read."""
    for variable in ("HF_TOKEN", "HUGGINGFACE_HUB_TOKEN"):
        if environ.get(variable, "").strip():
            return Finding("hub token", "ok", f"set by {variable}")
    default = Path(environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "token"
    path = Path(environ.get("HF_TOKEN_PATH", default)).expanduser()
    if path.is_file():
        return Finding("hub token", "ok", f"in {path}")
    return Finding("hub token", "ok", "none; only gated and private models need one (HF_TOKEN)")
