"""What is in memory, as messages of the contract."""

from mlxgui.v1 import model_pb2 as pb
from mlxgui_grpc import convert
from mlxgui_grpc.residency import ModelStatus, Snapshot

TYPES = {
    "text": pb.MODEL_TYPE_TEXT,
    "vision": pb.MODEL_TYPE_VISION,
    "embedding": pb.MODEL_TYPE_EMBEDDING,
    "reranker": pb.MODEL_TYPE_RERANKER,
    "transcription": pb.MODEL_TYPE_TRANSCRIPTION,
    "speech": pb.MODEL_TYPE_SPEECH,
}
STATES = {
    "unloaded": pb.MODEL_STATE_UNLOADED,
    "queued": pb.MODEL_STATE_QUEUED,
    "loading": pb.MODEL_STATE_LOADING,
    "loaded": pb.MODEL_STATE_LOADED,
    "unloading": pb.MODEL_STATE_UNLOADING,
    "failed": pb.MODEL_STATE_FAILED,
}


def snapshot_to_proto(snapshot: Snapshot, operation_ids: dict[str, str]) -> pb.ManagerSnapshot:
    """The whole; `operation_ids` of running loads by model."""
    return pb.ManagerSnapshot(
        loaded_models=[model_to_proto(model) for model in snapshot.models],
        status=status_to_proto(snapshot),
        queue=[
            pb.QueuedLoad(
                operation_id=operation_ids.get(load.model, ""),
                model=load.model,
                priority=load.priority,
                position=position,
                queue_time=convert.timestamp(load.queue_time),
            )
            for position, load in enumerate(snapshot.queue, 1)
        ],
    )


def status_to_proto(snapshot: Snapshot) -> pb.ManagerStatus:
    """Sums and limits."""
    models = snapshot.models
    memory_bytes = sum(model.memory_bytes for model in models)
    return pb.ManagerStatus(
        loaded_model_count=len(snapshot.loaded),
        max_concurrent_models=snapshot.max_models,
        queued_load_count=len(snapshot.queue),
        total_model_memory_bytes=memory_bytes,
        memory_budget_bytes=snapshot.budget_bytes,
        memory_usage_percent=round(100 * memory_bytes / snapshot.machine_bytes, 1),
        max_tokens_limit=convert.MAX_TOKENS_LIMIT,
        auto_unload_enabled=snapshot.auto_unload,
        inactivity_timeout=convert.duration(snapshot.idle_seconds),
        running_request_count=sum(model.running_request_count for model in models),
        waiting_request_count=sum(model.waiting_request_count for model in models),
        tokens_per_second=sum(model.tokens_per_second for model in models),
        kv_bytes=sum(model.kv_bytes for model in models),
        cache_bytes=0,
        standby_count=snapshot.standby_count,
    )


def model_to_proto(model: ModelStatus) -> pb.LoadedModel:
    """One model."""
    message = pb.LoadedModel(
        name=model.name,
        state=STATES[model.state],
        type=TYPES.get(model.type, pb.MODEL_TYPE_UNSPECIFIED),
        memory_bytes=model.memory_bytes,
        estimated_memory_bytes=model.estimated_memory_bytes,
        running_request_count=model.running_request_count,
        waiting_request_count=model.waiting_request_count,
        tokens_per_second=model.tokens_per_second,
        kv_bytes=model.kv_bytes,
        pinned=model.is_pinned,
        process_id=model.process_id,
    )
    for field, time in (
        (message.load_time, model.load_time),
        (message.last_use_time, model.last_use_time),
        (message.expire_time, model.expire_time),
    ):
        if time is not None:
            field.CopyFrom(convert.timestamp(time))
    if model.queue_position:
        message.queue_position = model.queue_position
    return message
