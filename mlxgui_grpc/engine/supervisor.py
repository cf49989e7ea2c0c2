"""The control side of a worker process: spawn it, talk frames with it, watch over it, end it."""

import asyncio
import contextlib
import glob
import itertools
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.mailbox import Mailbox
from mlxgui_grpc.errors import (
    BY_REASON,
    EngineDeadError,
    HardwareIncompatibleError,
    ModelLoadFailedError,
    ModelServerError,
    ModelUnsafeError,
    PayloadTooLargeError,
    QueueFullError,
)
from mlxgui_grpc.secrets import without_secrets

log = logging.getLogger(__name__)

HEALTHY_SILENCE_SECONDS = 10.0
"""A worker that says nothing for so long while requests wait is not healthy."""
EXIT_GRACE_SECONDS = 2.0
"""How long a worker may take to end by itself once its socket is closed."""


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """How workers are started and watched."""

    temporary_directory: Path
    stall_seconds: float = 120.0
    """No frame for so long while rows wait for one: the worker is stuck and is killed."""
    max_rows: int = 32
    """Rows that decode at once."""
    max_waiting_rows: int = 128
    """Rows beyond them that may wait; more are refused."""
    ready_seconds: float = 300.0


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
        self._calls: dict[int, Mailbox] = {}
        self._ready: asyncio.Future[frames.Ready] = loop.create_future()
        self._loaded: asyncio.Future[frames.Loaded] = loop.create_future()
        self._usage_waiters: list[asyncio.Future[frames.Usage]] = []
        self._watchdog: asyncio.TimerHandle | None = None
        self._last_frame_time = loop.time()
        self._cause: ModelServerError | None = None
        self._is_stopping = False
        self.label = "standby"
        """What the log and errors call it: the name of its model."""
        self.exited = asyncio.Event()
        """Set when the process is reaped and its memory free."""
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
                pass_fds=(theirs.fileno(),),
                process_group=0,  # Ctrl-C in a terminal is for the control process: it ends its workers in order
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=worker_environment(environment, config.temporary_directory),
            )
        if idle:
            _set_idle_class(self._process.pid, idle=True)
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

    async def load(self, label: str, view: Path, *, tokenizer_only: bool = False) -> frames.Loaded:
        """Load a model, once in the life of the process; raises what the loader raised."""
        self.label = label
        _set_idle_class(self.pid, idle=False)
        await self.ready()
        self._send(frames.Load(str(view), tokenizer_only, self._config.max_rows))
        return await asyncio.shield(self._loaded)

    async def stop(self, cause: ModelServerError | None = None) -> None:
        """End the process: calls still open end with `cause`; returns when its memory is free."""
        self._is_stopping = True
        self._cause = self._cause or cause
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
            self._process.kill()

    # Work.

    @property
    def is_delivering(self) -> bool:
        """Nobody waits, or something came lately."""
        quiet_seconds = self._loop.time() - self._last_frame_time
        return self.is_alive and (not self._calls or quiet_seconds < HEALTHY_SILENCE_SECONDS)

    @property
    def open_call_count(self) -> int:
        """Rows and counts that wait for an end."""
        return len(self._calls)

    def submit(
        self, prompts: Sequence[frames.Prompt], sampling: frames.Sampling, rows: int, priority: int
    ) -> "Call":
        """Queue `rows` rows for each prompt; raises QueueFullError when too many wait already.

        The keys of the call are in order: those of the first prompt, then those of the second.
        """
        limit = self._config.max_rows + self._config.max_waiting_rows
        if len(self._calls) + rows * len(prompts) > limit:
            raise QueueFullError(
                f"Model '{self.label}' has {len(self._calls)} requests running or waiting, {limit} at most; "
                "try again in a moment",
                retry_after_seconds=1.0,
                model=self.label,
            )
        keys = tuple(next(self._keys) for _ in range(rows * len(prompts)))
        encoded = [
            _encoded(frames.Submit(keys[index * rows : (index + 1) * rows], prompt, sampling, priority))
            for index, prompt in enumerate(prompts)
        ]
        call = self._open(keys)
        for frame in encoded:
            self._write(frame)
        return call

    def count(self, prompt: frames.Prompt) -> "Call":
        """Ask for the number of tokens of a prompt: one `Counted` event."""
        key = next(self._keys)
        frame = _encoded(frames.Count(key, prompt))
        call = self._open((key,))
        self._write(frame)
        return call

    async def usage(self) -> frames.Usage:
        """Memory and rows, answered between two steps; raises EngineDeadError when it dies meanwhile."""
        future: asyncio.Future[frames.Usage] = self._loop.create_future()
        if not self.is_alive:
            raise self._death()
        self._usage_waiters.append(future)
        self._send(frames.AskUsage())
        return await future

    def cancel(self, keys: tuple[int, ...]) -> None:
        """Forget rows."""
        open_keys = tuple(key for key in keys if self._calls.pop(key, None))
        if open_keys and self.is_alive:
            self._send(frames.Cancel(open_keys))

    def _open(self, keys: tuple[int, ...]) -> "Call":
        def tell(command: Callable[[int], frames.Command]) -> None:
            for key in keys:
                if key in self._calls and self.is_alive:
                    self._send(command(key))

        mailbox = Mailbox(
            pause=lambda: tell(frames.Pause),
            resume=lambda: tell(frames.Resume),
            abandon=lambda: self.cancel(keys),
        )
        if not self.is_alive:
            raise self._death()
        if not self._calls:  # The silence before it is none of this call's.
            self._last_frame_time = self._loop.time()
        for key in keys:
            self._calls[key] = mailbox
        self._arm_watchdog()
        return Call(self, keys, mailbox)

    def _send(self, command: frames.Command) -> None:
        self._write(frames.encode(command))

    def _write(self, frame: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            raise self._death()
        self._transport.write(frame)

    # Frames.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._last_frame_time = self._loop.time()
        for body in self._buffer.feed(data):
            event = frames.decode_event(body)
            if type(event) is frames.Step:
                calls = self._calls
                for piece in event.pieces:
                    mailbox = calls.get(piece.key)
                    if mailbox is not None:
                        mailbox.put(piece)
                        if piece.finish:
                            del calls[piece.key]
            else:
                self._receive(event)

    def _receive(self, event: frames.Event) -> None:
        if isinstance(event, frames.Accepted | frames.Prefilled):
            if mailbox := self._calls.get(event.keys[0]):
                mailbox.put(event)
        elif isinstance(event, frames.Failed):
            error = BY_REASON[event.reason](event.message, field=event.field)
            if not event.keys:  # The load failed, or the worker is about to end itself.
                self._cause = error
                if not self._loaded.done():
                    self._loaded.set_exception(error)
            for key in event.keys:
                if mailbox := self._calls.pop(key, None):
                    mailbox.fail(error)
        elif isinstance(event, frames.Counted):
            if mailbox := self._calls.pop(event.key, None):
                mailbox.put(event)
        elif isinstance(event, frames.Usage):
            waiters, self._usage_waiters = self._usage_waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(event)
        elif isinstance(event, frames.Ready):
            self._ready.set_result(event)
        elif isinstance(event, frames.Loaded):
            self._loaded.set_result(event)

    # Death.

    def connection_lost(self, exc: Exception | None) -> None:
        # EOF means that no more tokens come; a moment later the exit status tells why.
        self._loop.create_task(self._end_calls())

    async def _end_calls(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.exited.wait(), 0.05)
        death = self._death()
        mailboxes, self._calls = set(self._calls.values()), {}
        for mailbox in mailboxes:
            mailbox.fail(death)
        if not self._loaded.done():
            self._loaded.set_exception(self._cause or ModelLoadFailedError(death.message))
        futures: list[asyncio.Future[Any]] = [self._ready, *self._usage_waiters]
        for future in futures:
            if not future.done():
                future.set_exception(death)

    async def _reap(self) -> None:
        """Log what the process says until it ends, then note its end."""
        process = self._process
        assert process is not None and process.stdout is not None
        # Not line by line: a line over the reader's limit would end this task.
        while chunk := await process.stdout.read(1 << 16):
            log.info("worker %d (%s): %s", process.pid, self.label, chunk.decode("utf-8", "replace").rstrip())
        await process.wait()
        self.exited.set()
        if self._watchdog:
            self._watchdog.cancel()
        if not self._is_stopping:
            log.warning("worker %d (%s) ended: %s", process.pid, self.label, self._exit_words())
        self.on_exit()

    def _death(self) -> ModelServerError:
        if self._cause is not None:
            return self._cause
        if self._process is not None and self._process.returncode == -signal.SIGALRM:
            return ModelUnsafeError(
                f"The chat template of model '{self.label}' runs without end; its worker was stopped",
                model=self.label,
            )
        if self._is_stopping:
            return EngineDeadError(
                f"Model '{self.label}' was unloaded while the request ran", model=self.label
            )
        return EngineDeadError(
            f"The worker of model '{self.label}' ended ({self._exit_words()}); the model can be loaded again",
            model=self.label,
        )

    def _exit_words(self) -> str:
        status = self._process.returncode if self._process else None
        if status is None:
            return "connection lost"
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return f"exit status {status}"

    # Watchdog: a timer only while somebody waits, so an idle server does nothing.

    def _arm_watchdog(self) -> None:
        if self._watchdog is None:
            self._watchdog = self._loop.call_later(self._config.stall_seconds, self._check_stall)

    def _check_stall(self) -> None:
        self._watchdog = None
        if not self._calls:
            return
        quiet_seconds = self._loop.time() - self._last_frame_time
        if quiet_seconds >= self._config.stall_seconds:
            log.error("worker %d (%s) sent nothing for %.0f s: killed", self.pid, self.label, quiet_seconds)
            self._cause = EngineDeadError(
                f"The worker of model '{self.label}' delivered nothing for {quiet_seconds:.0f} seconds and was "
                "killed; the model can be loaded again",
                model=self.label,
            )
            self.kill()
            return
        remaining = self._config.stall_seconds - quiet_seconds
        self._watchdog = self._loop.call_later(remaining, self._check_stall)


class Call:
    """One request on a worker. Leaving the block, however, gives its rows back at the next step."""

    def __init__(self, worker: WorkerProcess, keys: tuple[int, ...], mailbox: Mailbox) -> None:
        self._worker = worker
        self._mailbox = mailbox
        self.keys = keys
        self.take = mailbox.take
        """Await the events that wait; raises the error that ended the request."""
        self.fail = mailbox.fail
        """End the request with an error of the caller's."""

    def __enter__(self) -> "Call":
        return self

    def __exit__(self, *_: object) -> None:
        self._mailbox.close()
        self._worker.cancel(self.keys)


def worker_environment(environment: Mapping[str, str], temporary_directory: Path) -> dict[str, str]:
    """The environment of a worker: no tokens, no network, a private TMPDIR, and on Linux OpenBLAS where it is.

    The Linux wheel of mlx bundles the scalar reference BLAS; with OpenBLAS preloaded, matrix products take a
    twentieth of the time. One thread: two that spin lose on shared cores. Never required.
    """
    result = without_secrets(environment)
    # mlx on Linux compiles to and loads libraries from $TMPDIR/mlx: nobody else may write there.
    result |= {"TMPDIR": str(temporary_directory), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    result |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if sys.platform == "linux" and (library := find_openblas()):
        preloaded = result.get("LD_PRELOAD", "")
        if "openblas" not in preloaded:
            result["LD_PRELOAD"] = f"{preloaded} {library}".strip()
        result.setdefault("OPENBLAS_NUM_THREADS", "1")
    return result


def find_openblas() -> str | None:
    """The path of the system's OpenBLAS, looked for where Debian, Fedora and Arch put it."""
    for pattern in (
        "/usr/lib/*/libopenblas.so.0",
        "/usr/lib64/libopenblas.so.0",
        "/usr/lib/libopenblas.so.0",
    ):
        if found := sorted(glob.glob(pattern)):
            return found[0]
    return None


def _encoded(command: frames.Submit | frames.Count) -> bytes:
    frame = frames.encode(command)
    if len(frame) > frames.MAX_FRAME_BYTES:
        raise PayloadTooLargeError(
            f"the prompt is larger than {frames.MAX_FRAME_BYTES >> 20} MiB once encoded; shorten it"
        )
    return frame


def _set_idle_class(pid: int, *, idle: bool) -> None:
    """Move all threads of a process to the idle scheduling class or back; Linux only, elsewhere without effect."""
    if sys.platform != "linux":
        return
    policy = os.SCHED_IDLE if idle else os.SCHED_OTHER
    with contextlib.suppress(OSError):  # The process may have ended.
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):  # So may one of its threads.
                os.sched_setscheduler(int(task), policy, os.sched_param(0))


def _consume(future: "asyncio.Future[frames.Ready] | asyncio.Future[frames.Loaded]") -> None:
    """Mark the exception as seen: nobody may be waiting when a standby dies."""
    if not future.cancelled():
        future.exception()
