"""`service`: the server as a service of the user, by launchd or systemd."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from mlxgui_grpc.cli.failures import EXIT_ERROR, CommandError
from mlxgui_grpc.cli.lifetime import lock_holder
from mlxgui_grpc.cli.output import print_json, print_pairs
from mlxgui_grpc.cli.service_files import Definition, secrets_left_out, service_environment
from mlxgui_grpc.cli.service_hosts import ServiceState, host_of


def install(
    home: Path, print_only: bool, environ: Mapping[str, str] = os.environ, platform: str = sys.platform
) -> None:
    """Write the file, for the user alone, and start the service; what fails leaves the files as they were."""
    host = host_of(platform, environ)
    definition = Definition(
        command=(sys.executable, "-m", "mlxgui_grpc", "serve"),
        environment=service_environment(home, environ),
        log_file=home / "logs" / "service.log",
    )
    if print_only:
        sys.stdout.write(host.text(definition).decode())
        return
    host.check_tool()
    was_running = host.state().running
    if not was_running and (pid := lock_holder(home)) is not None:
        raise CommandError(
            f"A server runs already (process {pid}), not as a service: end it with `mlxgui stop`, then install"
        )
    for folder in (home, definition.log_file.parent):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    before = host.file.read_bytes() if host.file.exists() else None
    write_private(host.file, host.text(definition))
    try:
        host.start()
    except CommandError:
        if before is None:
            host.file.unlink()
        else:
            write_private(host.file, before)
        raise
    print(f"Installed {host.file}: the server is started, now and whenever you log in")
    print(f"{host.hint} `mlxgui service status` says how it does, `mlxgui logs` what it did")
    for name in secrets_left_out(environ):
        print(f"Note: {name} is in no file of the service: {way_of_secret(name)}", file=sys.stderr)


def uninstall(home: Path, environ: Mapping[str, str] = os.environ, platform: str = sys.platform) -> None:
    """Stop the service and remove its file."""
    host = host_of(platform, environ)
    if not host.file.exists():
        raise CommandError(f"The service is not installed: there is no {host.file}")
    host.check_tool()
    host.stop()
    host.file.unlink()
    host.forget()
    print(f"Removed {host.file}; the server is stopped, models and settings stay in {home}")


def status(
    home: Path, as_json: bool, environ: Mapping[str, str] = os.environ, platform: str = sys.platform
) -> int:
    """Say how the service does; 0 when it runs, else 1."""
    host = host_of(platform, environ)
    state = ServiceState(False, False, None, "not installed: `mlxgui service install` does it")
    if host.file.exists():
        host.check_tool()
        state = host.state()
    holder = lock_holder(home)
    if as_json:
        print_json(
            {
                "installed": state.installed,
                "running": state.running,
                "process_id": state.process_id,
                "state": state.words,
                "file": str(host.file),
            }
        )
    else:
        by_hand = holder is not None and not state.running
        print_pairs(
            [
                ("service", state.words + (f", process {state.process_id}" if state.process_id else "")),
                ("file", str(host.file) if state.installed else ""),
                ("log", str(home / "logs") if state.installed else ""),
                ("note", f"process {holder} is a server that was started by hand" if by_hand else ""),
            ]
        )
    return 0 if state.running else EXIT_ERROR


def way_of_secret(name: str) -> str:
    """How the service gets a secret that its file must not have."""
    if name == "MLX_GUI_API_KEY":
        return "write api_key into config.toml in the state folder, which is yours alone"
    if name == "HF_ENDPOINT":
        return "its address has a user; write hub_endpoint into config.toml in the state folder, which is yours alone"
    return "`hf auth login` keeps the token where the service finds it"


def write_private(file: Path, content: bytes) -> None:
    """Write a file that only its owner can read, in one step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
    temporary.replace(file)
