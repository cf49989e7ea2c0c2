"""Wires the control process together, runs it, and takes it down in order."""

import asyncio
import contextlib
import importlib.resources
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from mlxgui.v1 import (
    audio_pb2,
    audio_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
)
from mlxgui_grpc.bridge_process import BridgeProcess
from mlxgui_grpc.catalog import Catalog
from mlxgui_grpc.config import ServerConfig, hub_cache_directory
from mlxgui_grpc.engine.supervisor import WorkerConfig
from mlxgui_grpc.generation import Generator
from mlxgui_grpc.hub import Hub
from mlxgui_grpc.installer import Installer
from mlxgui_grpc.log import configure_logging
from mlxgui_grpc.metrics import Metrics
from mlxgui_grpc.operations import Operations
from mlxgui_grpc.ports import port_holder
from mlxgui_grpc.residency import Residency
from mlxgui_grpc.secrets import hub_token
from mlxgui_grpc.services.call_record import CallBook
from mlxgui_grpc.services.inference_service import InferenceService
from mlxgui_grpc.services.interceptors import CallInterceptor
from mlxgui_grpc.services.model_service import ModelService
from mlxgui_grpc.services.system_service import MAX_RECEIVE_BYTES, ServerFacts, SystemService
from mlxgui_grpc.state_directory import Addresses, StateDirectory

log = logging.getLogger(__name__)

DEMO_NAME = "demo"

_OPTIONS = [
    ("grpc.so_reuseport", 0),  # else a second server binds the same port without a word
    ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_concurrent_streams", 256),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
]

_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a user wants to know once the server is up."""

    rest_url: str
    grpc_address: str
    unix_address: str
    home: Path
    log_file: Path
    demo_model: str | None


def run(config: ServerConfig, announce: Callable[[Announcement], None] = lambda announcement: None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status.

    Raises StateDirectoryLockedError, or OSError with a sentence for the user when an address cannot be bound.
    """
    state = StateDirectory(config)
    try:
        log_file = configure_logging(config.log_directory, config.log_level)
        return asyncio.run(_Server(config, state, log_file).run(announce))
    finally:
        state.close()


class _Server:
    """One run of the control process."""

    def __init__(self, config: ServerConfig, state: StateDirectory, log_file: Path) -> None:
        self._config = config
        self._state = state
        self._log_file = log_file
        self._start_time = time.time()
        self._rest_url = ""
        self._grpc_addresses: tuple[str, ...] = ()

    async def run(self, announce: Callable[[Announcement], None]) -> int:
        config = self._config
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)

        catalog = Catalog(config.database)
        unfinished = await catalog.open()
        operations = Operations(catalog)
        await operations.recover(unfinished)
        self._health = health.aio.HealthServicer()
        self._model_health_tasks: set[asyncio.Task[None]] = set()
        residency = Residency(
            catalog,
            WorkerConfig(
                temporary_directory=config.temporary_directory,
                stall_seconds=config.stall_seconds,
                max_rows=config.max_concurrent_requests,
                max_waiting_rows=config.max_waiting_requests,
            ),
            config.view_directory,
            config.standby_count,
            self._on_model_change,
        )
        hub = _hub(config)
        installer = Installer(catalog, operations, residency, hub, config.model_roots, self._on_model_change)
        if config.register_demo:
            demo = Path(str(importlib.resources.files("mlxgui_grpc") / "demo"))
            await installer.register_demo(demo, DEMO_NAME)
        await asyncio.to_thread(hub.sweep_partials)

        metrics = Metrics()
        book = CallBook(metrics)
        bridge = BridgeProcess(config, self._state.socket)
        generator = Generator(catalog, residency, metrics, config.inference_seconds)
        server = grpc.aio.server(interceptors=[CallInterceptor(book, config.api_key)], options=_OPTIONS)
        model_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelService(catalog, residency, installer, operations), server
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceService(generator, book), server)
        audio_pb2_grpc.add_AudioServiceServicer_to_server(audio_pb2_grpc.AudioServiceServicer(), server)
        system_pb2_grpc.add_SystemServiceServicer_to_server(
            SystemService(config, residency, metrics, self._facts, lambda: bridge.pid, book.draining.is_set),
            server,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        services = _service_names()
        _add_reflection(server, services)
        await self._set_health(services, health_pb2.HealthCheckResponse.NOT_SERVING)
        for model in catalog.models():
            self._on_model_change(model.name, "unloaded")
        port = self._bind(server)
        await server.start()
        try:
            if config.bridge:
                self._rest_url = await bridge.start()
        except OSError:
            await server.stop(None)
            await catalog.close()
            raise
        residency.start()
        await self._set_health(services, health_pb2.HealthCheckResponse.SERVING)
        grpc_address = f"{_bracketed(config.grpc_host)}:{port}"
        unix_address = f"unix:{self._state.socket}"
        self._grpc_addresses = (grpc_address, unix_address)
        self._state.publish(Addresses(os.getpid(), str(self._state.socket), grpc_address, self._rest_url))
        log.info("serving on %s, %s and %s", grpc_address, unix_address, self._rest_url or "no bridge")
        demo_model = DEMO_NAME if catalog.find(DEMO_NAME) else None
        announce(
            Announcement(self._rest_url, grpc_address, unix_address, config.home, self._log_file, demo_model)
        )

        await stop.wait()

        # Nothing new, let what runs finish, then the outermost layer first.
        log.info("stopping: %d calls run", book.running_count)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, os._exit, 1)  # A second signal does not wait.
        book.drain()
        await self._health.enter_graceful_shutdown()
        await operations.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(book.wait_idle(), config.drain_seconds)
        await residency.close()
        await bridge.stop()
        await server.stop(1.0)
        await catalog.close()
        log.info("stopped")
        return 0

    def _bind(self, server: grpc.aio.Server) -> int:
        """Bind both addresses; returns the TCP port."""
        config = self._config
        address = f"{_bracketed(config.grpc_host)}:{config.grpc_port}"
        try:
            if config.tls_certificate and config.tls_key:
                pair = (config.tls_key.read_bytes(), config.tls_certificate.read_bytes())
                port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
            else:
                port = server.add_insecure_port(address)
        except RuntimeError as error:
            holder = port_holder(config.grpc_port)
            taken = f": {holder} has it" if holder else ""
            raise OSError(
                f"gRPC port {config.grpc_port} cannot be bound{taken}: choose another with --grpc-port or "
                "MLX_GUI_GRPC_PORT"
            ) from error
        server.add_insecure_port(f"unix:{self._state.socket}")
        return port

    def _facts(self) -> ServerFacts:
        return ServerFacts(self._start_time, self._rest_url, self._grpc_addresses, _CAPABILITIES)

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
    for name in vars(servicer)
    if name[0].isupper()
)
"""The RPCs that this version implements."""


