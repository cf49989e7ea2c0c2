"""The gRPC server as a thing of the network: its options, its addresses and the names of its services."""

import contextlib
from pathlib import Path
from typing import Any

import grpc

from mlxgui.v1 import audio_pb2, inference_pb2, model_pb2, system_pb2
from mlxgui_grpc.config import ServerConfig
from mlxgui_grpc.ports import port_holder
from mlxgui_grpc.services.system_service import MAX_RECEIVE_BYTES

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


def create(interceptor: grpc.aio.ServerInterceptor) -> grpc.aio.Server:
    """A server without services and addresses."""
    return grpc.aio.server(interceptors=[interceptor], options=_OPTIONS)


def bind(server: grpc.aio.Server, config: ServerConfig, socket: Path, preferred_port: int) -> int:
    """Bind the TCP address and the unix socket; returns the port.

    Where any port would do it is `preferred_port`, if that is free and not 0. Raises OSError with a sentence.
    """
    credentials = None
    if config.tls_certificate and config.tls_key:
        pair = (config.tls_key.read_bytes(), config.tls_certificate.read_bytes())
        credentials = grpc.ssl_server_credentials([pair])

    def add(port: int) -> int:
        if credentials is not None:
            return server.add_secure_port(address(config.grpc_host, port), credentials)
        return server.add_insecure_port(address(config.grpc_host, port))

    bound = 0
    if config.grpc_port == 0 and preferred_port:
        with contextlib.suppress(RuntimeError):
            bound = add(preferred_port)
    try:
        bound = bound or add(config.grpc_port)
    except RuntimeError as error:
        holder = port_holder(config.grpc_port)
        taken = f": {holder} has it" if holder else ""
        raise OSError(
            f"gRPC port {config.grpc_port} cannot be bound{taken}: choose another with --grpc-port or "
            "MLX_GUI_GRPC_PORT"
        ) from error
    server.add_insecure_port(f"unix:{socket}")
    return bound


def address(host: str, port: int) -> str:
    """`host:port`, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def service_names() -> list[str]:
    """Full names of the contract's services."""
    modules: tuple[Any, ...] = (model_pb2, inference_pb2, audio_pb2, system_pb2)
    return [
        service.full_name for module in modules for service in module.DESCRIPTOR.services_by_name.values()
    ]
