"""Wires the control process together, runs it, and takes it down in order."""

import asyncio
import contextlib
import importlib.resources
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from mlxgui.v1 import (
    audio_pb2_grpc,
    inference_pb2_grpc,
    model_pb2_grpc,
    system_pb2_grpc,
)
from mlxgui_grpc import grpc_server
from mlxgui_grpc.bridge_process import BridgeProcess
from mlxgui_grpc.catalog import Catalog
from mlxgui_grpc.config import ServerConfig, hub_cache_directory
from mlxgui_grpc.discovery import Discovery
from mlxgui_grpc.embedding import Embedder
from mlxgui_grpc.ending import Ending
from mlxgui_grpc.engine.supervisor import WorkerConfig
from mlxgui_grpc.errors import ModelServerError
from mlxgui_grpc.generation import Generator
from mlxgui_grpc.handover import Handover, end_children, present_children, start_again, take_handover
from mlxgui_grpc.hub import Hub
from mlxgui_grpc.hub_lookups import HubLookups
from mlxgui_grpc.images.decode import Decoder
from mlxgui_grpc.images.fetch import Fetcher
from mlxgui_grpc.images.loader import ImageLoader
from mlxgui_grpc.installer import Installer
from mlxgui_grpc.log import configure_logging, set_log_level
from mlxgui_grpc.machine import read_machine
from mlxgui_grpc.memory import GIB
from mlxgui_grpc.metrics import Metrics
from mlxgui_grpc.operations import Operations
from mlxgui_grpc.options import Options
from mlxgui_grpc.residency import Limits, Residency
from mlxgui_grpc.secrets import hub_token
from mlxgui_grpc.services.call_record import CallBook
from mlxgui_grpc.services.inference_service import InferenceService
from mlxgui_grpc.services.interceptors import CallInterceptor
from mlxgui_grpc.services.model_service import ModelService
from mlxgui_grpc.services.reflection import add_reflection
from mlxgui_grpc.services.system_service import ServerFacts, SystemService
from mlxgui_grpc.settings import Settings
from mlxgui_grpc.state_directory import Addresses, StateDirectory

log = logging.getLogger(__name__)

DEMO_NAME = "demo"
TIDY_SECONDS = 60.0
STOP_SECONDS = 1.0
"""How long answers may take to reach their callers when everything has ended."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a user wants to know once the server is up."""

    rest_url: str
    grpc_address: str
    unix_address: str
    home: Path
    log_file: Path
    demo_model: str | None


def run(options: Options, announce: Callable[[Announcement], None] = lambda announcement: None) -> int:
    """Serve until SIGTERM, SIGINT or Shutdown; returns the exit status. After Restart it does not return: the same
    command line runs again in this process.

    Raises StateDirectoryLockedError, InvalidRequestError for options that cannot be, or OSError with a sentence for the
    user when an address cannot be bound.
    """
    config = options.config()
    before = take_handover(os.environ)
    state = StateDirectory(config, before.lock if before else None)
    try:
        log_file = configure_logging(config.log_directory, config.log_level)
        after = asyncio.run(_Server(options, state, log_file, before).run(announce))
    except BaseException:
        state.close()
        raise
    if after is None:
        state.close()
        return 0
    start_again(msgspec.structs.replace(after, lock=state.leave_locked()))


