"""The inside of a worker process: its threads and what they hand to each other.

The main one owns MLX (loads, prefills, decodes); a reader turns frames into calls; a helper renders chat templates and
tokenizes; two more compile grammars, which may take seconds. The process ends when its socket closes, whatever it is
doing.
"""

import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import mlx.core as mx
import msgspec

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.backends.embedding import EncoderModel, load_encoder, load_encoder_tokens
from mlxgui_grpc.engine.backends.generating import LOADERS, load_tokenizer
from mlxgui_grpc.engine.backends.text import TextModel, Tokens
from mlxgui_grpc.engine.constraints import Grammars
from mlxgui_grpc.engine.death import EXIT_MEMORY, EXIT_TEMPLATE, is_memory_error
from mlxgui_grpc.engine.detokenizer import Detokenizer, StopMatcher
from mlxgui_grpc.engine.embedding_queue import EmbeddingQueue, Job
from mlxgui_grpc.engine.embedding_tokens import EncoderTokenizer
from mlxgui_grpc.engine.guide import Guide
from mlxgui_grpc.engine.logprobs import TokenTexts
from mlxgui_grpc.engine.outbox import Outbox
from mlxgui_grpc.engine.prompts import PromptTokenizer
from mlxgui_grpc.engine.reply import make_reader
from mlxgui_grpc.engine.row import EngineRow
from mlxgui_grpc.engine.row_guides import GuideMaker
from mlxgui_grpc.engine.sampling import RowSampling, SamplingDefaults, key_word
from mlxgui_grpc.engine.scheduler import Scheduler
from mlxgui_grpc.engine.warm_up import use_device, warm_up, warm_up_model
from mlxgui_grpc.errors import (
    ContextLengthExceededError,
    InvalidRequestError,
    ModelServerError,
    QueueFullError,
)

if TYPE_CHECKING:
    from mlxgui_grpc.engine.vision_prompts import RowImages, VisionPrompts

DEFAULT_MAX_TOKENS = 8192
"""Most tokens of a reply whose request names no limit (the document's default)."""
GRAMMAR_THREADS = 2
"""One slow grammar does not hold up the others; ten do not take the MLX thread's time."""
MAX_GRAMMARS = 64
"""Requests whose grammars are compiled or wait for that."""
MAX_PROMPT_LOGPROBS = 1 << 20
"""Of a request: tokens of its prompt x choices x (1 + top_logprobs). About 30 MB; each takes ten times that as an
object."""
PROMPT_TAIL_TOKENS = 8
"""Tokens of a raw prompt that the detokenizer sees, to know what the first new token continues."""


_Request = frames.Submit | frames.Count | frames.Embed | frames.Rerank


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What the helper thread needs of a loaded model."""

    tokens: Tokens
    prompts: PromptTokenizer
    defaults: SamplingDefaults
    context_length: int
    is_limited: bool
    """The context is shorter than what the model was made for."""
    """The model's, or the limit that it was loaded with."""
    guides: GuideMaker | None = None
    """Of a model that generates."""
    encoder: EncoderTokenizer | None = None
    """Of an embedding model or a reranker."""
    vision: "VisionPrompts | None" = None
    """Of a model whose prompts may have images."""

    def tokenize(self, prompt: frames.Prompt) -> "tuple[list[int], RowImages | None]":
        """The token ids of a prompt, and its pictures if it has any."""
        if self.encoder is not None and not prompt.messages:
            return self.encoder.tokenize(prompt), None
        if not prompt.images:
            return self.prompts.tokenize(prompt), None
        if self.vision is None:
            from mlxgui_grpc.images.text_only import without_images  # Rare: mlx-vlm could not load the model.

            return self.prompts.tokenize(without_images(prompt)), None
        return self.vision.tokenize(self.prompts.render(prompt), prompt.images)

    def warnings(self, prompt: frames.Prompt) -> list[str]:
        """What of the prompt is not heeded, as sentences."""
        warnings = self.prompts.warnings(prompt)
        if prompt.images and self.vision is None:
            warnings.append("images were left out: the model is loaded as a text model")
        return warnings


