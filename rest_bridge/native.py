"""Installed models, long actions and generation: the documented native bodies as `mlxgui.v1` messages, and back.

Pure: no Flask, no I/O.
"""

from typing import Any

from mlxgui.v1 import common_pb2, inference_pb2, model_pb2
from rest_bridge.errors import JsonObject, invalid, reason_name
from rest_bridge.json_body import Fields
from rest_bridge.message_json import enum_word, instant, message_json
from rest_bridge.openai import finish_reason, read_sampling, read_scheduling


def model_json(model: model_pb2.Model) -> JsonObject:
    """One model as documented, which is OpenAI's model object too, but for `id`: that stays the number."""
    return {**message_json(model), **_openai_model(model), "id": model.id}


def model_list(models: list[model_pb2.Model]) -> JsonObject:
    """The body of /v1/models: what the document has there, both times."""
    return {
        "object": "list",
        "data": [_openai_model(model) for model in models],
        "models": [message_json(model) for model in models],
    }


def _openai_model(model: model_pb2.Model) -> JsonObject:
    return {
        "id": model.name,
        "object": "model",
        "created": model.create_time.seconds,
        "owned_by": "mlx-gui",
        "permission": [],
        "root": model.name,
        "parent": None,
    }


def install_request(body: JsonObject) -> model_pb2.InstallModelRequest:
    """What a body of /v1/models/install asks for. Raises ApiError (400)."""
    fields = Fields(body)
    request = model_pb2.InstallModelRequest(
        name=fields.text("name") or "",
        revision=fields.text("revision") or "",
        force=fields.boolean("force") or False,
    )
    model_id = fields.text("model_id")
    path = fields.text("path")
    fields.refuse_unread()
    if model_id and path:
        raise invalid("Send `model_id` or `path`, not both.", "path")
    if path:
        request.local_directory = path
    elif model_id:
        request.model_id = model_id
    else:
        raise invalid("`model_id` is missing; it names a repository of the hub, as `owner/name`.", "model_id")
    return request


def installed(operation: model_pb2.Operation, request: model_pb2.InstallModelRequest) -> JsonObject:
    """The documented answer to an installation that succeeded."""
    model = operation.success
    body: JsonObject = {
        "message": f"Model '{model.name}' installed successfully",
        "model_name": model.name,
        "model_id": model.huggingface_id or request.model_id or None,
        "status": "installed",
    }
    if request.local_directory:
        body["path"] = model.path
    return _with_warnings(body, operation.warnings)


def loaded(operation: model_pb2.Operation) -> JsonObject:
    """The documented answer to a load that succeeded."""
    name = operation.success.name or operation.model
    body: JsonObject = {"message": f"Model '{name}' loaded successfully", "status": "loaded"}
    if operation.load.memory_warning:
        body["memory_warning"] = operation.load.memory_warning
    if operation.load.evicted_models:
        body["evicted_models"] = list(operation.load.evicted_models)
    return _with_warnings(body, operation.warnings)


def updated(operation: model_pb2.Operation, old_revision: str) -> JsonObject:
    """The answer to an update that succeeded: whether there was a newer revision."""
    model = operation.success
    is_new = model.revision != old_revision
    words = "updated successfully" if is_new else "is up to date"
    body: JsonObject = {
        "message": f"Model '{model.name}' {words}",
        "model_name": model.name,
        "model_id": model.huggingface_id or None,
        "revision": model.revision or None,
        "status": "updated" if is_new else "up_to_date",
    }
    return _with_warnings(body, operation.warnings)


def pinned(model: model_pb2.Model) -> JsonObject:
    """The answer to pinning and unpinning."""
    word = "pinned" if model.pinned else "unpinned"
    return {"message": f"Model '{model.name}' {word} successfully", "pinned": model.pinned, "status": word}


def unloaded(model: model_pb2.Model) -> JsonObject:
    """The documented answer to an unload."""
    return {"message": f"Model '{model.name}' unloaded successfully", "status": "unloaded"}


