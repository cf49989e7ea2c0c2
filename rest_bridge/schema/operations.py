"""Every route with what it takes and answers, by its endpoint in the Flask application."""

from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from rest_bridge.schema import messages, responses
from rest_bridge.schema import native_answers as native
from rest_bridge.schema import native_requests as requests
from rest_bridge.schema import openai_answers as openai
from rest_bridge.schema import openai_requests as openai_bodies

Model = type[BaseModel]


class Operation(NamedTuple):
    """One route: its models, and how it differs from a GET that answers with JSON."""

    summary: str
    answer: Any = None
    """Model of a JSON answer with status 200. None: see `media_type`, or it only fails."""
    body: Model | None = None
    """Model of the body, which has to be there."""
    parameters: Model | None = None
    """Parameters, in the query string; where `either` is set a JSON object does as well."""
    either: bool = False
    events: Any = None
    """Model of the server-sent events, [DONE] aside."""
    later: Any = None
    """Model of an answer with status 202."""
    unready: Any = None
    """Model of an answer with status 503 that is no error."""
    media_type: str = ""
    """Of an answer that is not JSON."""
    dialect: Literal["native", "openai", "anthropic"] = "native"
    """Form of the errors."""


_AUDIO = Operation("Not served by this version: 501.", dialect="openai")

