"""Runs one generation: load the model if need be, submit its rows, relay what the engine says as typed events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field

from mlxgui_grpc.catalog import InstalledModel
from mlxgui_grpc.deltas import Delta, deltas_of
from mlxgui_grpc.engine import frames
from mlxgui_grpc.errors import DeadlineError, ModelTypeMismatchError
from mlxgui_grpc.images.loader import ImageLoader
from mlxgui_grpc.images.sources import ImageSource
from mlxgui_grpc.metrics import Metrics
from mlxgui_grpc.residency import Lease, Residency

_GENERATING_TYPES = ("text", "vision")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What a Chat or Generate call asks for, checked. Its rows are `prompts` x `choices`."""

    model: str
    prompts: list[frames.Prompt]
    sampling: frames.Sampling
    choices: int = 1
    tool_use: frames.ToolUse | None = None
    echo: bool = False
    is_scored_only: bool = False
    """Nothing is generated: with `echo`, each choice is its prompt."""
    images: tuple[ImageSource, ...] = ()
    """Of the messages, in their order: what `{"type": "image"}` stands for there."""
    priority: int = 0
    keep_alive_seconds: float | None = None
    """How long the model stays after its last use; infinity: for good; None: as before."""
    require_loaded: bool = False
    warnings: list[str] = field(default_factory=list)
    id_prefix: str = "cmpl"


@dataclass(frozen=True, slots=True)
class Started:
    """Every prompt is accepted: from here on nothing is the caller's fault."""

    id: str
    model: str
    create_time: float
    prompt_token_count: int
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class Prefilling:
    """A long prompt is on its way through the model."""

    prompt_index: int
    done_token_count: int
    total_token_count: int


@dataclass(frozen=True, slots=True)
class Finished:
    """One choice is complete."""

    index: int
    reason: str
    stop_match: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The last event: all choices are complete. Times in seconds."""

    prompt_token_count: int
    completion_token_count: int
    reasoning_token_count: int
    queue_seconds: float
    load_seconds: float
    prefill_seconds: float
    first_token_seconds: float
    decode_seconds: float
    total_seconds: float
    choice_count: int
    warnings: list[str] = field(default_factory=list)
    """Besides those of `Started`."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens over decode time, which begins at each choice's first token; 0 when none has a second one."""
        later_count = self.completion_token_count - self.choice_count
        return later_count / self.decode_seconds if later_count > 0 and self.decode_seconds > 0 else 0.0


Event = Started | Prefilling | Delta | Finished | Ended


@dataclass(frozen=True, slots=True)
class TokenCount:
    """What a prompt would take of a model's context."""

    model: str
    token_count: int
    context_length: int
    warnings: list[str]


