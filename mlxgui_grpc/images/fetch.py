"""Fetches images from the public network, and from nowhere else, on threads of its own.

Each host is resolved once, every one of its addresses is checked, and the connection goes to an address that was
checked: a name that means something else a moment later changes nothing. Redirects are followed by hand, with the whole
check again. No proxy of the environment is asked.
"""

import asyncio
import contextlib
import functools
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence

from mlxgui_grpc import __version__
from mlxgui_grpc.errors import UrlBlockedError, UrlFetchFailedError
from mlxgui_grpc.images.addresses import Address, is_public
from mlxgui_grpc.images.formats import HEAD_BYTES, sniff
from mlxgui_grpc.images.sources import MAX_IMAGE_BYTES, MAX_IMAGES_BYTES, images_too_large
from mlxgui_grpc.images.urls import BlockedError, Target, UrlPolicy, read_target, redirected

MAX_FETCHES = 8
"""At once, in the whole server; more wait."""
MAX_REDIRECTS = 3
TIME_LIMIT_SECONDS = 10.0
"""From the first look at a URL to the last byte, redirects included."""
MAX_ADDRESSES = 4
"""Of a host that are tried."""
CONNECT_SECONDS = 3.0
"""Until the next address is tried."""

_CHUNK_BYTES = 64 * 1024
_REDIRECTS = (301, 302, 303, 307, 308)

Resolve = Callable[[str, int], Sequence[str]]
"""The addresses of a host, as text; raises OSError. Called on a thread."""
Connect = Callable[[Address, int, float], socket.socket]
"""Connect to an address and port within so many seconds; raises OSError. Called on a thread."""


class FetchedBytes:
    """Bytes of all images of one request, sent and fetched, which has a limit. Any thread may add."""

    def __init__(self, byte_count: int = 0) -> None:
        self._byte_count = byte_count
        self._lock = threading.Lock()

    def add(self, byte_count: int, field: str) -> None:
        """Raises PayloadTooLargeError, which names the field, when there are too many."""
        with self._lock:
            self._byte_count += byte_count
            if self._byte_count > MAX_IMAGES_BYTES:
                raise images_too_large(field)


