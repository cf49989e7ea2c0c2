"""The client for asyncio: the methods of `blocking.Client`, awaited. Used on one event loop."""

from mlxgui_grpc.client.asynchronous.connection import AsyncStream
from mlxgui_grpc.client.asynchronous.models import ModelCalls
from mlxgui_grpc.client.asynchronous.server import ServerCalls
from mlxgui_grpc.client.asynchronous.text import TextCalls

__all__ = ["AsyncClient", "AsyncStream"]


class AsyncClient(TextCalls, ModelCalls, ServerCalls):
    """One connection to a server.

    `target` is `unix:/path` or `host:port`; without it the server that runs in `home` (default: MLX_GUI_HOME)
    is found by the file it wrote. `token` goes with every call. `root_certificate` (PEM, or its file) or
    `tls` turns TLS on. `timeout_seconds` is the deadline of calls that neither run nor move a model; those
    that do have their own parameter and by default only the server's limit.
    """
