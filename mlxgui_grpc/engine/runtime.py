"""The inside of a worker process: its three threads and what they hand to each other.

The main one owns MLX (loads, prefills, decodes); a reader turns frames into calls; a helper renders chat templates and
tokenizes. The process ends when its socket closes, whatever it is doing.
"""

import importlib.metadata
import json
import os
import queue
import socket
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.backends.text import TextModel, Tokens, load_text_model, load_tokens
from mlxgui_grpc.engine.batch import DecodeBatch, Prefill
from mlxgui_grpc.engine.detokenizer import Detokenizer, StopMatcher
from mlxgui_grpc.engine.outbox import Outbox
from mlxgui_grpc.engine.prompts import PromptTokenizer
from mlxgui_grpc.engine.sampling import RowSampling, SamplingDefaults, key_word
from mlxgui_grpc.engine.scheduler import EngineRow, Scheduler
from mlxgui_grpc.errors import ContextLengthExceededError, InvalidRequestError, ModelServerError

DEFAULT_MAX_TOKENS = 8192
"""Most tokens of a reply whose request names no limit (the document's default)."""
PROMPT_TAIL_TOKENS = 8
"""Tokens of a raw prompt that the detokenizer sees, to know what the first new token continues."""
EXIT_TEMPLATE = 70


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What the helper thread needs of a loaded model."""

    tokens: Tokens
    prompts: PromptTokenizer
    defaults: SamplingDefaults


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
        self._cancelled: set[int] = set()
        """Keys cancelled before the helper thread came to them; guarded by `_cancel_lock`."""
        self._untokenized: set[int] = set()
        self._cancel_lock = threading.Lock()

    def run(self) -> None:
        """Get ready, load once told to, then serve until the socket closes."""
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        self._outbox.send(_warm_up())
        load = self._loads.get()
        started = time.monotonic()
        try:
            loaded, model = self._load(load)
        except MemoryError as error:
            self._outbox.send(frames.Failed((), "OUT_OF_MEMORY", f"out of memory while loading: {error}"))
        except Exception as error:  # The loaders raise whatever the files make them raise.
            self._outbox.send(frames.Failed((), "MODEL_LOAD_FAILED", f"{type(error).__name__}: {error}"))
        else:
            threading.Thread(target=self._tokenize, args=(loaded,), name="tokenizer", daemon=True).start()
            self._outbox.send(
                frames.Loaded(
                    context_length=loaded.tokens.context_length,
                    batchable=model.batchable if model else False,
                    weight_bytes=model.weight_bytes if model else 0,
                    load_seconds=time.monotonic() - started,
                )
            )
            self._serve()
        self._outbox.flush()

    def _load(self, load: frames.Load) -> tuple[_Loaded, TextModel | None]:
        view = Path(load.view)
        model = None if load.tokenizer_only else load_text_model(view)
        tokens = model.tokens if model else load_tokens(view)
        if model:
            if model.batchable:
                warm_up_model(model.model)
            self._scheduler = Scheduler(
                model.model,
                end_tokens=tokens.end_tokens,
                max_rows=load.max_rows if model.batchable else 1,
                send=self._outbox.send,
            )
        prompts = PromptTokenizer(
            tokens.tokenizer, tokens.render, tokens.vocabulary_size, tokens.context_length, self._end_runaway
        )
        return _Loaded(tokens, prompts, model.defaults if model else SamplingDefaults()), model

    def _serve(self) -> None:
        if self._scheduler is None:
            threading.Event().wait()  # A tokenizer-only worker: the helper thread does all.
            return
        turns_before = -1
        while True:
            try:
                self._scheduler.run()
            except Exception as error:
                reason = "OUT_OF_MEMORY" if is_memory_error(error) else "GENERATION_FAILED"
                print(f"engine step failed: {error!r}", file=sys.stderr, flush=True)
                self._scheduler.fail_all(reason, f"the engine failed: {error}")
                # The batch that raised is failed and forgotten; when nothing went well since the last failure, it
                # is not the batch: the process ends, and the next request gets a new one.
                if self._scheduler.turn_count == turns_before:
                    raise
                turns_before = self._scheduler.turn_count

    # The reader thread.

    def _read(self) -> None:
        try:
            buffer = frames.FrameBuffer()
            while data := self._connection.recv(1 << 18):
                for body in buffer.feed(data):
                    self._dispatch(frames.decode_command(body))
        except ConnectionResetError:
            pass  # How a socket ends whose other side was killed with frames of ours unread.
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(0)  # The control process is gone, or wants this one gone; deaf, this one is of no use.

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
        elif isinstance(command, frames.AskUsage):
            scheduler.call(self._report_usage)

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
        room = loaded.tokens.context_length - len(prompt)
        if room < 1:
            raise ContextLengthExceededError(
                f"the prompt has {len(prompt)} tokens and the model's context holds "
                f"{loaded.tokens.context_length}; shorten it",
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

    # On the MLX thread.

    def _report_usage(self) -> None:
        scheduler = self._scheduler
        assert scheduler is not None
        self._outbox.send(
            frames.Usage(
                active_bytes=mx.get_active_memory(),
                kv_bytes=scheduler.kv_bytes,
                running_count=scheduler.running_count,
                waiting_count=scheduler.waiting_count,
            )
        )


def is_memory_error(error: BaseException) -> bool:
    """The documented signs of memory running out, by type and by words."""
    words = ("out of memory", "memory allocation", "insufficient memory", "unable to allocate")
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(word in text for word in words)


def _failure(keys: tuple[int, ...], error: Exception) -> frames.Failed:
    if isinstance(error, ModelServerError):
        return frames.Failed(keys, error.reason, error.message, error.field)
    if isinstance(error, UnicodeError):
        return frames.Failed(
            keys, "INVALID_PARAMETER", f"the prompt is not valid Unicode: {error}", "messages"
        )
    return frames.Failed(keys, "GENERATION_FAILED", f"tokenizing failed: {error}")


def _warm_up() -> frames.Ready:
    """Pay now for what the first load would pay: lazy imports and the first operation on the device.

    Loading any tokenizer costs 2 CPU seconds of imports in transformers, once per process.
    """
    mx.eval(mx.ones((2, 2)) @ mx.ones((2, 2)))
    _run_tiny_model()
    from mlx_lm.tokenizer_utils import load as load_tokenizer_wrapper
    from tokenizers import Tokenizer, models

    with tempfile.TemporaryDirectory() as folder:
        Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(f"{folder}/tokenizer.json")
        Path(folder, "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}"})
        )
        Path(folder, "config.json").write_text('{"model_type": "llama"}')
        tokenizer: Any = load_tokenizer_wrapper(Path(folder))
        tokenizer._tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    packages = ("mlx", "mlx-lm", "transformers", "tokenizers")
    return frames.Ready(
        device=str(mx.default_device()),
        versions={name: importlib.metadata.version(name) for name in packages},
    )


def _run_tiny_model() -> None:
    """Decode some tokens with random weights: compiles, or fetches from MLX's cache, what every model needs."""
    from mlx_lm.models import llama, qwen3

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64, "max_position_embeddings": 64}
    numbers = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True}
    for module, name in ((llama, "llama"), (qwen3, "qwen3")):
        model: Any = module.Model(module.ModelArgs.from_dict({"model_type": name, **sizes, **numbers}))
        warm_up_model(model)


def warm_up_model(model: Any) -> None:
    """Run a prefill of two rows and a decode step, greedy and sampled, so that no request pays for the first."""
    sampled = frames.Sampling(temperature=1.0, top_p=0.9)
    rows = [RowSampling(sampling, SamplingDefaults(), 0, [0], 2) for sampling in (frames.Sampling(), sampled)]
    prefill = Prefill(model, rows, [[0, 0], [0, 0, 0]])
    prefill.advance(8)
    batch: DecodeBatch[RowSampling] = DecodeBatch(model, lambda row: row)
    batch.join(prefill.rows, prefill.last_tokens, prefill.cache)
    batch.step()
    batch.step()


def leave_wired_limit_alone() -> None:
    """mlx-lm raises the wired limit to the recommended size, which has panicked kernels: never let it."""
    mx.set_wired_limit = lambda limit: 0
