"""The control side of a worker process: spawn it, talk frames with it, watch over it, end it."""

import asyncio
import contextlib
import itertools
import logging
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.calls import Call, OpenCalls
from mlxgui_grpc.engine.death import Death, judge, judge_stall, speaks_of_starvation
from mlxgui_grpc.engine.environment import set_idle_class, worker_environment
from mlxgui_grpc.engine.memory_watch import MemoryWatch
from mlxgui_grpc.engine.stall import StallWatch
from mlxgui_grpc.errors import (
    BY_REASON,
    HardwareIncompatibleError,
    ModelLoadFailedError,
    ModelServerError,
    OutOfMemoryError,
    PayloadTooLargeError,
    QueueFullError,
)

log = logging.getLogger(__name__)

HEALTHY_SILENCE_SECONDS = 10.0
"""A worker that says nothing for so long while requests wait is not healthy."""
EXIT_GRACE_SECONDS = 2.0
"""How long a worker may take to end by itself once its socket is closed."""
VERDICT_SECONDS = 1.0
"""How long the calls of a dead worker wait for its exit status, which tells why; it comes with the socket's end."""
LAST_WORDS_BYTES = 4096
MEMORY_SAMPLE_SECONDS = 0.25
"""How often the memory of a worker that works is looked at; 0.2 ms each time."""


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """How workers are started and watched."""

    temporary_directory: Path
    stall_seconds: float = 120.0
    """Nothing done for so long while requests wait for it: the worker is stuck and is killed."""
    max_rows: int = 32
    """Rows that decode at once."""
    max_waiting_rows: int = 128
    """Rows beyond them that may wait; more are refused."""
    ready_seconds: float = 300.0
    use_gpu: bool = True
    """False: on the CPU, whatever the machine has."""
    memory_limit_bytes: Callable[[], int] = lambda: 0
    """What a worker may take before a sudden death is taken for one of memory; 0: not known."""