def resolve(host: str, port: int) -> Sequence[str]:
    """Ask the system."""
    return [str(answer[4][0]) for answer in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def connect(address: Address, port: int, timeout_seconds: float) -> socket.socket:
    """A TCP connection."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_seconds)
        connection.connect((str(address), port))
    except BaseException:
        connection.close()
        raise
    return connection


class Fetcher:
    """Fetches URLs. Use on the event loop only; nothing blocks it."""

    def __init__(
        self,
        policy: UrlPolicy,
        *,
        resolve: Resolve = resolve,
        connect: Connect = connect,
        tls_context: Callable[[], ssl.SSLContext] = ssl.create_default_context,
        time_limit_seconds: float = TIME_LIMIT_SECONDS,
    ) -> None:
        self.policy = policy
        """Counts for fetches that begin from now on."""
        self._resolve = resolve
        self._connect = connect
        # Made on the first thread that needs it: it reads some hundred certificates.
        self._tls_context = functools.cache(tls_context)
        self._time_limit_seconds = time_limit_seconds
        self._turns = asyncio.Semaphore(MAX_FETCHES)

    async def fetch(self, url: str, field: str, fetched: FetchedBytes) -> bytes:
        """The bytes that are at a URL, which begin as an image does.

        Raises UrlBlockedError or UrlFetchFailedError, which tell nothing of what was there, and PayloadTooLargeError
        when the request's images are too many bytes together.
        """
        loop = asyncio.get_running_loop()
        await self._turns.acquire()
        # The thread, which a resolver can hold up for longer than we wait, gives the turn back.
        transfer = _Transfer(
            url,
            field,
            fetched,
            self.policy,
            self._resolve,
            self._connect,
            self._tls_context,
            time.monotonic() + self._time_limit_seconds,
        )
        answer: asyncio.Future[bytes] = loop.create_future()

        def finish(body: bytes, error: Exception | None) -> None:
            self._turns.release()
            if answer.done():
                return
            if error is None:
                answer.set_result(body)
            else:
                answer.set_exception(error)

        def work() -> None:
            body, failure = b"", None
            try:
                body = transfer.run()
            except Exception as error:
                failure = error
            with contextlib.suppress(RuntimeError):  # The loop has ended meanwhile.
                loop.call_soon_threadsafe(finish, body, failure)

        try:
            threading.Thread(target=work, name="image fetch", daemon=True).start()
        except RuntimeError:  # The system has no thread for us.
            self._turns.release()
            raise
        try:
            async with asyncio.timeout(self._time_limit_seconds):
                return await answer
        except (BlockedError, TimeoutError, OSError, http.client.HTTPException, ValueError) as error:
            raise _outcome(error, field, self.policy) from None
        finally:
            transfer.abort()


def _outcome(error: Exception, field: str, policy: UrlPolicy) -> UrlBlockedError | UrlFetchFailedError:
    if not isinstance(error, BlockedError):
        return UrlFetchFailedError(
            f"{field} could not be fetched: it must lead to an image of at most {MAX_IMAGE_BYTES >> 20} MiB within "
            f"{TIME_LIMIT_SECONDS:g} seconds; or send its bytes",
            field=field,
        )
    if not policy.is_on:
        words = "the setting image_url_fetch is off"
    elif policy.hosts:
        words = "only public hosts that the setting image_url_fetch lists are fetched from"
    else:
        ports = " or ".join(map(str, policy.ports))
        words = (
            f"only http and https URLs of public hosts, on port {ports}, without user name or fragment, are"
        )
    return UrlBlockedError(f"{field} is not fetched: {words}; send the image's bytes", field=field)


class _Transfer:
    """One fetch, on its thread; only `abort` is called from elsewhere."""

    def __init__(
        self,
        url: str,
        field: str,
        fetched: FetchedBytes,
        policy: UrlPolicy,
        resolve: Resolve,
        connect: Connect,
        tls_context: Callable[[], ssl.SSLContext],
        deadline: float,
    ) -> None:
        self._url = url
        self._field = field
        self._fetched = fetched
        self._policy = policy
        self._resolve = resolve
        self._connect = connect
        self._tls_context = tls_context
        self._deadline = deadline
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._is_aborted = False

    def abort(self) -> None:
        """Have whatever the thread waits for on its connection fail now."""
        with self._lock:
            self._is_aborted = True
            if self._connection is not None:
                with contextlib.suppress(OSError):
                    # Of the socket under TLS, whose own state belongs to the thread.
                    socket.socket.shutdown(self._connection, socket.SHUT_RDWR)

    def run(self) -> bytes:
        """Raises BlockedError, OSError, HTTPException, ValueError or PayloadTooLargeError."""
        url = self._url
        target = read_target(url, self._policy)
        for _ in range(MAX_REDIRECTS + 1):
            answer = self._get(target)
            if isinstance(answer, bytes):
                return answer
            url, target = redirected(target, url, answer, self._policy)
        raise ValueError("too many redirects")

    def _get(self, target: Target) -> bytes | str:
        """What is there, or where a redirect leads to."""
        connection = self._connected(target)
        try:
            with self._lock:
                self._connection = connection
            if target.scheme == "https":
                connection = self._tls_context().wrap_socket(
                    connection, server_hostname=target.host, do_handshake_on_connect=False
                )
                with self._lock:
                    self._connection = connection
            connection.settimeout(self._left_seconds())
            if isinstance(connection, ssl.SSLSocket):
                connection.do_handshake()
            return self._exchange(connection, target)
        finally:
            with self._lock:
                self._connection = None
            connection.close()

    def _connected(self, target: Target) -> socket.socket:
        failure: OSError | None = None
        for address in self._addresses(target)[:MAX_ADDRESSES]:
            try:
                return self._connect(address, target.port, min(CONNECT_SECONDS, self._left_seconds()))
            except OSError as error:
                failure = error
        raise failure or OSError("no address")

    def _addresses(self, target: Target) -> list[Address]:
        """Those of the host, all of them public."""
        if target.address is not None:
            addresses = [target.address]
        else:
            answers = self._resolve(target.host, target.port)
            addresses = [ipaddress.ip_address(answer) for answer in dict.fromkeys(answers)]
        if not all(is_public(address, self._policy.trusted_addresses) for address in addresses):
            raise BlockedError
        return addresses

    def _exchange(self, connection: socket.socket, target: Target) -> bytes | str:
        exchange = http.client.HTTPConnection(target.host, target.port)
        exchange.sock = connection
        exchange.putrequest("GET", target.path, skip_host=True, skip_accept_encoding=True)
        exchange.putheader("Host", target.host_header)
        exchange.putheader("User-Agent", f"mlxgui-grpc/{__version__}")
        exchange.putheader("Accept", "image/png, image/jpeg, image/webp, image/gif")
        exchange.putheader("Accept-Encoding", "identity")
        exchange.putheader("Connection", "close")
        exchange.endheaders()
        with exchange.getresponse() as response:
            if response.status in _REDIRECTS and (location := response.headers["Location"]):
                return str(location)
            encoding = response.headers.get("Content-Encoding", "identity")
            if response.status != 200 or encoding.strip().lower() != "identity":
                raise ValueError("no image")
            return self._body(response)

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        if (response.length or 0) > MAX_IMAGE_BYTES:
            raise ValueError("too large")
        body = bytearray()
        while chunk := response.read(_CHUNK_BYTES):
            if not body and sniff(chunk[:HEAD_BYTES]) is None:
                raise ValueError("no image")
            body += chunk
            if len(body) > MAX_IMAGE_BYTES:
                raise ValueError("too large")
            self._fetched.add(len(chunk), self._field)
            self._left_seconds()
        if response.length or not body:
            raise ValueError("cut short")
        return bytes(body)

    def _left_seconds(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0 or self._is_aborted:
            raise TimeoutError
        return left
