"""The folder of a server's state: private, locked by one server at a time, and where clients find it."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from mlxgui_grpc.config import ServerConfig
from mlxgui_grpc.errors import StateDirectoryLockedError

MAX_SOCKET_PATH_BYTES = 100
"""The platforms allow 104 (macOS) or 108 (Linux), the terminating zero included."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a running server is found; written to `run/address.json` for its clients."""

    pid: int
    unix: str
    """Path of the unix socket."""
    grpc: str
    """host:port"""
    rest: str
    """Base URL of the bridge; empty without one."""


class StateDirectory:
    """A locked state folder. Closing unlocks it."""

    def __init__(self, config: ServerConfig, inherited_lock: int | None = None) -> None:
        """Create the folders and take the lock, unless the descriptor `inherited_lock` holds it already; raises
        StateDirectoryLockedError when another server has it."""
        os.umask(0o077)
        self._run = config.run_directory
        for folder in (
            config.home,
            config.run_directory,
            config.log_directory,
            config.temporary_directory,
            config.view_directory,
        ):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.chmod(0o700)  # Also one that was there: everything of ours lies behind these.
        self._lock = _lock(config.run_directory / "server.lock", config.home, inherited_lock)
        for leftover in config.view_directory.iterdir():
            shutil.rmtree(leftover, ignore_errors=True)
        self.socket = self._socket_path()
        self.socket.unlink(missing_ok=True)  # Ours by the lock: a leftover of a server that was killed.

    def publish(self, addresses: Addresses) -> None:
        """Tell clients where the server is."""
        temporary = self._run / "address.json.new"
        temporary.write_text(json.dumps(asdict(addresses)))
        temporary.replace(self._run / "address.json")

    def close(self) -> None:
        """Forget the addresses and unlock."""
        self.leave_locked()
        os.close(self._lock)

    def leave_locked(self) -> int:
        """Forget the addresses; the descriptor of the lock, which stays taken as long as that is open."""
        (self._run / "address.json").unlink(missing_ok=True)
        self.socket.unlink(missing_ok=True)
        return self._lock

    def _socket_path(self) -> Path:
        path = self._run / "grpc.sock"
        if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
            return path
        runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
        digest = hashlib.sha256(os.fsencode(self._run)).hexdigest()[:16]
        folder = runtime / f"mlxgui-{os.getuid()}-{digest}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise StateDirectoryLockedError(
                f"{folder} belongs to somebody else: remove it, or use a shorter --home"
            )
        return folder / "grpc.sock"


def _lock(path: Path, home: Path, inherited: int | None) -> int:
    """A descriptor of the file that holds its lock, and whose text is our process id."""
    if inherited is not None and _is_open_on(inherited, path):
        os.set_inheritable(inherited, False)
        return inherited
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode("ascii", "ignore").strip() or "unknown"
        os.close(descriptor)
        raise StateDirectoryLockedError(
            f"Another server (process {holder}) uses {home}: stop it, or choose another folder with --home or "
            "MLX_GUI_HOME",
            process=holder,
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def _is_open_on(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False