class _Server:
    """One run of the control process."""

    def __init__(
        self, options: Options, state: StateDirectory, log_file: Path, before: Handover | None
    ) -> None:
        """`before` is what the run before this one left, when this is a restart."""
        self._options = options
        self._state = state
        self._log_file = log_file
        self._before = before
        self._start_time = time.time()
        self._machine = read_machine()
        self._others_children = present_children()
        self._is_ready = False
        self._rest_url = ""
        self._grpc_addresses: tuple[str, ...] = ()
        self._bridge: BridgeProcess | None = None
        self._health = health.aio.HealthServicer()
        self._model_health_tasks: set[asyncio.Task[None]] = set()

    async def run(self, announce: Callable[[Announcement], None]) -> Handover | None:
        """Serve until the end; what to leave to the next run, if there is to be one."""
        ending = Ending()
        self._stop_on_signals(ending)
        async with contextlib.AsyncExitStack() as closing:
            catalog = Catalog(self._options.config().database)
            unfinished = await catalog.open()
            closing.push_async_callback(catalog.close)
            operations = Operations(catalog)
            await operations.recover(unfinished)
            settings = Settings(self._options, catalog)
            config = settings.config
            set_log_level(config.log_level)
            residency = Residency(
                catalog,
                WorkerConfig(
                    temporary_directory=config.temporary_directory,
                    stall_seconds=config.stall_seconds,
                    max_rows=config.max_concurrent_requests,
                    max_waiting_rows=config.max_waiting_requests,
                    use_gpu=config.enable_gpu_acceleration,
                ),
                config.view_directory,
                _limits(config),
                self._on_model_change,
            )
            hub = _hub(config)
            installer = Installer(
                catalog, operations, residency, hub, config.model_roots, self._on_model_change
            )
            if config.register_demo:
                demo = Path(str(importlib.resources.files("mlxgui_grpc") / "demo"))
                await installer.register_demo(demo, DEMO_NAME)
            await asyncio.to_thread(hub.sweep_partials)
            discovery = Discovery(_lookups(config), catalog, residency.budget)
            closing.push_async_callback(discovery.close)

            images = ImageLoader(Fetcher(config.url_policy()), Decoder())
            closing.push_async_callback(images.close)

            def apply(changed: ServerConfig) -> None:
                images.fetcher.policy = changed.url_policy()
                set_log_level(changed.log_level)
                hub.cache_dir = _hub_cache(changed)
                residency.configure(_limits(changed))

            settings.on_change = apply
            metrics = Metrics()
            book = CallBook(metrics)
            generator = Generator(settings.find_model, residency, metrics, images, config.inference_seconds)
            embedder = Embedder(settings.find_model, residency, metrics, config.inference_seconds)
            server = grpc_server.create(CallInterceptor(book, config.api_key))
            model_pb2_grpc.add_ModelServiceServicer_to_server(
                ModelService(catalog, residency, installer, operations, discovery, book.draining), server
            )
            inference_pb2_grpc.add_InferenceServiceServicer_to_server(
                InferenceService(generator, embedder, book), server
            )
            audio_pb2_grpc.add_AudioServiceServicer_to_server(audio_pb2_grpc.AudioServiceServicer(), server)
            system_pb2_grpc.add_SystemServiceServicer_to_server(
                SystemService(
                    settings,
                    residency,
                    metrics,
                    book,
                    ending,
                    self._facts,
                    lambda: self._bridge.pid if self._bridge else None,
                ),
                server,
            )
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            services = grpc_server.service_names()
            add_reflection(server, services)
            await self._set_health(services, health_pb2.HealthCheckResponse.NOT_SERVING)
            for model in catalog.models():
                self._on_model_change(model.name, "unloaded")
            before_port = self._before.grpc_port if self._before else 0
            settings.grpc_port = port = grpc_server.bind(server, config, self._state.socket, before_port)
            await server.start()
            closing.push_async_callback(server.stop, STOP_SECONDS)
            if config.bridge:
                self._bridge = await self._start_bridge(settings)
                closing.push_async_callback(self._bridge.stop)
            closing.push_async_callback(residency.close)
            await settings.note_start()
            residency.start()
            installer.start()
            closing.push_async_callback(installer.close)
            housekeeping = asyncio.get_running_loop().create_task(_keep_tidy(operations))
            closing.callback(housekeeping.cancel)
            self._is_ready = True
            await self._set_health(services, health_pb2.HealthCheckResponse.SERVING)
            grpc_address = grpc_server.address(config.grpc_host, port)
            unix_address = f"unix:{self._state.socket}"
            self._grpc_addresses = (grpc_address, unix_address)
            self._state.publish(Addresses(os.getpid(), str(self._state.socket), grpc_address, self._rest_url))
            log.info("serving on %s, %s and %s", grpc_address, unix_address, self._rest_url or "no bridge")
            demo_model = DEMO_NAME if catalog.find(DEMO_NAME) else None
            announce(
                Announcement(
                    self._rest_url, grpc_address, unix_address, config.home, self._log_file, demo_model
                )
            )
            resumed = self._before.models if self._before else ()
            residency.preload(list(dict.fromkeys((*resumed, *config.preload_models))))

            await ending.asked()

            # Nothing new, let what runs finish, then the outermost layer first.
            log.info(
                "%s: %d calls run", "restarting" if ending.is_restart else "stopping", book.running_count
            )
            book.drain()
            await self._health.enter_graceful_shutdown()
            await operations.close()
            await ending.wait_for(book.idle)
            after = Handover(
                process_id=os.getpid(),
                lock=-1,
                rest_port=self._bridge.port if self._bridge else 0,
                grpc_port=port,
                models=tuple(residency.loaded_names()),
            )
        log.info("stopped")
        if not ending.is_restart:
            return None
        await end_children(self._others_children)
        return after

    def _stop_on_signals(self, ending: Ending) -> None:
        is_first = True

        def stop() -> None:
            nonlocal is_first
            if not is_first:
                os._exit(1)  # A second signal does not wait.
            is_first = False
            ending.ask(restart=False, grace_seconds=self._options.config().drain_seconds)

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop)

    async def _start_bridge(self, settings: Settings) -> BridgeProcess:
        """Start it where the settings say, or where they said before if that fails; raises OSError when all fail."""
        config = settings.config
        if self._before and config.port == 0:
            config = replace(config, port=self._before.rest_port)  # Where clients know it to be.
        while True:
            bridge = BridgeProcess(config, self._state.socket)
            try:
                self._rest_url = await bridge.start()
            except OSError as error:
                if config == settings.config and not settings.fall_back(_reason(error)):
                    raise
                config = settings.config
            else:
                settings.rest_port = bridge.port
                return bridge

    def _facts(self) -> ServerFacts:
        addresses = self._rest_url, self._grpc_addresses
        return ServerFacts(self._start_time, self._is_ready, *addresses, _CAPABILITIES, self._machine)

    async def _set_health(self, services: list[str], status: Any) -> None:
        for service in ("", *services):
            await self._health.set(service, status)

    def _on_model_change(self, name: str, state: str) -> None:
        words = {"loaded": "SERVING", "unloaded": "NOT_SERVING", "deleted": "SERVICE_UNKNOWN"}
        status = health_pb2.HealthCheckResponse.ServingStatus.Value(words[state])
        task = asyncio.get_running_loop().create_task(self._health.set(f"model/{name}", status))
        self._model_health_tasks.add(task)
        task.add_done_callback(self._model_health_tasks.discard)


