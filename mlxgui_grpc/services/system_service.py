"""SystemService: what the server is, its metrics, and ending it."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import psutil

from mlxgui.v1 import system_pb2 as pb
from mlxgui.v1 import system_pb2_grpc
from mlxgui_grpc import __version__, convert
from mlxgui_grpc.config import ServerConfig
from mlxgui_grpc.errors import ModelServerError
from mlxgui_grpc.metrics import Metrics
from mlxgui_grpc.residency import Residency

Context = grpc.aio.ServicerContext[Any, Any]

MAX_RECEIVE_BYTES = 68 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a running server says about itself."""

    start_time: float
    rest_url: str
    grpc_addresses: tuple[str, ...]
    capabilities: tuple[str, ...]


class SystemService(system_pb2_grpc.SystemServiceServicer):
    """The host process."""

    def __init__(
        self,
        config: ServerConfig,
        residency: Residency,
        metrics: Metrics,
        facts: Callable[[], ServerFacts],
        bridge_pid: Callable[[], int | None],
        is_draining: Callable[[], bool],
    ) -> None:
        self._config = config
        self._residency = residency
        self._metrics = metrics
        self._facts = facts
        self._bridge_pid = bridge_pid
        self._is_draining = is_draining

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        facts = self._facts()
        return pb.GetServerInfoResponse(
            name="mlxgui-grpc",
            version=__version__,
            api_versions=["mlxgui.v1"],
            capabilities=facts.capabilities,
            engine_versions=self._residency.versions,
            rest_url=facts.rest_url,
            grpc_addresses=facts.grpc_addresses,
            limits=self._limits(),
            start_time=convert.timestamp(facts.start_time),
            process_id=os.getpid(),
            state_directory=str(self._config.home),
            state=pb.SERVER_STATE_DRAINING if self._is_draining() else pb.SERVER_STATE_RUNNING,
        )

    async def GetMetrics(self, request: pb.GetMetricsRequest, context: Context) -> pb.GetMetricsResponse:
        await self._sample()
        content_type, body = self._metrics.exposition()
        return pb.GetMetricsResponse(content_type=content_type, body=body)

    async def _sample(self) -> None:
        """Read what is only known by asking, once per scrape."""
        memory, residents = self._metrics.memory, self._residency.list()
        memory.clear()
        memory.labels("control").set(_resident_bytes(os.getpid()))
        if (pid := self._bridge_pid()) is not None:
            memory.labels("bridge").set(_resident_bytes(pid))
        for gauge in (self._metrics.waiting, self._metrics.kv_bytes, self._metrics.mlx_memory):
            gauge.clear()
        for resident in residents:
            worker, name = resident.worker, resident.model.name
            if worker is None or resident.state != "loaded":
                continue
            memory.labels(f"worker:{name}").set(_resident_bytes(worker.pid))
            try:
                usage = await asyncio.wait_for(worker.usage(), 1.0)
            except (ModelServerError, TimeoutError):
                continue  # It dies, or is in a long step: the next scrape tells.
            self._metrics.waiting.labels(name).set(usage.waiting_count)
            self._metrics.kv_bytes.labels(name).set(usage.kv_bytes)
            self._metrics.mlx_memory.labels(name).set(usage.active_bytes)

    def _limits(self) -> pb.ServerLimits:
        return pb.ServerLimits(
            max_receive_bytes=MAX_RECEIVE_BYTES,
            max_message_count=convert.MAX_MESSAGES,
            max_part_count=convert.MAX_PARTS,
            max_tool_count=convert.MAX_TOOLS,
            max_prompt_count=convert.MAX_PROMPTS,
            max_stop_count=convert.MAX_STOP,
            max_tokens=convert.MAX_TOKENS_LIMIT,
            max_waiting_request_count=self._config.max_waiting_requests,
        )


def _resident_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0
