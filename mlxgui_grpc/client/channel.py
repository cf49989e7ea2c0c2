"""The gRPC channel of a client: its options, its credentials and which calls it repeats."""

import json
from collections.abc import Iterable
from pathlib import Path

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions

from mlxgui.v1 import audio_pb2, inference_pb2, model_pb2, system_pb2
from mlxgui_grpc.client.address import ServerAddress
from mlxgui_grpc.errors import InvalidRequestError

MAX_RECEIVE_BYTES = 64 * 1024 * 1024
"""The server's own limit of one message; gRPC's default of 4 MiB is less than a large batch of vectors."""

_REPEATABLE = (MethodOptions.NO_SIDE_EFFECTS, MethodOptions.IDEMPOTENT)
_RETRY_POLICY = {
    "maxAttempts": 4,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}

ChannelOptions = list[tuple[str, str | int]]


def methods() -> Iterable[MethodDescriptor]:
    """Every method of the contract."""
    for file in (model_pb2, inference_pb2, audio_pb2, system_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            yield from service.methods


def service_config() -> str:
    """Repeat UNAVAILABLE for the unary methods that the contract marks harmless to repeat, and no other.

    A generation that is repeated costs twice and differs, so Generate and Chat are not marked.
    """
    names = [
        {"service": method.containing_service.full_name, "method": method.name}
        for method in methods()
        if method.GetOptions().idempotency_level in _REPEATABLE
        and not method.client_streaming
        and not method.server_streaming
    ]
    return json.dumps({"methodConfig": [{"name": names, "retryPolicy": _RETRY_POLICY}]})


def channel_options(address: ServerAddress) -> ChannelOptions:
    """Options for the channel to that address."""
    options: ChannelOptions = [
        ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
        ("grpc.service_config", service_config()),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]
    if address.is_local:
        # Left on, gRPC would send calls to this machine through the proxy of `http_proxy`.
        options.append(("grpc.enable_http_proxy", 0))
    return options


def credentials(root_certificate: Path | str | bytes | None, tls: bool) -> grpc.ChannelCredentials | None:
    """TLS with the given root certificates (PEM, or its file), or with the system's; None is plain text."""
    if root_certificate is None:
        return grpc.ssl_channel_credentials() if tls else None
    if not isinstance(root_certificate, bytes):
        root_certificate = Path(root_certificate).expanduser().read_bytes()
    return grpc.ssl_channel_credentials(root_certificate)


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """What goes with every call; raises InvalidRequestError for a token that HTTP cannot carry."""
    if token and not (token.isascii() and token.isprintable()):
        raise InvalidRequestError("The API key has characters that no header can have", field="token")
    return (("authorization", f"Bearer {token}"),) if token else ()
