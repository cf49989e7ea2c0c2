"""What launchd and systemd are told of the server: a property list, a unit, and the environment in both."""

import plistlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

LABEL = "mlxgui.server"
UNIT = "mlxgui.service"

STOP_SECONDS = 90
"""What the server may take to end: its grace, the workers, the database."""
RESTART_SECONDS = 5
"""Between a failure and the next start."""

_PREFIXES = ("MLX_GUI_", "HF_")
_OTHERS = ("HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")
_OF_CLIENTS = ("MLX_GUI_TARGET", "MLX_GUI_ROOT_CERTIFICATE", "MLX_GUI_DEBUG")
_OF_ONE_RUN = ("MLX_GUI_FAILPOINT", "MLX_GUI_HANDOVER")
_OF_TOKENS = ("HF_TOKEN_PATH",)
"""Names the file of a token; is none."""


@dataclass(frozen=True, slots=True)
class Definition:
    """How to run the server as a service."""

    command: Sequence[str]
    """The program and its arguments; the program's path is absolute."""
    environment: Mapping[str, str]
    log_file: Path
    """For what the server writes before it has its own log."""


def service_environment(home: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that decide how the server runs; never one that holds a secret."""
    wanted = {
        name: value
        for name, value in environ.items()
        if (name.startswith(_PREFIXES) or name in _OTHERS)
        and name not in (*_OF_CLIENTS, *_OF_ONE_RUN)
        and not _is_secret(name, value)
        and value
        and value.isprintable()
    }
    return dict(sorted({**wanted, "MLX_GUI_HOME": str(home)}.items()))


def secrets_left_out(environ: Mapping[str, str]) -> list[str]:
    """Names of the variables that are set, that the server would read, and that are in no file of ours."""
    known = (*_PREFIXES, "HUGGINGFACE_HUB_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    return sorted(
        name
        for name, value in environ.items()
        if name.startswith(known) and value and _is_secret(name, value)
    )


def _is_secret(name: str, value: str) -> bool:
    if name in _OF_TOKENS:
        return False
    return any(word in name for word in ("TOKEN", "KEY", "SECRET", "PASSWORD")) or _has_login(value)


def _has_login(value: str) -> bool:
    """Whether a value is an address with a user in it, and so perhaps with a password."""
    try:
        return "@" in urlsplit(value).netloc
    except ValueError:  # An address that is none, and would not work.
        return "@" in value


def launch_agent(definition: Definition) -> bytes:
    """The property list of a launchd agent: runs while the user is logged in, again when it fails."""
    return plistlib.dumps(
        {
            "Label": LABEL,
            "ProgramArguments": list(definition.command),
            "EnvironmentVariables": dict(definition.environment),
            "RunAtLoad": True,
            # `mlxgui stop` ends it with 0 and for good.
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": RESTART_SECONDS,
            "ExitTimeOut": STOP_SECONDS,
            # Without it launchd runs the workers at the lowest priority for disk and processor.
            "ProcessType": "Interactive",
            "Umask": 0o077,
            "StandardOutPath": str(definition.log_file),
            "StandardErrorPath": str(definition.log_file),
        },
        sort_keys=False,
    )


def systemd_unit(definition: Definition) -> bytes:
    """The unit of a systemd user service: runs while the user's manager does, again when it fails."""
    environment = [
        f"Environment={_quoted(f'{name}={value}')}" for name, value in definition.environment.items()
    ]
    command = " ".join(_quoted(word).replace("$", "$$") for word in definition.command)
    lines = [
        "[Unit]",
        "Description=mlxgui, a local model server for MLX",
        "",
        "[Service]",
        f"ExecStart={command}",
        *environment,
        "Restart=on-failure",
        f"RestartSec={RESTART_SECONDS}",
        # The server ends its workers itself, once their requests are done.
        "KillMode=mixed",
        f"TimeoutStopSec={STOP_SECONDS}",
        "UMask=0077",
        "",
        "[Install]",
        "WantedBy=default.target",
        "",
    ]
    return "\n".join(lines).encode()


def _quoted(word: str) -> str:
    """A word of a unit file: in quotes, with what has a meaning there escaped."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'