OPERATIONS: dict[str, Operation] = {
    "openai.create_chat_completion": Operation(
        "A reply to a conversation, whole or streamed.",
        openai.ChatCompletion,
        openai_bodies.ChatCompletionRequest,
        events=openai.ChatCompletionChunk,
        dialect="openai",
    ),
    "openai.create_completion": Operation(
        "The continuation of prompts, whole or streamed.",
        openai.Completion,
        openai_bodies.CompletionRequest,
        events=openai.CompletionChunk,
        dialect="openai",
    ),
    "openai.create_embedding": Operation(
        "Vectors of texts.", openai.EmbeddingList, openai_bodies.EmbeddingRequest, dialect="openai"
    ),
    "openai.create_ranking": Operation(
        "How well documents answer a query, best first, as Jina and Cohere have it.",
        openai.Ranking,
        openai_bodies.RerankRequest,
        dialect="openai",
    ),
    "responses.create_response": Operation(
        "OpenAI's Responses API, stateless.",
        responses.Response,
        responses.ResponseRequest,
        events=responses.ResponseEvent,
        dialect="openai",
    ),
    "messages.create_message": Operation(
        "Anthropic's Messages API.",
        messages.Message,
        messages.MessageRequest,
        events=messages.MessageEvent,
        dialect="anthropic",
    ),
    "messages.count_tokens": Operation(
        "Tokens that a message would have.", messages.TokenCount, messages.CountRequest, dialect="anthropic"
    ),
    "openai.audio": _AUDIO,
    "openai.voices": _AUDIO,
    "models.list_models": Operation(
        "Installed models, in OpenAI's form and in the documented one.", native.ModelList
    ),
    "models.show_model": Operation("One model.", native.InstalledModel),
    "models.delete_model": Operation(
        "Remove a model, and the files that were downloaded for it.",
        native.Deleted,
        parameters=requests.DeleteParameters,
        either=True,
    ),
    "models.install_model": Operation(
        "Install a model of the hub, or register a directory.",
        native.Installed,
        requests.InstallRequest,
        requests.InstallQuery,
        later=native.Operation,
    ),
    "models.update_model": Operation(
        "Go to a newer revision.",
        native.Updated,
        parameters=requests.UpdateParameters,
        either=True,
        later=native.Operation,
    ),
    "models.load_model": Operation(
        "Load a model into memory.", native.Loaded, parameters=requests.LoadParameters, either=True
    ),
    "models.unload_model": Operation(
        "Take a model out of memory.", native.Unloaded, parameters=requests.ForceParameters, either=True
    ),
    "models.pin_model": Operation("Keep a model in memory.", native.Pinned),
    "models.unpin_model": Operation("Let a model leave the memory again.", native.Pinned),
    "models.estimate_load": Operation(
        "What a load would take and evict, or why it would be refused.",
        native.LoadEstimate,
        parameters=requests.EstimateQuery,
    ),
    "models.model_health": Operation("Whether a model can answer.", native.ModelHealth),
    "models.generate": Operation(
        "Text from a prompt, of a loaded model.", native.Generated, requests.GenerateRequest
    ),
    "manager.manager_models": Operation(
        "Installed models.", native.ManagerModels, parameters=requests.ManagerModelsQuery
    ),
    "manager.manager_status": Operation("What is in memory and what waits.", native.ManagerSnapshot),
    "manager.watch_manager": Operation("The same as events, on every change.", events=native.ManagerSnapshot),
    "manager.model_status": Operation("One model in memory.", native.ModelStatus),
    "manager.set_priority": Operation("Move a load in the queue.", native.Priority, requests.PriorityRequest),
    "operations.list_operations": Operation(
        "Installs, updates and loads.", native.Operations, parameters=requests.OperationsQuery
    ),
    "operations.show_operation": Operation("One of them.", native.Operation),
    "operations.cancel_operation": Operation("Cancel it.", native.Operation),
    "discover.search": Operation("Models of the hub.", native.CatalogPage, parameters=requests.SearchQuery),
    "discover.popular": Operation("The most downloaded.", native.CatalogPage, parameters=requests.PageQuery),
    "discover.embeddings": Operation("Embedding models.", native.CatalogPage, parameters=requests.WordsQuery),
    "discover.compatible": Operation(
        "Models that fit this machine.", native.CatalogPage, parameters=requests.CompatibleQuery
    ),
    "discover.categories": Operation("Chosen models by category.", native.Categories),
    "discover.show": Operation("One model of the hub.", native.CatalogModel),
    "system.root": Operation("Name, version and status; a page for browsers.", native.Root),
    "system.docs": Operation("This description, readable.", media_type="text/html"),
    "system.openapi": Operation("This description.", dict[str, Any]),
    "system.health": Operation("Whether the server is ready.", native.Health, unready=native.Unhealthy),
    "system.metrics": Operation("Prometheus metrics.", media_type="text/plain"),
    "system.system_status": Operation("The server, its machine and its memory.", native.SystemStatus),
    "system.shutdown": Operation(
        "End the server.", native.Said, parameters=requests.GraceParameters, either=True
    ),
    "system.restart": Operation(
        "Start it again.", native.Said, parameters=requests.GraceParameters, either=True
    ),
    "system.settings": Operation(
        "Settings in effect.", native.AnySettings, parameters=requests.SettingsQuery
    ),
    "system.set_setting": Operation("Change a setting.", native.SettingUpdated, requests.SettingRequest),
    "system.reset_setting": Operation("Forget a stored value.", native.SettingUpdated),
}
ERRORS: dict[str, Model] = {
    "native": native.NativeError,
    "openai": openai.OpenAIError,
    "anthropic": messages.MessageError,
}
ERROR_EVENTS: dict[str, Model] = {
    "native": openai.ErrorEvent,
    "openai": openai.ErrorEvent,
    "anthropic": messages.MessageErrorEvent,
}
HEADERS: dict[str, tuple[str, ...]] = {
    "native": ("X-Request-Id",),
    "openai": ("X-Request-Id", "X-MLXGUI-Warnings"),
    "anthropic": ("X-Request-Id", "Request-Id", "X-MLXGUI-Warnings"),
}
"""Of an answer."""
TITLES = {
    "openai": "OpenAI's routes",
    "responses": "OpenAI's routes",
    "messages": "Anthropic's routes",
    "models": "Installed models",
    "manager": "Models in memory",
    "operations": "Long actions",
    "discover": "The hub",
    "system": "The server",
}
"""Sections of the document, by the first half of an endpoint."""
