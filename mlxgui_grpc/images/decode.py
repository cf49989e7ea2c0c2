"""Decodes images in child processes that stay warm for a while, so that no file of a stranger's harms this one."""

import asyncio
import contextlib
import logging
import os
import sys
from dataclasses import dataclass

import msgspec

from mlxgui_grpc.errors import InvalidImageError, ModelServerError, UrlFetchFailedError
from mlxgui_grpc.images.decode_frames import Decoded, Job, Ready, Refused, Report
from mlxgui_grpc.secrets import without_secrets

log = logging.getLogger(__name__)

MAX_CHILDREN = 2
"""Pictures that are decoded at once; more wait."""
TIME_LIMIT_SECONDS = 10
"""Of the processor and of the clock, for one picture."""
START_SECONDS = 60.0
"""Until a new child has to be there."""
IDLE_SECONDS = 60.0
"""How long a child waits for its next picture: its 40 MB are not worth more."""

_CHILD = "mlxgui_grpc.images.decode_child"
_READ_BYTES = 1024 * 1024
_LOG_TAIL_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded picture: `height` x `width` x 3 bytes of sRGB. `full_size` is that of the file's, in pixels."""

    width: int
    height: int
    full_size: tuple[int, int]
    pixels: bytes


class Decoder:
    """Decodes pictures. Use on the event loop only; nothing blocks it."""

    def __init__(self, time_limit_seconds: int = TIME_LIMIT_SECONDS) -> None:
        self._time_limit_seconds = time_limit_seconds
        self._turns = asyncio.Semaphore(MAX_CHILDREN)
        self._idle: dict[_DecodeProcess, asyncio.TimerHandle] = {}
        self._ending: set[asyncio.Task[None]] = set()

    async def decode(
        self, data: bytes, field: str, *, max_pixels: int, max_side: int, is_fetched: bool = False
    ) -> Picture:
        """The picture in a file, made smaller where it is larger than the limits.

        Raises InvalidImageError, which names the field; UrlFetchFailedError where it `is_fetched`: nothing is told of
        what is elsewhere.
        """
        job = Job(len(data), max_pixels, max_side, self._time_limit_seconds)
        async with self._turns:
            answer = await self._answer(job, data)
        if isinstance(answer, Picture):
            return answer
        raise _refusal(answer, field, is_fetched)

    async def close(self) -> None:
        """End every child."""
        for child, timer in list(self._idle.items()):
            timer.cancel()
            self._retire(child)
        await asyncio.gather(*self._ending)

    async def _answer(self, job: Job, data: bytes) -> Picture | Refused:
        child = await self._take()
        is_sound = False
        try:
            # The child's own limit is of its processor time; it may have to wait for that.
            async with asyncio.timeout(job.time_limit_seconds):
                answer = await child.decode(job, data)
            is_sound = answer is not None
            return answer or Refused("breaks what decodes it")
        except TimeoutError:
            return Refused(f"takes longer than {job.time_limit_seconds} seconds to decode")
        finally:
            if is_sound:
                loop = asyncio.get_running_loop()
                self._idle[child] = loop.call_later(IDLE_SECONDS, self._retire, child)
            else:  # Late, dead, or about to answer somebody who has left: the next job must not get that answer.
                self._retire(child)

    async def _take(self) -> "_DecodeProcess":
        """A warm child, or a new one."""
        while self._idle:
            child, timer = self._idle.popitem()
            timer.cancel()
            if child.is_alive:
                return child
            self._retire(child)
        child = await _DecodeProcess.spawn()
        try:
            async with asyncio.timeout(START_SECONDS):
                await child.started()
        except TimeoutError:  # Which would be taken for the caller's.
            self._retire(child)
            raise RuntimeError("the decoder of images does not start in time") from None
        except BaseException:
            self._retire(child)
            raise
        return child

    def _retire(self, child: "_DecodeProcess") -> None:
        self._idle.pop(child, None)
        task = asyncio.get_running_loop().create_task(child.end())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


def _refusal(refused: Refused, field: str, is_fetched: bool) -> ModelServerError:
    if is_fetched:
        return UrlFetchFailedError(
            f"{field} could not be fetched: what is there is no image that can be read", field=field
        )
    return InvalidImageError(f"{field} cannot be read: it {refused.words}", field=field)


class _DecodeProcess:
    """One child. It ends when its standard input closes."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None
        self._child = child
        self._stdin, self._stdout = child.stdin, child.stdout
        self._tail = asyncio.create_task(_read_tail(child.stderr))

    @classmethod
    async def spawn(cls) -> "_DecodeProcess":
        """Start one, with the server's environment but for its secrets."""
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # A folder in which somebody happens to start the server is no place to import from.
            "-m",
            _CHILD,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_READ_BYTES,
            env=without_secrets(os.environ),
            # Ctrl-C in a terminal is for the server: it decides what ends.
            process_group=0,
        )
        return cls(child)

    @property
    def is_alive(self) -> bool:
        """It has not ended, as far as we know."""
        return self._child.returncode is None

    async def started(self) -> None:
        """Wait for its first word."""
        report = await self._report()
        if not isinstance(report, Ready):
            raise RuntimeError(f"the decoder of images does not start: status {await self._child.wait()}")

    async def decode(self, job: Job, data: bytes) -> Picture | Refused | None:
        """What it makes of a file; None when it has ended over it."""
        with contextlib.suppress(ConnectionError):
            self._stdin.write(msgspec.json.encode(job) + b"\n")
            self._stdin.write(data)
            await self._stdin.drain()
        report = await self._report()
        if not isinstance(report, Decoded):
            assert not isinstance(report, Ready)
            return report
        try:
            pixels = await self._stdout.readexactly(report.width * report.height * 3)
        except asyncio.IncompleteReadError:
            return None
        return Picture(report.width, report.height, (report.full_width, report.full_height), pixels)

    async def end(self) -> None:
        """Kill it if it lives, wait for its end, and log what it complained about."""
        with contextlib.suppress(ProcessLookupError):
            self._child.kill()
        self._stdin.close()
        await self._child.wait()
        if text := (await self._tail).decode("utf-8", "replace").strip():
            log.warning("decoder of images: %s", text)

    async def _report(self) -> Report | None:
        line = await self._stdout.readline()
        if not line.endswith(b"\n"):
            return None
        report: Report = msgspec.json.decode(line, type=Report)
        return report


async def _read_tail(stream: asyncio.StreamReader) -> bytes:
    tail = b""
    while chunk := await stream.read(_LOG_TAIL_BYTES):
        tail = (tail + chunk)[-_LOG_TAIL_BYTES:]
    return tail
