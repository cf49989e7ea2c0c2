"""Keeps the REST bridge running beside the control process."""

import asyncio
import contextlib
import json
import logging
import os
import sys
from pathlib import Path

from mlxgui_grpc.config import ServerConfig
from mlxgui_grpc.secrets import API_KEY, without_secrets

log = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.2
LAST_BACKOFF_SECONDS = 10.0
START_SECONDS = 60.0
STOP_SECONDS = 8.0


class BridgeProcess:
    """The bridge, restarted with growing pauses when it dies. It ends itself when this process does."""

    def __init__(self, config: ServerConfig, socket: Path) -> None:
        self._config = config
        self._socket = socket
        self._port = config.port
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id, while it runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    @property
    def port(self) -> int:
        """Where it listens, once it has started."""
        return self._port

    async def start(self) -> str:
        """Start it; returns its base URL. Raises OSError with the bridge's own sentence when it cannot."""
        await self._spawn()
        self._keeper = asyncio.get_running_loop().create_task(self._keep())
        # An address that stands for all of them is none that a client can connect to everywhere.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._config.host, self._config.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self._port}"

    async def stop(self) -> None:
        """Let it finish what it answers, then end it."""
        if self._keeper is not None:
            self._keeper.cancel()
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            process.kill()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_SECONDS)

    async def _spawn(self) -> None:
        # Our end of the pipe closes when this process ends, however it ends.
        parent, child = os.pipe()
        arguments = [
            "--target",
            f"unix:{self._socket}",
            "--host",
            self._config.host,
            "--port",
            str(self._port),
        ]
        arguments += ["--parent-fd", str(parent)]
        for host in self._config.allowed_hosts:
            arguments += ["--allowed-host", host]
        for origin in self._config.cors_origins:
            arguments += ["--cors-origin", origin]
        if self._config.insecure:
            arguments.append("--insecure")
        environment = {**without_secrets(os.environ), API_KEY: self._config.api_key}
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "rest_bridge",
                *arguments,
                pass_fds=(parent,),
                process_group=0,  # Ctrl-C in a terminal is for this process: it ends its children in order
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=environment,
            )
        except BaseException:
            os.close(child)
            raise
        finally:
            os.close(parent)
        self._pipe = child
        assert process.stdout is not None and process.stderr is not None
        try:
            line = await asyncio.wait_for(process.stdout.readline(), START_SECONDS)
        except TimeoutError:
            process.kill()
            line = b""
        if not line:
            words = (await process.stderr.read()).decode("utf-8", "replace").strip().splitlines()
            await process.wait()
            os.close(child)
            raise OSError(words[-1] if words else "the REST bridge did not start; see the log")
        self._port = int(json.loads(line)["port"])
        self._process = process
        self._readers = [
            asyncio.get_running_loop().create_task(_log(stream))
            for stream in (process.stdout, process.stderr)
        ]

    async def _keep(self) -> None:
        backoff = FIRST_BACKOFF_SECONDS
        loop = asyncio.get_running_loop()
        while True:
            assert self._process is not None
            started = loop.time()
            status = await self._process.wait()
            os.close(self._pipe)
            log.error("the REST bridge ended with status %s; it is started again", status)
            if loop.time() - started > LAST_BACKOFF_SECONDS:
                backoff = FIRST_BACKOFF_SECONDS
            while True:
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, LAST_BACKOFF_SECONDS)
                with contextlib.suppress(OSError, ValueError, KeyError):
                    await self._spawn()
                    break


async def _log(stream: asyncio.StreamReader) -> None:
    # Not line by line: a line over the reader's limit would end this task, fill the pipe and block the bridge.
    while chunk := await stream.read(1 << 16):
        log.info("bridge: %s", chunk.decode("utf-8", "replace").rstrip())
