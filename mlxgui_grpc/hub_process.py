"""Child processes that talk to the hub, as the control process sees them: a job is a line in, reports are lines out."""

import asyncio
import contextlib
import logging
import os
import re
import sys

import msgspec

from mlxgui_grpc import errors
from mlxgui_grpc.hub_frames import Failed, Job, Report
from mlxgui_grpc.secrets import without_secrets

log = logging.getLogger(__name__)

MAX_REPORT_BYTES = 16 * 1024 * 1024
_LOG_TAIL_BYTES = 4096
_SECRETS = re.compile(r"hf_\w+|(?<=://)[^\s/@]+@|(?<=[?&])[^\s?&=]+=[^\s&\"']+")


def command(module: str) -> list[str]:
    """The command line of a child."""
    # -P: a folder in which somebody happens to start the server is no place to import from.
    return [sys.executable, "-P", "-m", module]


def environment() -> dict[str, str]:
    """Of a child: the token comes with the job, and nowhere else."""
    return without_secrets(os.environ)


class HubProcess:
    """One child. It ends when its standard input closes."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None
        self._child = child
        self._stdin, self._stdout = child.stdin, child.stdout
        self._tail = asyncio.create_task(_read_tail(child.stderr))

    @classmethod
    async def spawn(cls, module: str, added_environment: dict[str, str] | None = None) -> "HubProcess":
        """Start `module` with the server's environment, without its secrets."""
        child = await asyncio.create_subprocess_exec(
            *command(module),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=MAX_REPORT_BYTES,
            env=environment() | (added_environment or {}),
            # Ctrl-C in a terminal is for the server: it decides what ends.
            process_group=0,
        )
        return cls(child)

    @property
    def is_alive(self) -> bool:
        """It has not ended, as far as we know."""
        return self._child.returncode is None

    def send(self, job: Job) -> None:
        """Give it a job."""
        self._stdin.write(encoded(job))

    async def receive(self) -> Report | None:
        """The next report, or None when it has ended."""
        line = await self._stdout.readline()
        return decoded(line) if line.endswith(b"\n") else None

    async def ending(self) -> str:
        """How it ended, in words, when it has."""
        return ending(await self._child.wait())

    async def end(self) -> None:
        """Kill it if it lives, wait for its end, and log what it complained about."""
        with contextlib.suppress(ProcessLookupError):
            self._child.kill()
        self._stdin.close()
        await self._child.wait()
        log_tail(await self._tail)


def encoded(job: Job) -> bytes:
    """The job as a line."""
    return msgspec.json.encode(job) + b"\n"


def decoded(line: bytes) -> Report:
    """The report of a line."""
    report: Report = msgspec.json.decode(line, type=Report)
    return report


def error_of(failed: Failed) -> errors.ModelServerError:
    """The error that the child reported."""
    return errors.BY_REASON[failed.reason](
        failed.message,
        field=failed.field,
        retry_after_seconds=failed.retry_after_seconds,
        **failed.metadata,
    )


def ending(status: int) -> str:
    """An exit status in words."""
    return f"signal {-status}" if status < 0 else f"status {status}"


def log_tail(output: bytes) -> None:
    """Log the end of what a child wrote to standard error, without what may be secret in it."""
    if text := output[-_LOG_TAIL_BYTES:].decode("utf-8", "replace").strip():
        log.warning("hub process: %s", _SECRETS.sub("***", text))


async def _read_tail(stream: asyncio.StreamReader) -> bytes:
    tail = b""
    while chunk := await stream.read(_LOG_TAIL_BYTES):
        tail = (tail + chunk)[-_LOG_TAIL_BYTES:]
    return tail
