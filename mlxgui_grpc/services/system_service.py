"""SystemService: what the server is, how it does, its metrics and settings, and ending it."""

import asyncio
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import field_mask_pb2

from mlxgui.v1 import system_pb2 as pb
from mlxgui.v1 import system_pb2_grpc
from mlxgui_grpc import __version__, convert
from mlxgui_grpc.ending import Ending
from mlxgui_grpc.errors import ModelServerError
from mlxgui_grpc.images.sources import MAX_IMAGE_BYTES, MAX_IMAGES
from mlxgui_grpc.machine import Machine
from mlxgui_grpc.memory import footprint_bytes, read_machine_memory
from mlxgui_grpc.metrics import Metrics
from mlxgui_grpc.residency import Residency
from mlxgui_grpc.services.call_record import CallBook
from mlxgui_grpc.services.manager_messages import status_to_proto
from mlxgui_grpc.services.system_messages import (
    changes_from_proto,
    detail_to_proto,
    grace_seconds,
    host_to_proto,
    settings_to_proto,
)
from mlxgui_grpc.setting_table import SETTINGS
from mlxgui_grpc.settings import Settings

Context = grpc.aio.ServicerContext[Any, Any]

MAX_RECEIVE_BYTES = 68 * 1024 * 1024
PROBE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a running server says about itself."""

    start_time: float
    is_ready: bool
    rest_url: str
    grpc_addresses: tuple[str, ...]
    capabilities: tuple[str, ...]
    machine: Machine


class SystemService(system_pb2_grpc.SystemServiceServicer):
    """The host process."""

    def __init__(
        self,
        settings: Settings,
        residency: Residency,
        metrics: Metrics,
        book: CallBook,
        ending: Ending,
        facts: Callable[[], ServerFacts],
        bridge_pid: Callable[[], int | None],
    ) -> None:
        self._settings = settings
        self._residency = residency
        self._metrics = metrics
        self._book = book
        self._ending = ending
        self._facts = facts
        self._bridge_pid = bridge_pid
        self._probe: asyncio.Task[None] | None = None

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
            state_directory=str(self._settings.config.home),
            state=self._state(),
        )

    async def GetSystemStatus(
        self, request: pb.GetSystemStatusRequest, context: Context
    ) -> pb.GetSystemStatusResponse:
        await self._probe_device()
        residency = self._residency
        used_bytes = sum(
            usage.active_bytes + usage.cache_bytes
            for resident in residency.residents()
            if resident.worker is not None and (usage := resident.worker.latest_usage) is not None
        )
        # Until a worker has told, that MLX is installed is all that is known.
        is_told = residency.device is not None or residency.hardware_error
        runs_mlx = not residency.hardware_error if is_told else importlib.util.find_spec("mlx") is not None
        return pb.GetSystemStatusResponse(
            state=self._state(),
            system=host_to_proto(
                self._facts().machine, read_machine_memory(), residency.device, used_bytes, runs_mlx=runs_mlx
            ),
            model_manager=status_to_proto(residency.snapshot()),
        )

    async def GetMetrics(self, request: pb.GetMetricsRequest, context: Context) -> pb.GetMetricsResponse:
        await self._sample()
        content_type, body = self._metrics.exposition()
        return pb.GetMetricsResponse(content_type=content_type, body=body)

    async def GetSettings(self, request: pb.GetSettingsRequest, context: Context) -> pb.GetSettingsResponse:
        return pb.GetSettingsResponse(
            settings=settings_to_proto(self._settings), details=[self._detail(key) for key in SETTINGS]
        )

    async def UpdateSettings(
        self, request: pb.UpdateSettingsRequest, context: Context
    ) -> pb.UpdateSettingsResponse:
        values, reset = changes_from_proto(request)
        await self._settings.update(values, reset)
        details = [self._detail(key) for key in SETTINGS if key in values or key in reset]
        return pb.UpdateSettingsResponse(
            settings=settings_to_proto(self._settings),
            pending_restart=field_mask_pb2.FieldMask(
                paths=[detail.key for detail in details if detail.pending_restart]
            ),
            details=details,
        )

    async def Shutdown(self, request: pb.ShutdownRequest, context: Context) -> pb.ShutdownResponse:
        self._ending.ask(restart=False, grace_seconds=grace_seconds(request))
        return pb.ShutdownResponse(in_flight_count=self._in_flight_count())

    async def Restart(self, request: pb.RestartRequest, context: Context) -> pb.RestartResponse:
        seconds = grace_seconds(request)
        await self._settings.check_restart()
        self._ending.ask(restart=True, grace_seconds=seconds)
        return pb.RestartResponse(in_flight_count=self._in_flight_count())

    def _in_flight_count(self) -> int:
        return self._book.running_count - 1  # The call that asks is one of them.

    def _state(self) -> pb.ServerState.ValueType:
        if self._book.draining.is_set():
            return pb.SERVER_STATE_DRAINING
        return pb.SERVER_STATE_RUNNING if self._facts().is_ready else pb.SERVER_STATE_STARTING

    def _detail(self, key: str) -> pb.SettingDetail:
        device = self._residency.device
        return detail_to_proto(self._settings.detail(key, has_gpu=None if device is None else device.is_gpu))

    async def _probe_device(self) -> None:
        """Wait a moment for a worker to tell what MLX runs on, if none has yet; it goes on after that."""
        if self._residency.device is None and not self._residency.hardware_error:
            if self._probe is None or self._probe.done():
                self._probe = asyncio.get_running_loop().create_task(self._residency.probe())
            await asyncio.wait([self._probe], timeout=PROBE_SECONDS)

    async def _sample(self) -> None:
        """Read what is only known by asking, once per scrape."""
        memory, residents = self._metrics.memory, self._residency.residents()
        memory.clear()
        memory.labels("control").set(footprint_bytes(os.getpid()))
        if (pid := self._bridge_pid()) is not None:
            memory.labels("bridge").set(footprint_bytes(pid))
        for gauge in (self._metrics.waiting, self._metrics.kv_bytes, self._metrics.mlx_memory):
            gauge.clear()
        for resident in residents:
            worker, name = resident.worker, resident.model.name
            if worker is None or resident.state != "loaded":
                continue
            memory.labels(f"worker:{name}").set(worker.footprint_bytes)
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
            max_image_bytes=MAX_IMAGE_BYTES,
            max_image_count=MAX_IMAGES,
            max_message_count=convert.MAX_MESSAGES,
            max_part_count=convert.MAX_PARTS,
            max_tool_count=convert.MAX_TOOLS,
            max_prompt_count=convert.MAX_PROMPTS,
            max_stop_count=convert.MAX_STOP,
            max_tokens=convert.MAX_TOKENS_LIMIT,
            max_waiting_request_count=self._settings.config.max_waiting_requests,
        )
