"""`status`: the server, its machine, its models and what waits, on one screen."""

from datetime import UTC, datetime

from mlxgui.v1 import model_pb2, system_pb2
from mlxgui_grpc.cli.connection import Connection
from mlxgui_grpc.cli.output import (
    enum_word,
    memory,
    print_json,
    print_pairs,
    print_table,
    span,
    to_json,
)
from mlxgui_grpc.cli.residents import COLUMNS, rows

ANSWER_SECONDS = 10.0
"""A server that takes longer to say how it does, does badly."""


def status(connection: Connection, as_json: bool) -> None:
    """Ask for everything and print it; a server that does not answer is the call's error."""
    with connection.open(ANSWER_SECONDS) as client:
        info = client.server_info()
        system = client.system_status()
        snapshot = client.manager_status()
        details = client.settings().details
    pending = [detail.key for detail in details if detail.pending_restart]
    if as_json:
        print_json(
            {
                "server": to_json(info),
                "system": to_json(system.system),
                "manager": to_json(snapshot),
                "settings_pending_restart": pending,
            }
        )
        return
    print_pairs(
        [
            ("server", server_words(info)),
            ("REST", info.rest_url or "none: it runs without the bridge"),
            ("gRPC", ", ".join(info.grpc_addresses)),
            ("state", info.state_directory),
            ("machine", machine_words(system.system)),
            ("memory", memory_words(system.system.memory)),
            ("GPU", gpu_words(system.system)),
            ("models", model_words(snapshot.status)),
            ("requests", request_words(snapshot.status)),
            ("settings", f"{', '.join(pending)} after a restart: `mlxgui restart`" if pending else ""),
        ]
    )
    if found := rows(snapshot):
        print()
        print_table(COLUMNS, found)


def server_words(info: system_pb2.GetServerInfoResponse) -> str:
    """State, version, process and age."""
    state = enum_word(system_pb2.ServerState.DESCRIPTOR, info.state)
    age = (datetime.now(UTC) - info.start_time.ToDatetime(tzinfo=UTC)).total_seconds()
    return f"{state}, mlxgui {info.version}, process {info.process_id}, up {span(age)}"


def machine_words(host: system_pb2.HostInfo) -> str:
    """Processor and system, and whether MLX runs there."""
    place = ", ".join(
        word for word in (host.processor, f"{host.platform} {host.architecture}") if word.strip()
    )
    return place if host.mlx_compatible else f"{place}; MLX does not run here, see `mlxgui doctor`"


def memory_words(machine: system_pb2.MemoryInfo) -> str:
    """In use, in all, and left."""
    return (
        f"{memory(machine.used_bytes)} of {memory(machine.total_bytes)} in use ({machine.percent_used:.0f} %), "
        f"{memory(machine.available_bytes)} available"
    )


def gpu_words(host: system_pb2.HostInfo) -> str:
    """The GPU's memory; none without a GPU."""
    if not host.HasField("gpu_memory"):
        return "none, models run on the processor"
    gpu = host.gpu_memory
    return f"{gpu.device_name}, {memory(gpu.available_bytes)} of {memory(gpu.total_bytes)} available to MLX"


def model_words(manager: model_pb2.ManagerStatus) -> str:
    """How many models are in memory, and how much of it they take."""
    words = f"{manager.loaded_model_count} of at most {manager.max_concurrent_models} in memory"
    words += f", {memory(manager.total_model_memory_bytes)} of {memory(manager.memory_budget_bytes)}"
    if manager.queued_load_count:
        words += f", {manager.queued_load_count} to be loaded"
    if manager.auto_unload_enabled:
        idle_seconds = manager.inactivity_timeout.ToTimedelta().total_seconds()
        return f"{words}; unloaded after {span(idle_seconds)} idle"
    return words


def request_words(manager: model_pb2.ManagerStatus) -> str:
    """What runs and waits, and how fast."""
    return (
        f"{manager.running_request_count} running, {manager.waiting_request_count} waiting, "
        f"{manager.tokens_per_second:.1f} tokens/s"
    )