class WorkerProcess(asyncio.Protocol):
    """One worker. Use on the event loop only. Ends its calls, whatever happens to the process, exactly once."""

    _keys = itertools.count(1)

    def __init__(self, config: WorkerConfig) -> None:
        loop = asyncio.get_running_loop()
        self._config = config
        self._loop = loop
        self._buffer = frames.FrameBuffer()
        self._transport: asyncio.WriteTransport | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._ready: asyncio.Future[frames.Ready] = loop.create_future()
        self._loaded: asyncio.Future[frames.Loaded] = loop.create_future()
        self._usage_waiters: list[asyncio.Future[frames.Usage]] = []
        self._max_rows = config.max_rows
        self._max_waiting_rows = config.max_waiting_rows
        self._kv_budget_bytes = 0
        self._stall = StallWatch(config.stall_seconds, self._end_stalled)
        self._calls = OpenCalls(self._send_if_alive, self._stall)
        self._memory: MemoryWatch | None = None
        self._memory_timer: asyncio.TimerHandle | None = None
        self._life: tuple[tuple[Any, ...], float] = ((), 0.0)  # signs of life while it loads, and since when
        self._last_words = b""
        self._cause: ModelServerError | None = None
        self._ended_by_us = False
        self.label = "standby"
        """What the log and errors call it: the name of its model."""
        self.latest_usage: frames.Usage | None = None
        """What the worker reported last: at most a second old while it works."""
        self.death: Death | None = None
        """Why the process ended, known as soon as it has."""
        self.exited = asyncio.Event()
        """Set when the process is reaped and its memory free."""
        self.on_warming: Callable[[], None] = lambda: None
        """Called when the weights are in memory and the model runs for the first time."""
        self.on_exit: Callable[[], None] = lambda: None
        """Called once, when the process is gone."""
        for future in (self._ready, self._loaded):
            future.add_done_callback(_consume)

    # Life.

    @classmethod
    async def spawn(
        cls, config: WorkerConfig, environment: Mapping[str, str], *, idle: bool = False
    ) -> "WorkerProcess":
        """Start a process; with `idle` it yields the processor to everything else until `load`."""
        self = cls(config)
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # not what lies in the folder the server was started in
                "-m",
                "mlxgui_grpc.engine.worker",
                "--fd",
                str(theirs.fileno()),
                *([] if config.use_gpu else ["--cpu"]),
                pass_fds=(theirs.fileno(),),
                process_group=0,  # Ctrl-C in a terminal is for the control process: it ends its workers in order
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=worker_environment(environment, config.temporary_directory),
            )
        self._memory = MemoryWatch(self._process.pid, config.memory_limit_bytes)
        if idle:
            set_idle_class(self._process.pid, idle=True)
        ours.setblocking(False)
        await self._loop.create_connection(lambda: self, sock=ours)
        self._loop.create_task(self._reap())
        return self

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """False from the moment its death is known."""
        return self._transport is not None and not self._transport.is_closing() and not self.exited.is_set()

    @property
    def is_ready(self) -> bool:
        """Imports are done; it can load at once."""
        return self._ready.done() and self.is_alive

    async def ready(self) -> frames.Ready:
        """Wait for the imports; raises HardwareIncompatibleError when MLX does not run here."""
        try:
            return await asyncio.wait_for(asyncio.shield(self._ready), self._config.ready_seconds)
        except TimeoutError:
            self.kill()
            raise HardwareIncompatibleError("the worker did not start in time; see the log") from None

    async def load(
        self,
        label: str,
        view: Path,
        *,
        kind: frames.ModelKind = "text",
        tokenizer_only: bool = False,
        kv_budget_bytes: int = 0,
        context_limit: int = 0,
    ) -> frames.Loaded:
        """Load a model, once in the life of the process; raises what the loader raised.

        `kv_budget_bytes` bounds the caches of its rows together, `context_limit` the tokens of each; 0: no bound.
        Raises OutOfMemoryError when memory ran out, whether the worker said so or died of it.
        """
        self.label = label
        set_idle_class(self.pid, idle=False)
        await self.ready()
        self._kv_budget_bytes = kv_budget_bytes
        self._send(
            frames.Load(
                str(view),
                kind,
                tokenizer_only,
                self._max_rows,
                kv_budget_bytes,
                context_limit,
                self._config.use_gpu,
            )
        )
        assert self._memory is not None
        self._memory.expect(0 if tokenizer_only else _weight_bytes(view))
        self._life = ((), self._loop.time())
        self._watch_memory()
        limits = (self._max_rows, self._kv_budget_bytes)
        try:
            loaded = await asyncio.shield(self._loaded)
        finally:
            self._memory.expect(0)
        if limits != (self._max_rows, self._kv_budget_bytes):  # Nobody there could hear it before.
            self.limit()
        return loaded

    def limit(
        self,
        *,
        max_rows: int | None = None,
        max_waiting_rows: int | None = None,
        kv_budget_bytes: int | None = None,
    ) -> None:
        """Change limits, None leaving one as it is; rows that run are not failed.

        With fewer rows or less cache than are in use, rows end or make room before others start.
        """
        self._max_rows = self._max_rows if max_rows is None else max_rows
        self._max_waiting_rows = self._max_waiting_rows if max_waiting_rows is None else max_waiting_rows
        self._kv_budget_bytes = self._kv_budget_bytes if kv_budget_bytes is None else kv_budget_bytes
        if self.is_alive:
            self._send(frames.Limits(self._max_rows, self._kv_budget_bytes))

    async def stop(self, cause: ModelServerError | None = None) -> None:
        """End the process: calls still open end with `cause`; returns when its memory is free."""
        self._cause = self._cause or cause
        self._ended_by_us = self._ended_by_us or self.is_alive
        if self._transport:
            self._transport.close()
        try:
            await asyncio.wait_for(self.exited.wait(), EXIT_GRACE_SECONDS)
        except TimeoutError:
            self.kill()
            await self.exited.wait()

    def kill(self) -> None:
        """End it the hard way."""
        if self._process and self._process.returncode is None:
            self._ended_by_us = True
            self._process.kill()

    # Work.

    @property
    def is_delivering(self) -> bool:
        """Nobody waits, or something came lately."""
        return self.is_alive and self._stall.quiet_seconds < HEALTHY_SILENCE_SECONDS

    @property
    def open_call_count(self) -> int:
        """Rows and counts that wait for an end."""
        return len(self._calls)

    @property
    def waiting_count(self) -> int:
        """Rows of which nothing has come yet."""
        return self._calls.waiting_count

    @property
    def running_count(self) -> int:
        """Rows of which something has come and more is to come."""
        return self._calls.running_count

    @property
    def tokens_per_second(self) -> float:
        """Tokens delivered in the last 5 seconds, per second; 0 when there were none."""
        return self._calls.tokens_per_second

    @property
    def footprint_bytes(self) -> int:
        """What the process takes of the machine's memory now; 0 when it is gone."""
        return self._memory.footprint_bytes if self._memory is not None else 0

    def submit(
        self,
        prompts: Sequence[frames.Prompt],
        sampling: frames.Sampling,
        rows: int,
        priority: int,
        *,
        tool_use: frames.ToolUse | None = None,
        echo: bool = False,
        is_scored_only: bool = False,
    ) -> Call:
        """Queue `rows` rows for each prompt; raises QueueFullError when too many wait already.

        The keys of the call are in order: those of the first prompt, then those of the second.
        """
        self.refuse_crowd(rows * len(prompts))
        keys = tuple(next(self._keys) for _ in range(rows * len(prompts)))
        encoded = [
            _encoded(
                frames.Submit(
                    keys[index * rows : (index + 1) * rows],
                    prompt,
                    sampling,
                    priority,
                    tool_use,
                    echo,
                    is_scored_only,
                )
            )
            for index, prompt in enumerate(prompts)
        ]
        call = self._open(keys)
        for frame in encoded:
            self._write(frame)
        return call

    def count(self, prompt: frames.Prompt) -> Call:
        """Ask for the number of tokens of a prompt: one `Counted` event."""
        return self._ask(frames.Count(next(self._keys), prompt))

    def embed(self, prompts: Sequence[frames.Prompt], dimensions: int, priority: int) -> Call:
        """Ask for the vectors of prompts: one `Embedded` event. Raises QueueFullError when too many wait already."""
        self.refuse_crowd(1)
        return self._ask(frames.Embed(next(self._keys), tuple(prompts), dimensions, priority))

    def rerank(self, query: str, documents: Sequence[str], priority: int) -> Call:
        """Ask for the scores of documents: one `Reranked` event. Raises QueueFullError when too many wait already."""
        self.refuse_crowd(1)
        return self._ask(frames.Rerank(next(self._keys), query, tuple(documents), priority))

    def _ask(self, command: frames.Count | frames.Embed | frames.Rerank) -> Call:
        frame = _encoded(command)
        call = self._open((command.key,), is_answered_once=isinstance(command, frames.Count))
        self._write(frame)
        return call

    def refuse_crowd(self, newcomers: int) -> None:
        """Raise QueueFullError when so many more rows would be too many."""
        limit = self._max_rows + self._max_waiting_rows
        if len(self._calls) + newcomers > limit:
            raise QueueFullError(
                f"Model '{self.label}' has {len(self._calls)} requests running or waiting, {limit} at most; "
                "try again in a moment",
                retry_after_seconds=1.0,
                model=self.label,
            )

    async def usage(self) -> frames.Usage:
        """Memory and rows, answered between two steps; raises EngineDeadError when it dies meanwhile."""
        future: asyncio.Future[frames.Usage] = self._loop.create_future()
        if not self.is_alive:
            raise self._death_error()
        self._usage_waiters.append(future)
        self._send(frames.AskUsage())
        return await future

    def _open(self, keys: tuple[int, ...], *, is_answered_once: bool = False) -> Call:
        if not self.is_alive:
            raise self._death_error()
        call = self._calls.open(keys, is_answered_once=is_answered_once)
        self._watch_memory()
        return call

    def _send(self, command: frames.Command) -> None:
        self._write(frames.encode(command))

    def _send_if_alive(self, command: frames.Command) -> None:
        if self.is_alive:
            self._send(command)

    def _write(self, frame: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            raise self._death_error()
        self._transport.write(frame)

    # Frames.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for body in self._buffer.feed(data):
            event = frames.decode_event(body)
            if type(event) is frames.Step:
                self._calls.deliver(event)
            else:
                self._receive(event)

    def _receive(self, event: frames.Event) -> None:
        if isinstance(event, frames.Accepted | frames.Prefilled | frames.Answer):
            self._calls.receive(event)
        elif isinstance(event, frames.Failed):
            if not event.keys:  # The load failed, or the worker is about to end itself.
                self._cause = self._failure(event)
                if not self._loaded.done():
                    self._loaded.set_exception(self._cause)
            self._calls.fail(event)
        elif isinstance(event, frames.Usage):
            self._note_usage(event)
        elif isinstance(event, frames.Warming):
            self.on_warming()
        elif isinstance(event, frames.Ready):
            self._ready.set_result(event)
        elif isinstance(event, frames.Loaded):
            self._loaded.set_result(event)

    def _failure(self, event: frames.Failed) -> ModelServerError:
        if speaks_of_starvation(event.message) and self._memory is not None:
            self._memory.sample()
            if evidence := self._memory.evidence(0):
                words = f"Memory ran out while model '{self.label}' was loaded: {event.message} ({evidence})"
                return OutOfMemoryError(words, model=self.label)
        return BY_REASON[event.reason](event.message, field=event.field)

    def _note_usage(self, usage: frames.Usage) -> None:
        self.latest_usage = usage
        self._stall.reported(usage)
        if usage.is_answer:
            waiters, self._usage_waiters = self._usage_waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(usage)

    def _watch_memory(self) -> None:
        """Look at the memory of the process while it loads or somebody waits for it."""
        if self._memory_timer is None:
            self._sample_memory()

    def _sample_memory(self) -> None:
        self._memory_timer = None
        is_loading = not self._loaded.done()
        if self.is_alive and self._memory is not None and (self._calls or is_loading):
            usage = self.latest_usage
            self._memory.sample(usage.active_bytes + usage.cache_bytes if usage is not None else 0)
            if is_loading:
                self._check_load()
            self._memory_timer = self._loop.call_later(MEMORY_SAMPLE_SECONDS, self._sample_memory)

    def _check_load(self) -> None:
        """A load reports nothing before its end, and MLX can wait for ever for memory that it did not get."""
        assert self._memory is not None
        now, signs = self._loop.time(), self._memory.signs_of_life()
        before, since = self._life
        if not signs or signs != before:
            self._life = (signs, now)
        elif now - since >= self._config.stall_seconds:
            self._end_stalled(now - since, self._memory.evidence(0))

    # Death.

    def _end_stalled(self, quiet_seconds: float, memory_evidence: str = "") -> None:
        words = f"delivered nothing for {quiet_seconds:.0f} seconds and was killed"
        log.error("worker %d (%s) %s", self.pid, self.label, words)
        self.death = judge_stall(self.label, words, memory_evidence)
        self.kill()

    def connection_lost(self, exc: Exception | None) -> None:
        # EOF means that no more tokens come; the exit status, which comes with it, tells why.
        self._loop.create_task(self._end_calls())

    async def _end_calls(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.exited.wait(), VERDICT_SECONDS)
        error = self._death_error()
        self._calls.end(error)
        if not self._loaded.done():
            is_known = self._cause is not None or isinstance(error, OutOfMemoryError)
            self._loaded.set_exception(error if is_known else ModelLoadFailedError(error.message))
        futures: list[asyncio.Future[Any]] = [self._ready, *self._usage_waiters]
        for future in futures:
            if not future.done():
                future.set_exception(error)

    async def _reap(self) -> None:
        """Log what the process says until it ends, then judge its end."""
        process = self._process
        assert process is not None and process.stdout is not None
        # Not line by line: a line over the reader's limit would end this task.
        while chunk := await process.stdout.read(1 << 16):
            self._last_words = (self._last_words + chunk)[-LAST_WORDS_BYTES:]
            log.info("worker %d (%s): %s", process.pid, self.label, chunk.decode("utf-8", "replace").rstrip())
        status = await process.wait()
        if self.death is None:
            self.death = judge(
                self.label,
                status,
                ended_by_us=self._ended_by_us,
                last_words=self._last_words.decode("utf-8", "replace"),
                memory_evidence=self._memory.evidence(status) if self._memory is not None else "",
                said_memory=isinstance(self._cause, OutOfMemoryError),
            )
        self.exited.set()
        self._stall.close()
        if not self._ended_by_us:
            log.warning("worker %d (%s) ended: %s", process.pid, self.label, self.death.message)
        self.on_exit()

    def _death_error(self) -> ModelServerError:
        """What a call is told that can no longer be served."""
        if self._cause is not None:
            return self._cause
        if self.death is not None:
            return self.death.error(self.label)
        status = self._process.returncode if self._process is not None else None
        return judge(
            self.label, status, ended_by_us=self._ended_by_us, last_words="", memory_evidence=""
        ).error(self.label)


def _encoded(command: frames.Submit | frames.Count | frames.Embed | frames.Rerank) -> bytes:
    frame = frames.encode(command)
    if len(frame) > frames.MAX_FRAME_BYTES:
        raise PayloadTooLargeError(
            f"the prompt is larger than {frames.MAX_FRAME_BYTES >> 20} MiB once encoded; shorten it"
        )
    return frame


def _weight_bytes(view: Path) -> int:
    """The size of the weights that a loader will find."""
    return sum(file.stat().st_size for file in view.glob("*.safetensors") if file.exists())


def _consume(future: "asyncio.Future[frames.Ready] | asyncio.Future[frames.Loaded]") -> None:
    """Mark the exception as seen: nobody may be waiting when a standby dies."""
    if not future.cancelled():
        future.exception()