class Generator:
    """Runs generations on resident models."""

    def __init__(
        self,
        find_model: Callable[[str], InstalledModel],
        residency: Residency,
        metrics: Metrics,
        images: ImageLoader,
        inference_seconds: float,
    ) -> None:
        """`find_model` raises for a name that is none; `inference_seconds` caps each call, its load included."""
        self._images = images
        self._find_model = find_model
        self._residency = residency
        self._metrics = metrics
        self._inference_seconds = inference_seconds

    async def run(
        self, request: GenerationRequest, max_join_tokens: int = 32, timeout_seconds: float | None = None
    ) -> AsyncIterator[list[Event]]:
        """Yield batches of events as they come, the last of them `Ended`.

        Tokens that wait together are joined, up to `max_join_tokens` per delta. `timeout_seconds` shortens the
        server's own limit, for callers whose deadline gRPC does not know. Closing the iterator gives the
        rows back at the next step. Raises what loading, admission or the engine raise.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        limit = self._inference_seconds
        if timeout_seconds is not None:
            limit = max(0.0, min(limit, timeout_seconds))
        deadline = started + limit
        model = self._find_model(request.model)
        if model.type not in _GENERATING_TYPES:
            raise ModelTypeMismatchError(
                f"Model '{model.name}' is a model for {model.type} and generates no text", field="model"
            )
        _refuse_tools(model, request.prompts)
        async with AsyncExitStack() as stack:
            waiting = stack.enter_context(ExitStack())
            try:
                async with asyncio.timeout_at(deadline):
                    if request.images:
                        # Before they are fetched and decoded, which a lease would outlast: fetching takes up to 10
                        # seconds, in which a model that is held and idle could not make room for another.
                        self._residency.refuse_early(
                            model,
                            len(request.prompts) * request.choices,
                            require_loaded=request.require_loaded,
                        )
                    prompts = [
                        await self._images.resolve(prompt, request.images, model, request.warnings, waiting)
                        for prompt in request.prompts
                    ]
                    lease: Lease = await stack.enter_async_context(
                        self._residency.use(
                            model,
                            require_loaded=request.require_loaded,
                            priority=request.priority,
                            keep_alive_seconds=request.keep_alive_seconds,
                        )
                    )
            except TimeoutError:
                raise _overdue(limit) from None
            call = stack.enter_context(
                lease.worker.submit(
                    prompts,
                    request.sampling,
                    request.choices,
                    request.priority,
                    tool_use=request.tool_use,
                    echo=request.echo,
                    is_scored_only=request.is_scored_only,
                )
            )
            unaccepted = len(prompts)
            del prompts  # Their images are the worker's now.
            alarm = loop.call_at(deadline, lambda: call.fail(_overdue(limit)))
            stack.callback(alarm.cancel)
            observed = stack.enter_context(self._metrics.request(model.name))

            if loaded := lease.resident.loaded:
                request.warnings.extend(loaded.warnings)
            index_of = {key: index for index, key in enumerate(call.keys)}
            prompt_tokens = completion_tokens = reasoning_tokens = 0
            warnings: list[str] = []
            held: list[
                Event
            ] = []  # What came before every prompt was accepted: `Started` is the first event.
            open_rows = len(call.keys)
            first_token = 0.0
            spent = frames.Spent(0.0, 0.0, 0.0)
            while open_rows:
                out, held = held, []
                deltas: dict[int, Delta] = {}
                for event in await call.take():
                    if type(event) is frames.Piece:
                        index = index_of[event.key]
                        completion_tokens += event.token_count
                        if first_token == 0.0:
                            first_token = loop.time() - started
                            observed.first_token(first_token)
                        if extra := event.extra:
                            reasoning_tokens += extra.reasoning_token_count
                            warnings += [each for each in extra.warnings if each not in warnings]
                        for delta in deltas_of(index, event):
                            last = deltas.get(index)
                            if (
                                last is None
                                or last.token_count + delta.token_count > max_join_tokens
                                or not last.join(delta)
                            ):
                                deltas[index] = delta
                                out.append(delta)
                        if event.finish:
                            open_rows -= 1
                            assert event.spent is not None
                            spent = _longest(spent, event.spent)
                            out.append(Finished(index, event.finish, event.stop_match))
                            observed.finished(event.finish, event.spent)
                    elif type(event) is frames.Accepted:
                        prompt_tokens += event.prompt_token_count
                        unaccepted -= 1
                        if unaccepted == 0:
                            waiting.close()
                            observed.accepted(prompt_tokens)
                            out.insert(
                                0,
                                Started(
                                    id=f"{request.id_prefix}-{uuid.uuid4().hex}",
                                    model=model.name,
                                    create_time=time.time(),
                                    prompt_token_count=prompt_tokens,
                                    warnings=request.warnings,
                                ),
                            )
                    elif type(event) is frames.Prefilled:
                        out.append(
                            Prefilling(
                                index_of[event.keys[0]] // request.choices,
                                event.done_token_count,
                                event.total_token_count,
                            )
                        )
                if open_rows == 0:
                    total = loop.time() - started
                    observed.ended(completion_tokens, total, spent.decode)
                    out.append(
                        Ended(
                            prompt_token_count=prompt_tokens,
                            completion_token_count=completion_tokens,
                            reasoning_token_count=reasoning_tokens,
                            queue_seconds=spent.queue,
                            load_seconds=lease.load_seconds,
                            prefill_seconds=spent.prefill,
                            first_token_seconds=first_token,
                            decode_seconds=spent.decode,
                            total_seconds=total,
                            choice_count=len(call.keys),
                            warnings=warnings,
                        )
                    )
                if unaccepted:
                    held = out
                elif out:
                    yield out

    async def count_tokens(
        self, model_name: str, prompt: frames.Prompt, images: tuple[ImageSource, ...] = ()
    ) -> TokenCount:
        """How many tokens a prompt has. A model that is not loaded is loaded tokenizer-only."""
        model = self._find_model(model_name)
        if prompt.messages and model.type not in _GENERATING_TYPES:
            raise ModelTypeMismatchError(
                f"Model '{model.name}' is a model for {model.type} and takes no chat: count a prompt",
                field="model",
            )
        _refuse_tools(model, [prompt])
        warnings: list[str] = []
        try:
            async with asyncio.timeout(self._inference_seconds):
                with ExitStack() as waiting:
                    prompt = await self._images.resolve(prompt, images, model, warnings, waiting)
                    async with self._residency.use_tokenizer(model) as (worker, context_length):
                        with worker.count(prompt) as call:
                            (event,) = await call.take()
                            assert isinstance(event, frames.Counted)
                            warnings += event.warnings
                            return TokenCount(model.name, event.token_count, context_length, warnings)
        except TimeoutError:
            raise _overdue(self._inference_seconds) from None


def _refuse_tools(model: InstalledModel, prompts: Sequence[frames.Prompt]) -> None:
    """Raise ModelTypeMismatchError where prompts have tools that the model's chat template would leave out."""
    if any(prompt.tools for prompt in prompts) and not json.loads(model.metadata).get("has_tools"):
        raise ModelTypeMismatchError(
            f"Model '{model.name}' takes no tools: its chat template has none", field="tools"
        )


def _overdue(seconds: float) -> DeadlineError:
    return DeadlineError(f"the request was not done after {seconds:g} seconds, its limit")


def _longest(a: frames.Spent, b: frames.Spent) -> frames.Spent:
    """Rows run side by side: the time of a request is that of its slowest row."""
    return frames.Spent(max(a.queue, b.queue), max(a.prefill, b.prefill), max(a.decode, b.decode))
