"""The commands about models in memory: ps, estimate, load, unload, priority, pin, unpin."""

import sys

from mlxgui.v1 import model_pb2
from mlxgui_grpc.cli import progress
from mlxgui_grpc.cli.connection import Connection
from mlxgui_grpc.cli.failures import EXIT_ERROR
from mlxgui_grpc.cli.output import enum_word, memory, moment, print_json, print_pairs, print_table, to_json
from mlxgui_grpc.cli.spans import parse_seconds

COLUMNS = ("NAME", "STATE", "MEMORY", "RUNNING", "WAITING", "TOKENS/S", "LAST USED", "UNLOADS", "PID")


def ps(connection: Connection, as_json: bool) -> None:
    """List the models that are in memory or on their way, and the loads that wait."""
    with connection.open() as client:
        snapshot = client.manager_status()
    if as_json:
        print_json(to_json(snapshot))
    elif not snapshot.loaded_models and not snapshot.queue:
        print("No model is loaded: the first request loads one, or `mlxgui load NAME`")
    else:
        print_table(COLUMNS, rows(snapshot))


def rows(snapshot: model_pb2.ManagerSnapshot) -> list[tuple[str, ...]]:
    """The models in memory and then the loads that wait, as cells of COLUMNS."""
    loaded = [
        (
            model.name,
            _state(model),
            memory(model.memory_bytes or model.estimated_memory_bytes),
            str(model.running_request_count),
            str(model.waiting_request_count),
            f"{model.tokens_per_second:.1f}",
            moment(model, "last_use_time") or "never",
            _unloads(model),
            str(model.process_id or ""),
        )
        for model in snapshot.loaded_models
    ]
    in_memory = {model.name for model in snapshot.loaded_models}
    waiting = [
        (
            load.model,
            f"queued, place {load.position}" + (f", priority {load.priority}" if load.priority else ""),
            *[""] * (len(COLUMNS) - 2),
        )
        for load in snapshot.queue
        if load.model not in in_memory
    ]
    return [*loaded, *waiting]


def _state(model: model_pb2.LoadedModel) -> str:
    word = enum_word(model_pb2.ModelState.DESCRIPTOR, model.state)
    return f"{word}, place {model.queue_position}" if model.HasField("queue_position") else word


def _unloads(model: model_pb2.LoadedModel) -> str:
    if model.pinned:
        return "never, pinned"
    if model.HasField("expire_time"):
        return moment(model, "expire_time")
    if model.state != model_pb2.MODEL_STATE_LOADED:
        return ""
    return "in use" if model.running_request_count or model.waiting_request_count else "never"


def estimate(
    connection: Connection, name: str, request_count: int | None, token_count: int | None, as_json: bool
) -> int:
    """What a load would take; 1 when it would be refused, else 0."""
    with connection.open() as client:
        answer = client.estimate(name, concurrent_request_count=request_count, tokens_per_request=token_count)
    if as_json:
        print_json(to_json(answer))
    else:
        print_pairs(
            [
                ("needs", memory(answer.required_bytes)),
                ("  weights", memory(answer.weight_bytes)),
                ("  KV cache", memory(answer.kv_bytes)),
                ("  prefill", memory(answer.prefill_bytes)),
                ("  process", memory(answer.process_bytes)),
                ("free", memory(answer.available_bytes)),
                ("without idle models", memory(answer.reclaimable_bytes)),
                ("evicts", ", ".join(answer.evicted_models) or "nothing"),
                ("verdict", verdict(answer)),
                ("note", answer.memory_warning),
            ]
        )
    return 0 if answer.accepted else EXIT_ERROR


def verdict(answer: model_pb2.EstimateLoadResponse) -> str:
    """What LoadModel would do, in words."""
    if answer.already_loaded:
        return "it is loaded already"
    return "it can be loaded" if answer.accepted else f"it would be refused: {answer.refusal.message}"


def load(connection: Connection, name: str, priority: int, keep_alive: str | None) -> None:
    """Load, showing how far it is. Interrupted, a load that has begun goes on: others may wait for it."""
    keep_alive_seconds = parse_seconds(keep_alive, "--keep-alive")
    with connection.open() as client:
        stream = client.load(name, priority=priority, keep_alive_seconds=keep_alive_seconds)
        operation = progress.follow(stream, [])
    if operation.load.evicted_models:
        print(f"Evicted {', '.join(operation.load.evicted_models)}", file=sys.stderr)
    if operation.load.memory_warning and operation.load.memory_warning not in operation.warnings:
        print(f"Note: {operation.load.memory_warning}", file=sys.stderr)
    print(f"Loaded {operation.success.name}")


def unload(connection: Connection, name: str, force: bool) -> None:
    """Remove from memory."""
    with connection.open() as client:
        model = client.unload(name, force=force)
    print(f"Unloaded {model.name}")


def priority(connection: Connection, name: str, value: int) -> None:
    """Set the priority, and say where its load is now."""
    with connection.open() as client:
        answer = client.set_priority(name, value)
    if answer.HasField("queue_position"):
        print(f"{answer.name} has priority {answer.priority}: its load is at place {answer.queue_position}")
    else:
        print(f"{answer.name} has priority {answer.priority} for its next loads; none waits now")


def pin(connection: Connection, name: str) -> None:
    """Keep in memory, from the next load on where it is not loaded."""
    with connection.open() as client:
        model = client.pin(name)
    if model.state == model_pb2.MODEL_STATE_LOADED:
        print(f"Pinned {model.name}: it stays in memory")
    else:
        print(f"Pinned {model.name}: it stays in memory once it is loaded, `mlxgui load {model.name}`")


def unpin(connection: Connection, name: str) -> None:
    """Let it be evicted and unloaded again."""
    with connection.open() as client:
        model = client.unpin(name)
    print(f"Unpinned {model.name}")