class Worker:
    """One process's state. `run` is the MLX thread; the other threads only call into queues."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._outbox = Outbox(connection)
        self._loads: queue.SimpleQueue[frames.Load] = queue.SimpleQueue()
        self._prompts: queue.SimpleQueue[tuple[float, _Request]] = queue.SimpleQueue()
        """Prompts to tokenize, each with the time at which it came."""
        self._tokenizing: tuple[int, ...] = ()
        """Keys of the prompt at hand."""
        self._compilers = ThreadPoolExecutor(GRAMMAR_THREADS, thread_name_prefix="grammar")
        self._scheduler: Scheduler | EmbeddingQueue | None = None
        self._is_batchable = False
        self._compiling_count = 0
        """Guarded by `_cancel_lock`."""
        self._cancelled: set[int] = set()
        """Keys cancelled before the helper thread came to them; guarded by `_cancel_lock`."""
        self._untokenized: set[int] = set()
        self._cancel_lock = threading.Lock()

    def run(self) -> None:
        """Get ready, load once told to, then serve until the socket closes."""
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        self._outbox.send(warm_up())
        load = self._loads.get()
        started = time.monotonic()
        try:
            loaded, model = self._load(load)
        except Exception as error:  # The loaders raise whatever the files make them raise.
            if is_memory_error(error):
                self._end_of_memory((), f"Memory ran out while the model was loaded: {error}")
            if isinstance(error, ModelServerError):
                self._outbox.send(_failure((), error, "loading"))
            else:
                self._outbox.send(frames.Failed((), "MODEL_LOAD_FAILED", f"{type(error).__name__}: {error}"))
        else:
            threading.Thread(target=self._tokenize, args=(loaded,), name="tokenizer", daemon=True).start()
            self._outbox.send(
                frames.Loaded(
                    context_length=loaded.context_length,
                    batchable=model.batchable if model else False,
                    weight_bytes=model.weight_bytes if model else 0,
                    load_seconds=time.monotonic() - started,
                    kv_bytes_per_token=model.kv_bytes_per_token if model else 0,
                    active_bytes=mx.get_active_memory(),
                    notes=model.notes if isinstance(model, TextModel) else (),
                    warnings=model.warnings if isinstance(model, TextModel) else (),
                    tool_format=model.tokens.reply_format.tool_format if isinstance(model, TextModel) else "",
                    can_think=isinstance(model, TextModel) and model.tokens.reply_format.can_think,
                )
            )
            self._serve()
        self._outbox.flush()

    def _load(self, load: frames.Load) -> tuple[_Loaded, TextModel | EncoderModel | None]:
        use_device(use_gpu=load.use_gpu)
        mx.reset_peak_memory()  # The warm-up's is not the model's.
        if load.kind in ("embedding", "reranker"):
            return self._load_encoder(load)
        view = Path(load.view)
        model = None if load.tokenizer_only else LOADERS[load.kind](view)
        tokens, vision = (model.tokens, model.vision) if model else load_tokenizer(view, load.kind)
        context_length = min(tokens.context_length, load.context_limit or tokens.context_length)
        if model:
            self._outbox.send(frames.Warming())
            if model.batchable:
                warm_up_model(model.model)
            self._scheduler = Scheduler(
                model.model,
                end_tokens=tokens.end_tokens,
                max_rows=load.max_rows if model.batchable else 1,
                send=self._outbox.send,
                kv_cost=model.kv_cost,
                kv_budget_bytes=load.kv_budget_bytes,
                token_texts=TokenTexts(tokens.backend),
                report=self._report_usage,
            )
            self._is_batchable = model.batchable
        prompts = PromptTokenizer(
            tokens.tokenizer, tokens.render, tokens.vocabulary_size, context_length, self._end_runaway
        )
        defaults = model.defaults if model else SamplingDefaults()
        is_limited = context_length < tokens.context_length
        grammars = Grammars(tokens.backend, tokens.vocabulary_size, tokens.end_tokens)
        guides = GuideMaker(grammars, tokens.reply_format, tokens.end_tokens)
        return _Loaded(tokens, prompts, defaults, context_length, is_limited, guides, vision=vision), model

    def _load_encoder(self, load: frames.Load) -> tuple[_Loaded, EncoderModel | None]:
        view, is_reranker = Path(load.view), load.kind == "reranker"
        if load.tokenizer_only:
            model, (tokens, end_token) = None, load_encoder_tokens(view, is_reranker=is_reranker)
        else:
            model = load_encoder(view, is_reranker=is_reranker)
            tokens, end_token = model.tokens, model.end_token
        context_length = min(tokens.context_length, load.context_limit or tokens.context_length)
        if model:
            self._outbox.send(frames.Warming())
            mx.eval(model.run(*(mx.array([[value]]) for value in (0, 1, 0))))
            self._scheduler = EmbeddingQueue(model, send=self._outbox.send, report=self._report_usage)
        prompts = PromptTokenizer(
            tokens.tokenizer, None, tokens.vocabulary_size, context_length, self._end_runaway
        )
        is_limited = context_length < tokens.context_length
        encoder = EncoderTokenizer(tokens, context_length, end_token)
        return _Loaded(
            tokens, prompts, SamplingDefaults(), context_length, is_limited, encoder=encoder
        ), model

    def _serve(self) -> None:
        if self._scheduler is None:
            threading.Event().wait()  # A tokenizer-only worker: the helper thread does all.
            return
        turns_before = -1
        while True:
            try:
                self._scheduler.run()
            except Exception as error:
                print(f"engine step failed: {error!r}", file=sys.stderr, flush=True)
                if is_memory_error(error):
                    self._end_of_memory(self._scheduler.keys(), f"memory ran out in the engine: {error}")
                self._scheduler.fail_all("GENERATION_FAILED", f"the engine failed: {error}")
                # The batch that raised is failed and forgotten; when nothing went well since the last failure, it
                # is not the batch: the process ends, and the next request gets a new one.
                if self._scheduler.turn_count == turns_before:
                    raise
                turns_before = self._scheduler.turn_count

    # The reader thread.

    def _read(self) -> None:
        status = 0  # The control process is gone, or wants this one gone.
        try:
            buffer = frames.FrameBuffer()
            while data := self._connection.recv(1 << 18):
                for body in buffer.feed(data):
                    self._dispatch(frames.decode_command(body))
        except ConnectionResetError:
            pass  # How a socket ends whose other side was killed with frames of ours unread.
        except Exception as error:
            status = EXIT_MEMORY if is_memory_error(error) else 1
            traceback.print_exc()
        finally:
            os._exit(status)  # Deaf, this one is of no use.

    def _dispatch(self, command: frames.Command) -> None:
        if isinstance(command, frames.Load):
            self._loads.put(command)
        elif isinstance(command, frames.Submit | frames.Count | frames.Embed | frames.Rerank):
            if not isinstance(command, frames.Count):
                with self._cancel_lock:
                    self._untokenized.update(_keys(command))
            self._prompts.put((time.monotonic(), command))
        elif (scheduler := self._scheduler) is None:
            return
        elif isinstance(command, frames.Cancel):
            keys = frozenset(command.keys)
            with self._cancel_lock:
                self._cancelled |= keys & self._untokenized
            scheduler.call(lambda: scheduler.cancel(keys))
        elif isinstance(command, frames.Pause):
            key = command.key
            scheduler.call(lambda: scheduler.pause(key))
        elif isinstance(command, frames.Resume):
            key = command.key
            scheduler.call(lambda: scheduler.resume(key))
        elif isinstance(command, frames.Limits):
            max_rows = command.max_rows if self._is_batchable else 1
            budget = command.kv_budget_bytes
            scheduler.call(lambda: scheduler.limit(max_rows, budget))
        elif isinstance(command, frames.AskUsage):
            scheduler.call(lambda: self._report_usage(is_answer=True))

    # The helper thread.

    def _tokenize(self, loaded: _Loaded) -> None:
        while True:
            received, command = self._prompts.get()
            keys = _keys(command)
            self._tokenizing = keys
            self._attempt(keys, partial(self._answer, loaded, command, received), "tokenizing")
            del command  # Not kept while the next one is awaited.

    def _answer(self, loaded: _Loaded, command: _Request, received: float) -> bool:
        """Deal with a request; False when another thread will finish that."""
        if isinstance(command, frames.Submit):
            return self._submit(loaded, command, received)
        if isinstance(command, frames.Count):
            prompt, _ = loaded.tokenize(command.prompt)
            warnings = tuple(loaded.warnings(command.prompt))
            self._outbox.send(frames.Counted(command.key, len(prompt), warnings))
        else:
            self._submit_job(loaded, command, received)
        return True

    def _attempt(self, keys: tuple[int, ...], work: Callable[[], bool], what: str) -> None:
        """Do `work` for a request and answer what it raises; it returns False when the request is not done with."""
        is_done = True
        try:
            is_done = work()
        except BaseException as error:  # A panic of the tokenizer's or llguidance's is no Exception.
            if is_memory_error(error):
                self._end_of_memory(keys, f"memory ran out in {what}: {error}")
            self._outbox.send(_failure(keys, error, what))
        finally:
            if is_done:
                self._forget(keys)

    def _submit(self, loaded: _Loaded, submit: frames.Submit, received: float) -> bool:
        scheduler = self._scheduler
        assert isinstance(scheduler, Scheduler), "only a worker that generates is sent a Submit"
        if self._is_cancelled(submit.keys):
            return True
        warnings = loaded.warnings(submit.prompt)
        prompt, images = loaded.tokenize(submit.prompt)
        submit = _without_images(submit)  # The row has what the model takes of them.
        room = loaded.context_length - len(prompt)
        if room < (0 if submit.is_scored_only else 1):
            raise ContextLengthExceededError(
                f"the prompt has {len(prompt)} tokens and "
                + ("max_context_length lets it have " if loaded.is_limited else "the model's context holds ")
                + f"{loaded.context_length}; shorten it",
                field="prompt" if submit.prompt.text is not None or submit.prompt.token_ids else "messages",
            )
        sampling = submit.sampling
        vocabulary_size = loaded.tokens.vocabulary_size
        if images is None and (largest := max(prompt)) >= vocabulary_size:
            # MLX checks no index: it would read, and with a repetition penalty write, beyond its arrays.
            raise InvalidRequestError(
                f"the prompt has the token {largest} of the tokenizer's, and the model knows {vocabulary_size}; leave "
                "its text out",
                field="prompt" if submit.prompt.text is not None or submit.prompt.token_ids else "messages",
            )
        for token in sampling.logit_bias:
            if not 0 <= token < vocabulary_size:
                raise InvalidRequestError(
                    f"logit_bias: token {token} is outside the vocabulary of {vocabulary_size} tokens",
                    field="sampling.logit_bias",
                )
        refuse_many_logprobs(submit, len(prompt))
        is_chat = bool(submit.prompt.messages)
        tail = prompt[-PROMPT_TAIL_TOKENS:] if not is_chat else None
        backend, reply_format = loaded.tokens.backend, loaded.tokens.reply_format
        opening = reply_format.opening(backend, prompt)
        echo_text = ""
        if submit.echo:
            given = submit.prompt.text
            echo_text = given if given is not None else backend.decode(prompt, skip_special_tokens=False)

        def make_rows(
            guides: list[Guide | None],
        ) -> list[EngineRow]:  # On the MLX thread: a row's sampler may hold arrays.
            return [
                EngineRow(
                    key=key,
                    prompt=prompt,
                    sampling=RowSampling(
                        sampling,
                        loaded.defaults,
                        key_word(sampling.seed, index),
                        prompt,
                        vocabulary_size,
                        guides[index],
                    ),
                    detokenizer=Detokenizer(backend, tail, skip_special_tokens=not is_chat),
                    stop=StopMatcher(sampling.stop),
                    reader=make_reader(reply_format, opening, submit.prompt, sampling, submit.tool_use),
                    echo_text=echo_text,
                    warnings=warnings,
                    wants_prompt_logprobs=submit.echo and sampling.top_logprobs is not None,
                    token_limit=0
                    if submit.is_scored_only
                    else min(sampling.max_tokens or DEFAULT_MAX_TOKENS, room),
                    priority=submit.priority,
                    images=images,
                    submit_time=received,
                )
                for index, key in enumerate(submit.keys)
            ]

        def begin(guides: list[Guide | None]) -> None:
            try:
                rows = make_rows(guides)
            except Exception as error:
                if is_memory_error(error):
                    raise
                self._outbox.send(_failure(submit.keys, error, "sampling"))
            else:
                scheduler.submit(rows)

        def accept(maker: GuideMaker) -> bool:
            guides = maker.make(submit, opening)
            self._outbox.send(frames.Accepted(submit.keys, len(prompt)))
            with self._cancel_lock:  # Held over `call`: a cancel that is not seen here comes after it.
                self._untokenized.difference_update(submit.keys)
                if not self._cancelled.issuperset(submit.keys):
                    scheduler.call(lambda: begin(guides))
            return True

        maker = loaded.guides
        assert maker is not None, "a model that generates has one"
        warnings += maker.warnings(submit)
        if not maker.is_slow(submit):
            return accept(maker)
        self._compile(submit.keys, partial(accept, maker))
        return False

    def _is_cancelled(self, keys: tuple[int, ...]) -> bool:
        with self._cancel_lock:
            return self._cancelled.issuperset(keys)

    def _compile(self, keys: tuple[int, ...], work: Callable[[], bool]) -> None:
        """Do `work` on a thread for grammars; raises QueueFullError when too many wait for that."""
        with self._cancel_lock:
            if self._compiling_count >= MAX_GRAMMARS:
                raise QueueFullError(
                    f"the grammars of {MAX_GRAMMARS} requests to this model wait to be compiled; try again later"
                )
            self._compiling_count += 1

        def unless_cancelled() -> bool:
            return self._is_cancelled(keys) or work()

        def compile_one() -> None:
            try:
                self._attempt(keys, unless_cancelled, "compiling the grammar")
            finally:
                with self._cancel_lock:
                    self._compiling_count -= 1

        self._compilers.submit(compile_one)

    def _submit_job(self, loaded: _Loaded, command: frames.Embed | frames.Rerank, received: float) -> None:
        jobs, tokenizer, key = self._scheduler, loaded.encoder, command.key
        assert isinstance(jobs, EmbeddingQueue) and tokenizer is not None, "only an encoder is sent a job"
        if self._is_cancelled((key,)):
            return
        jobs.refuse_when_full()
        if isinstance(command, frames.Embed):
            sequences = tokenizer.prompts(command.prompts)
            job = Job(key, "embed", sequences, command.dimensions, command.priority, received)
        else:
            sequences = tokenizer.pairs(command.query, command.documents)
            job = Job(key, "rerank", sequences, priority=command.priority, submit_time=received)
        jobs.hold(job)
        self._outbox.send(frames.Accepted((key,), job.token_count))
        with self._cancel_lock:  # As in `_submit`.
            self._untokenized.discard(key)
            if key not in self._cancelled:
                jobs.call(lambda: jobs.submit(job))

    def _forget(self, keys: tuple[int, ...]) -> None:
        with self._cancel_lock:
            self._untokenized.difference_update(keys)
            self._cancelled.difference_update(keys)

    def _end_runaway(self) -> None:
        """A template cannot be interrupted: report it and end the process; the checkpoint is to blame."""
        self._outbox.send(
            frames.Failed(
                self._tokenizing, "MODEL_UNSAFE", "the chat template runs without end; the worker was stopped"
            )
        )
        self._outbox.flush()
        os._exit(EXIT_TEMPLATE)

    def _end_of_memory(self, keys: tuple[int, ...], message: str) -> NoReturn:
        """Tell those at hand and end the process: it may have lost anything, and only its end frees all it holds.

        Whoever else waits is told by the control process, which knows this exit status.
        """
        self._outbox.send(frames.Failed(keys, "OUT_OF_MEMORY", message))
        self._outbox.flush()
        os._exit(EXIT_MEMORY)

    # On the MLX thread.

    def _report_usage(self, is_answer: bool = False) -> None:
        scheduler = self._scheduler
        assert scheduler is not None
        self._outbox.send(
            frames.Usage(
                active_bytes=mx.get_active_memory(),
                cache_bytes=mx.get_cache_memory(),
                peak_bytes=mx.get_peak_memory(),
                kv_bytes=scheduler.kv_bytes,
                running_count=scheduler.running_count,
                waiting_count=scheduler.waiting_count,
                preempted_count=scheduler.preempted_count,
                work_count=scheduler.work_count,
                is_answer=is_answer,
            )
        )


def _keys(command: _Request) -> tuple[int, ...]:
    return command.keys if isinstance(command, frames.Submit) else (command.key,)


def refuse_many_logprobs(submit: frames.Submit, prompt_length: int) -> None:
    """Raise InvalidRequestError when more log-probabilities of the prompt are wanted than are made."""
    top = submit.sampling.top_logprobs
    if not submit.echo or top is None:
        return
    count = prompt_length * len(submit.keys) * (1 + top)
    if count > MAX_PROMPT_LOGPROBS:
        raise InvalidRequestError(
            f"top_logprobs: {prompt_length} tokens of the prompt x {len(submit.keys)} choices x (1 + {top}) are "
            f"{count} log-probabilities, and at most {MAX_PROMPT_LOGPROBS} are made; ask for fewer",
            field="sampling.top_logprobs",
        )


def _without_images(submit: frames.Submit) -> frames.Submit:
    return msgspec.structs.replace(submit, prompt=msgspec.structs.replace(submit.prompt, images=()))


def _failure(keys: tuple[int, ...], error: BaseException, what: str) -> frames.Failed:
    if isinstance(error, ModelServerError):
        return frames.Failed(keys, error.reason, error.message, error.field)
    if isinstance(error, UnicodeError):
        return frames.Failed(
            keys, "INVALID_PARAMETER", f"the prompt is not valid Unicode: {error}", "messages"
        )
    return frames.Failed(keys, "GENERATION_FAILED", f"{what} failed: {error}")
