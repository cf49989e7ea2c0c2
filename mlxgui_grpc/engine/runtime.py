"""The inside of a worker process: its three threads and what they hand to each other.

The main one owns MLX (loads, prefills, decodes); a reader turns frames into calls; a helper renders chat templates and
tokenizes. The process ends when its socket closes, whatever it is doing.
"""

import os
import queue
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import mlx.core as mx

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.backends.text import TextModel, Tokens, load_text_model, load_tokens
from mlxgui_grpc.engine.death import EXIT_MEMORY, EXIT_TEMPLATE, speaks_of_memory
from mlxgui_grpc.engine.detokenizer import Detokenizer, StopMatcher
from mlxgui_grpc.engine.outbox import Outbox
from mlxgui_grpc.engine.prompts import PromptTokenizer
from mlxgui_grpc.engine.row import EngineRow
from mlxgui_grpc.engine.sampling import RowSampling, SamplingDefaults, key_word
from mlxgui_grpc.engine.scheduler import Scheduler
from mlxgui_grpc.engine.warm_up import use_device, warm_up, warm_up_model
from mlxgui_grpc.errors import ContextLengthExceededError, InvalidRequestError, ModelServerError

DEFAULT_MAX_TOKENS = 8192
"""Most tokens of a reply whose request names no limit (the document's default)."""
PROMPT_TAIL_TOKENS = 8
"""Tokens of a raw prompt that the detokenizer sees, to know what the first new token continues."""


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


class Worker:
    """One process's state. `run` is the MLX thread; the other threads only call into queues."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._outbox = Outbox(connection)
        self._loads: queue.SimpleQueue[frames.Load] = queue.SimpleQueue()
        self._prompts: queue.SimpleQueue[tuple[float, frames.Submit | frames.Count]] = queue.SimpleQueue()
        """Prompts to tokenize, each with the time at which it came."""
        self._tokenizing: tuple[int, ...] = ()
        """Keys of the prompt at hand."""
        self._scheduler: Scheduler | None = None
        self._is_batchable = False
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
                )
            )
            self._serve()
        self._outbox.flush()

    def _load(self, load: frames.Load) -> tuple[_Loaded, TextModel | None]:
        use_device(use_gpu=load.use_gpu)
        mx.reset_peak_memory()  # The warm-up's is not the model's.
        view = Path(load.view)
        model = None if load.tokenizer_only else load_text_model(view)
        tokens = model.tokens if model else load_tokens(view)
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
                kv_bytes_per_token=model.kv_bytes_per_token,
                kv_budget_bytes=load.kv_budget_bytes,
                report=self._report_usage,
            )
            self._is_batchable = model.batchable
        prompts = PromptTokenizer(
            tokens.tokenizer, tokens.render, tokens.vocabulary_size, context_length, self._end_runaway
        )
        defaults = model.defaults if model else SamplingDefaults()
        return _Loaded(
            tokens, prompts, defaults, context_length, context_length < tokens.context_length
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
        elif isinstance(command, frames.Submit | frames.Count):
            if isinstance(command, frames.Submit):
                with self._cancel_lock:
                    self._untokenized.update(command.keys)
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
            keys = command.keys if isinstance(command, frames.Submit) else (command.key,)
            self._tokenizing = keys
            try:
                if isinstance(command, frames.Count):
                    count = len(loaded.prompts.tokenize(command.prompt))
                    self._outbox.send(frames.Counted(command.key, count))
                else:
                    self._submit(loaded, command, received)
            except Exception as error:
                if is_memory_error(error):
                    self._end_of_memory(keys, f"memory ran out while a prompt was tokenized: {error}")
                self._outbox.send(_failure(keys, error))
            finally:
                if isinstance(command, frames.Submit):
                    self._forget(command.keys)

    def _submit(self, loaded: _Loaded, submit: frames.Submit, received: float) -> None:
        scheduler = self._scheduler
        assert scheduler is not None, "a tokenizer-only worker is never sent a Submit"
        with self._cancel_lock:
            if self._cancelled.issuperset(submit.keys):
                return
        prompt = loaded.prompts.tokenize(submit.prompt)
        room = loaded.context_length - len(prompt)
        if room < 1:
            raise ContextLengthExceededError(
                f"the prompt has {len(prompt)} tokens and "
                + ("max_context_length lets it have " if loaded.is_limited else "the model's context holds ")
                + f"{loaded.context_length}; shorten it",
                field="prompt" if submit.prompt.text is not None or submit.prompt.token_ids else "messages",
            )
        sampling = submit.sampling
        vocabulary_size = loaded.tokens.vocabulary_size
        for token in sampling.logit_bias:
            if token >= vocabulary_size:
                raise InvalidRequestError(
                    f"logit_bias: token {token} is outside the vocabulary of {vocabulary_size} tokens",
                    field="sampling.logit_bias",
                )
        tail = prompt[-PROMPT_TAIL_TOKENS:] if not submit.prompt.messages else None

        def make_rows() -> list[EngineRow]:  # On the MLX thread: a row's sampler may hold arrays.
            return [
                EngineRow(
                    key=key,
                    prompt=prompt,
                    sampling=RowSampling(
                        sampling, loaded.defaults, key_word(sampling.seed, index), prompt, vocabulary_size
                    ),
                    detokenizer=Detokenizer(loaded.tokens.backend, tail),
                    stop=StopMatcher(sampling.stop),
                    token_limit=min(sampling.max_tokens or DEFAULT_MAX_TOKENS, room),
                    priority=submit.priority,
                    submit_time=received,
                )
                for index, key in enumerate(submit.keys)
            ]

        def begin() -> None:
            try:
                rows = make_rows()
            except Exception as error:
                if is_memory_error(error):
                    raise
                self._outbox.send(_failure(submit.keys, error))
            else:
                scheduler.submit(rows)

        self._outbox.send(frames.Accepted(submit.keys, len(prompt)))
        with self._cancel_lock:  # Held over `call`: a cancel that is not seen here comes after it.
            self._untokenized.difference_update(submit.keys)
            if not self._cancelled.issuperset(submit.keys):
                scheduler.call(begin)

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


def is_memory_error(error: BaseException) -> bool:
    """The documented signs of memory running out, by type and by words."""
    return isinstance(error, MemoryError) or speaks_of_memory(str(error))


def _failure(keys: tuple[int, ...], error: Exception) -> frames.Failed:
    if isinstance(error, ModelServerError):
        return frames.Failed(keys, error.reason, error.message, error.field)
    if isinstance(error, UnicodeError):
        return frames.Failed(
            keys, "INVALID_PARAMETER", f"the prompt is not valid Unicode: {error}", "messages"
        )
    return frames.Failed(keys, "GENERATION_FAILED", f"tokenizing failed: {error}")