def deleted(response: model_pb2.DeleteModelResponse) -> JsonObject:
    """The documented answer to a deletion, and why files stayed if they did."""
    body: JsonObject = {
        "message": f"Model '{response.name}' deleted successfully",
        "removed_files": response.removed_files,
        "status": "deleted",
    }
    if response.kept_reason:
        body["reason"] = response.kept_reason
    if response.freed_bytes:
        body["freed_bytes"] = response.freed_bytes
    return body


def model_health(response: model_pb2.CheckModelHealthResponse) -> JsonObject:
    """The documented answer about a model's health."""
    body = message_json(response)
    answer: JsonObject = {
        "model": response.name,
        "status": body["status"],
        "healthy": response.healthy,
        "last_used": body["last_used_at"],
    }
    return {**answer, "reason": response.reason} if response.reason else answer


def operation_json(operation: model_pb2.Operation) -> JsonObject:
    """One operation: its state as a word, its progress, and its error or result once it is done."""
    body: JsonObject = {
        "id": operation.id,
        "kind": enum_word(model_pb2.Operation.Kind.DESCRIPTOR, operation.kind),
        "model": operation.model,
        "status": operation_status(operation),
        "done": operation.done,
        "created_at": instant(operation.create_time) if operation.HasField("create_time") else None,
        "updated_at": instant(operation.update_time) if operation.HasField("update_time") else None,
        "progress": None,
        "error": None,
        "result": None,
        "warnings": list(operation.warnings),
    }
    progress = operation.WhichOneof("progress")
    if progress is not None:
        body["progress"] = message_json(getattr(operation, progress), exact_bytes=True)
    match operation.WhichOneof("result"):
        case "error":
            body["error"] = {
                "detail": operation.error.message,
                "reason": reason_name(operation.error.reason),
                "field": operation.error.field or None,
                "metadata": dict(operation.error.metadata),
            }
        case "success":
            body["result"] = model_json(operation.success)
        case "adapter":
            body["result"] = message_json(operation.adapter)
    return body


def operation_status(operation: model_pb2.Operation) -> str:
    """running, succeeded, failed or cancelled."""
    if not operation.done:
        return "running"
    if operation.WhichOneof("result") != "error":
        return "succeeded"
    cancelled = operation.error.reason == common_pb2.ERROR_REASON_CANCELLED
    return "cancelled" if cancelled else "failed"


# --- Generation ----------------------------------------------------------------------------------


def generate_request(name: str, body: JsonObject) -> inference_pb2.GenerateRequest:
    """What a body of /v1/models/{name}/generate asks for. Raises ApiError (400)."""
    fields = Fields(body)
    prompt = fields.text("prompt")
    if prompt is None:
        fields.missing("prompt")
    request = inference_pb2.GenerateRequest(
        model=name,
        prompts=[inference_pb2.Prompt(text=prompt)],
        load_policy=common_pb2.LOAD_POLICY_REQUIRE_LOADED,
    )
    read_sampling(fields, request.sampling)
    read_scheduling(fields, request)
    fields.refuse_unread()
    return request


def generated(response: inference_pb2.GenerateResponse, request: inference_pb2.GenerateRequest) -> JsonObject:
    """The documented answer to a generation."""
    choice = response.choices[0]
    usage = response.usage
    timing = response.timing
    seconds = sum(
        sign * span.ToTimedelta().total_seconds()
        for sign, span in ((1, timing.total), (-1, timing.queue), (-1, timing.load))
    )
    body: JsonObject = {
        "model": response.model or request.model,
        "prompt": request.prompts[0].text,
        "text": choice.text,
        "finish_reason": finish_reason(choice),
        "usage": {
            "prompt_tokens": usage.prompt_token_count,
            "completion_tokens": usage.completion_token_count,
            "total_tokens": usage.total_token_count,
        },
        # The document's rate is the quotient of its two other numbers.
        "timing": {
            "generation_time_seconds": round(seconds, 6),
            "tokens_per_second": round(usage.completion_token_count / seconds, 3) if seconds > 0 else 0.0,
        },
    }
    return _with_warnings(body, response.warnings)


def _with_warnings(body: JsonObject, warnings: Any) -> JsonObject:
    return {**body, "warnings": list(warnings)} if warnings else body