_CAPABILITIES = tuple(
    f"{servicer.__name__}.{name}"
    for servicer in (ModelService, InferenceService, SystemService)
    for part in servicer.__mro__
    if part.__module__.startswith("mlxgui_grpc.")
    for name in vars(part)
    if name[0].isupper()
)
"""The RPCs that this version implements."""


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).removeprefix("mlxgui bridge: ").rstrip(".")


async def _keep_tidy(operations: Operations) -> None:
    """Forget old operations, now and then; residency sweeps for itself."""
    while True:
        await asyncio.sleep(TIDY_SECONDS)
        try:
            await operations.tidy()
        except ModelServerError as error:
            log.warning("old operations were not forgotten: %s", error.message)


def _limits(config: ServerConfig) -> Limits:
    return Limits(
        max_models=config.max_concurrent_models,
        auto_unload=config.auto_unload_inactive_models,
        idle_seconds=60.0 * config.model_inactivity_timeout_minutes,
        memory_cap_bytes=int(config.max_model_memory_gb * GIB),
        max_rows=config.max_concurrent_requests,
        max_waiting_rows=config.max_waiting_requests,
        context_limit=config.max_context_length,
        use_gpu=config.enable_gpu_acceleration,
        standby_count=config.standby_count,
    )


def _hub_cache(config: ServerConfig) -> Path:
    return config.hub_cache or hub_cache_directory(os.environ)


def _hub(config: ServerConfig) -> Hub:
    environ = os.environ
    return Hub(
        endpoint=config.hub_endpoint or None,
        cache_dir=_hub_cache(config),
        token=hub_token(environ),
        offline=_is_offline(environ),
    )


def _lookups(config: ServerConfig) -> HubLookups:
    environ = os.environ
    return HubLookups(
        endpoint=config.hub_endpoint or None, token=hub_token(environ), offline=_is_offline(environ)
    )


def _is_offline(environ: Mapping[str, str]) -> bool:
    return environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}
