"""Runs one embedding or reranking request: load the model if need be, hand it over, wait for its one answer."""

import asyncio
import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Generic, TypeVar

from mlxgui_grpc.catalog import InstalledModel
from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.calls import Call
from mlxgui_grpc.engine.supervisor import WorkerProcess
from mlxgui_grpc.errors import DeadlineError, InvalidRequestError, ModelTypeMismatchError
from mlxgui_grpc.metrics import Metrics
from mlxgui_grpc.residency import Residency

_WAYS_OUT = {
    "text": "POST /v1/chat/completions and /v1/completions (Chat, Generate) are for it",
    "vision": "POST /v1/chat/completions (Chat) is for it",
    "embedding": "POST /v1/embeddings (Embed) is for it",
    "reranker": "POST /v1/rerank (Rerank) is for it",
}


@dataclass(frozen=True, slots=True)
class Use:
    """Which model a request wants, and how urgently."""

    model: str
    priority: int = 0
    keep_alive_seconds: float | None = None
    """How long the model stays after its last use; infinity: for good; None: as before."""
    require_loaded: bool = False


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """What an Embed call asks for, checked."""

    use: Use
    prompts: list[frames.Prompt]
    dimensions: int = 0
    """Leading numbers of a vector to keep; 0: all."""


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """What a Rerank call asks for, checked."""

    use: Use
    query: str
    documents: list[str]
    top_count: int
    """Best documents to answer."""


Result = TypeVar("Result", frames.Embedded, frames.Reranked)


@dataclass(frozen=True, slots=True)
class Answered(Generic[Result]):
    """What the worker answered, and where the time went."""

    model: str
    result: Result
    load_seconds: float
    total_seconds: float
    warnings: tuple[str, ...]


class Embedder:
    """Runs embedding models and cross-encoders that are in memory, or brings them there."""

    def __init__(
        self,
        find_model: Callable[[str], InstalledModel],
        residency: Residency,
        metrics: Metrics,
        inference_seconds: float,
    ) -> None:
        """`find_model` raises for a name that is none; `inference_seconds` caps each call, its load included."""
        self._find_model = find_model
        self._residency = residency
        self._metrics = metrics
        self._inference_seconds = inference_seconds

    async def embed(self, request: EmbeddingRequest) -> Answered[frames.Embedded]:
        """The vectors. Raises what loading, admission or the engine raise."""
        model = self._find(
            request.use.model, "embedding", "makes no vectors; GET /v1/discover/embeddings finds some that do"
        )
        most = json.loads(model.metadata).get("embedding_dimensions") or request.dimensions
        if request.dimensions > most:
            raise InvalidRequestError(
                f"dimensions must be at most {most}, what '{model.name}' makes", field="dimensions"
            )
        return await self._answer(
            model,
            request.use,
            frames.Embedded,
            lambda worker: worker.embed(request.prompts, request.dimensions, request.use.priority),
        )

    async def rerank(self, request: RerankRequest) -> Answered[frames.Reranked]:
        """The scores of all documents, in their order. Raises what loading, admission or the engine raise."""
        model = self._find(
            request.use.model, "reranker", "scores no documents; install a cross-encoder for that"
        )
        return await self._answer(
            model,
            request.use,
            frames.Reranked,
            lambda worker: worker.rerank(request.query, request.documents, request.use.priority),
        )

    def _find(self, name: str, type: str, otherwise: str) -> InstalledModel:
        model = self._find_model(name)
        if model.type != type:
            way_out = _WAYS_OUT.get(model.type, "this version does not serve it")
            raise ModelTypeMismatchError(
                f"Model '{model.name}' is a model for {model.type} and {otherwise}. {way_out}.", field="model"
            )
        return model

    async def _answer(
        self,
        model: InstalledModel,
        use: Use,
        kind: type[Result],
        ask: Callable[[WorkerProcess], Call],
    ) -> Answered[Result]:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(self._inference_seconds), AsyncExitStack() as stack:
                lease = await stack.enter_async_context(
                    self._residency.use(
                        model,
                        require_loaded=use.require_loaded,
                        priority=use.priority,
                        keep_alive_seconds=use.keep_alive_seconds,
                    )
                )
                call = stack.enter_context(ask(lease.worker))
                observed = stack.enter_context(self._metrics.request(model.name))
                while True:
                    for event in await call.take():
                        if isinstance(event, frames.Accepted):
                            observed.accepted(event.prompt_token_count)
                        elif isinstance(event, kind):
                            total = loop.time() - started
                            observed.answered(event.queue_seconds, event.compute_seconds, total)
                            loaded = lease.resident.loaded
                            return Answered(
                                model.name,
                                event,
                                lease.load_seconds,
                                total,
                                loaded.warnings if loaded is not None else (),
                            )
        except TimeoutError:
            raise DeadlineError(
                f"the request was not done after {self._inference_seconds:g} seconds, its limit"
            ) from None
