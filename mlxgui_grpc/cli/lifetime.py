"""`stop` and `restart`: ending the server, and waiting until that is so."""

import sys
import time
from pathlib import Path

import psutil

from mlxgui.v1 import model_pb2, system_pb2
from mlxgui_grpc.cli.connection import Connection
from mlxgui_grpc.cli.failures import EXIT_USAGE, CommandError
from mlxgui_grpc.cli.output import span
from mlxgui_grpc.cli.spans import parse_seconds
from mlxgui_grpc.client import ServerUnreachableError
from mlxgui_grpc.errors import DeadlineError, ModelServerError

ANSWER_SECONDS = 10.0
ASK_SECONDS = 0.5
POLL_SECONDS = 0.05
SILENT_SECONDS = 120.0
"""How long a server may say nothing on its way down or up. While it answers, it may take its time."""


def stop(connection: Connection, grace: str | None, answer_seconds: float = ANSWER_SECONDS) -> None:
    """Tell the server to end, and wait for that; one that says nothing for `answer_seconds` hangs."""
    grace_seconds = _grace_seconds(grace)
    try:
        with connection.open(answer_seconds) as client:
            info = client.server_info()
            process = _process_of(connection, info)
            in_flight_count = client.shutdown(grace_seconds=grace_seconds)
    except (ServerUnreachableError, DeadlineError) as error:
        raise _silent(connection, error) from error
    # On stderr, as it is nothing of the result.
    print(f"Stopping: {waiting_words(in_flight_count, grace_seconds)}", file=sys.stderr)
    silent_since = time.monotonic()
    while not _is_gone(process):
        now = _answer(connection)
        if now is not None and not _is_newer(now, info):
            silent_since = time.monotonic()
        elif process is None:
            break  # A server elsewhere: that it says nothing more is all there is to know.
        elif time.monotonic() - silent_since > SILENT_SECONDS:
            raise CommandError(_stuck(info.process_id, "has ended its connections and still runs"))
        _wait(process)
    print(f"Stopped the server (process {info.process_id})")


def restart(connection: Connection, grace: str | None, answer_seconds: float = ANSWER_SECONDS) -> None:
    """Tell the server to start again, wait until it answers as a new one, and say where it is."""
    grace_seconds = _grace_seconds(grace)
    begun = time.monotonic()
    try:
        with connection.open(answer_seconds) as client:
            info = client.server_info()
            process = _process_of(connection, info)
            loaded = _loaded(client.manager_status())
            in_flight_count = client.restart(grace_seconds=grace_seconds)
    except (ServerUnreachableError, DeadlineError) as error:
        raise _silent(connection, error) from error
    print(f"Restarting: {waiting_words(in_flight_count, grace_seconds)}", file=sys.stderr)
    silent_since, is_down = time.monotonic(), False
    while (now := _answer(connection)) is None or not (_is_newer(now, info) and _is_ready(now)):
        if now is not None:
            silent_since = time.monotonic()
        elif not is_down:
            is_down = True
            print("It has ended, and starts again", file=sys.stderr)
        if _is_gone(process):
            raise CommandError("The server ended and did not start again: `mlxgui logs` says why")
        if time.monotonic() - silent_since > SILENT_SECONDS:
            raise CommandError("The server ended and does not answer again: `mlxgui logs` says why")
        _wait(process)
    words = f"process {now.process_id}" + ("" if now.process_id == info.process_id else ", a new one")
    print(f"Restarted the server ({words}) in {span(time.monotonic() - begun)}")
    for address in (now.rest_url, *now.grpc_addresses):
        if address:
            print(f"  {address}")
    if loaded:
        print(f"Loaded again, if they fit: {', '.join(loaded)}", file=sys.stderr)


def lock_holder(home: Path) -> int | None:
    """Id of the process that holds the lock of a state folder; None where none does, or it cannot be told.

    Trying the lock would tell too, and would make a server fail that starts at that moment.
    """
    lock = home / "run" / "server.lock"
    try:
        process = psutil.Process(int(lock.read_text()))
        is_held = any(_is_same(file.path, lock) for file in process.open_files())
    except (OSError, ValueError, psutil.Error):
        return None
    return process.pid if is_held else None


def _is_same(path: str, lock: Path) -> bool:
    try:
        return lock.samefile(path)
    except OSError:  # It is open and was removed.
        return False


def waiting_words(in_flight_count: int, grace_seconds: float | None) -> str:
    """What happens to the requests that run."""
    if not in_flight_count:
        return "no request runs"
    requests = "1 request runs" if in_flight_count == 1 else f"{in_flight_count} requests run"
    if grace_seconds == 0:
        return f"{requests} and must end now"
    limit = "as long as the server's grace" if grace_seconds is None else f"{span(grace_seconds)} at most"
    return f"{requests} on, {limit} (Ctrl-C ends the waiting, not that)"


def _grace_seconds(grace: str | None) -> float | None:
    seconds = parse_seconds(grace, "--grace")
    if seconds is not None and not seconds >= 0:
        raise CommandError(f"--grace must be 0 or more, not {grace}", EXIT_USAGE)
    return seconds


def _process_of(connection: Connection, info: system_pb2.GetServerInfoResponse) -> psutil.Process | None:
    """The server's process, where it is one of this machine."""
    if not connection.shares_files:
        return None
    try:
        return psutil.Process(info.process_id)
    except psutil.Error:
        return None


def _loaded(snapshot: model_pb2.ManagerSnapshot) -> list[str]:
    return [model.name for model in snapshot.loaded_models if model.state == model_pb2.MODEL_STATE_LOADED]


def _is_gone(process: psutil.Process | None) -> bool:
    """Whether a process has ended; no for one of another machine, of which that cannot be seen."""
    try:
        return process is not None and (not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _wait(process: psutil.Process | None) -> None:
    """Until it is worth asking again: at once when the process ends, else a second."""
    deadline = time.monotonic() + ASK_SECONDS
    while time.monotonic() < deadline and not _is_gone(process):
        time.sleep(POLL_SECONDS)


def _answer(connection: Connection) -> system_pb2.GetServerInfoResponse | None:
    """What the server says of itself; None while it says nothing."""
    try:
        with connection.open(ANSWER_SECONDS) as client:
            return client.server_info()
    except ModelServerError:
        return None


def _is_newer(now: system_pb2.GetServerInfoResponse, before: system_pb2.GetServerInfoResponse) -> bool:
    """Whether this is a later start of the server than that."""
    return now.start_time.ToNanoseconds() > before.start_time.ToNanoseconds()


def _is_ready(now: system_pb2.GetServerInfoResponse) -> bool:
    return now.state == system_pb2.SERVER_STATE_RUNNING


def _silent(connection: Connection, error: ModelServerError) -> Exception:
    """What to do about a server that does not answer: nothing where none runs, else end its process."""
    if connection.target is None and (pid := lock_holder(connection.home)) is not None:
        return CommandError(_stuck(pid, f"holds {connection.home} and does not answer"))
    return error


def _stuck(pid: int, what: str) -> str:
    return f"Process {pid} {what}: `kill {pid}` ends it, and `kill -9 {pid}` if that does not"