def _bracketed(host: str) -> str:
    """A host as it stands before a port."""
    return f"[{host}]" if ":" in host else host


def _service_names() -> list[str]:
    modules: tuple[Any, ...] = (model_pb2, inference_pb2, audio_pb2, system_pb2)
    return [
        service.full_name for module in modules for service in module.DESCRIPTOR.services_by_name.values()
    ]


def _add_reflection(server: grpc.aio.Server, services: list[str]) -> None:
    """Reflection under its old name, which the package serves, and under v1, which newer clients ask for first."""
    names = [*services, health.SERVICE_NAME, reflection.SERVICE_NAME, _REFLECTION_V1]
    servicer = reflection.aio.ReflectionServicer(service_names=names, pool=_MethodPool())
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    # The messages of v1 are the same, byte for byte.
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(_REFLECTION_V1, {"ServerReflectionInfo": handler}),)
    )
    _describe_reflection_v1(reflection_pb2.DESCRIPTOR)


class _MethodPool:
    """The pool of descriptors, in which methods are found too: protobuf's own knows services and messages only."""

    def __getattr__(self, name: str) -> Any:
        return getattr(descriptor_pool.Default(), name)

    def FindFileContainingSymbol(self, symbol: str) -> Any:
        pool = descriptor_pool.Default()
        try:
            return pool.FindFileContainingSymbol(symbol)
        except KeyError:
            service, _, method = symbol.rpartition(".")
            descriptor = pool.FindServiceByName(service)
            if method not in descriptor.methods_by_name:
                raise
            return descriptor.file


def _describe_reflection_v1(alpha: Any) -> None:
    """Make the descriptor of v1 known, which no package brings: who lists the services asks for each one's too."""
    described = descriptor_pb2.FileDescriptorProto()
    alpha.CopyToProto(described)
    described.name = "grpc/reflection/v1/reflection.proto"
    described.package = described.package.replace("v1alpha", "v1")
    for message in described.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace("v1alpha", "v1")
    for service in described.service:
        for method in service.method:
            method.input_type = method.input_type.replace("v1alpha", "v1")
            method.output_type = method.output_type.replace("v1alpha", "v1")
    descriptor_pool.Default().AddSerializedFile(described.SerializeToString())


def _hub(config: ServerConfig) -> Hub:
    environ = os.environ
    return Hub(
        endpoint=config.hub_endpoint or None,
        cache_dir=config.hub_cache or hub_cache_directory(environ),
        token=hub_token(environ),
        offline=environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"},
    )
