"""What is fetched of an image URL, and what is told of that which is not."""

import asyncio
import datetime
import ipaddress
import ssl
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mlxgui_grpc.errors import PayloadTooLargeError, UrlBlockedError, UrlFetchFailedError
from mlxgui_grpc.images.fetch import FetchedBytes, Fetcher
from mlxgui_grpc.images.sources import MAX_IMAGE_BYTES, MAX_IMAGES_BYTES
from mlxgui_grpc.images.urls import UrlPolicy
from tests.support_images import FIELD, Canary, answer, fetch, png, redirect, refused_fetch

LOOPBACK = ipaddress.ip_address("127.0.0.1")
PICTURE = png()


@pytest.fixture
async def canary() -> AsyncIterator[Canary]:
    running = await Canary().start()
    yield running
    await running.stop()


@pytest.fixture
def open_fetcher(canary: Canary) -> Fetcher:
    """Takes pictures from the canary, at its true address."""
    return Fetcher(
        UrlPolicy(ports=(canary.port,), trusted_addresses=(LOOPBACK,)),
        resolve=lambda host, port: ["127.0.0.1"],
    )


async def test_a_picture_is_fetched_through_redirects(canary: Canary, open_fetcher: Fetcher) -> None:
    """By a name, three hops on, with what a picture needs in the request and nothing more."""
    canary.answers = {
        "/1": redirect("/2"),
        "/2": redirect(f"http://other.example:{canary.port}/3?a=b"),
        "/3?a=b": redirect("4", "308 Permanent Redirect"),
        "/4": answer(PICTURE),
        "/0": redirect("/1"),
    }
    assert await fetch(open_fetcher, f"http://pictures.example:{canary.port}/1") == PICTURE
    assert [lines[0] for lines in canary.requests][-1] == "GET /4 HTTP/1.1"
    headers = {line.partition(":")[0].lower(): line.partition(": ")[2] for line in canary.requests[-1][1:-2]}
    assert headers["host"] == f"other.example:{canary.port}" and headers["accept-encoding"] == "identity"
    assert set(headers) == {"host", "user-agent", "accept", "accept-encoding", "connection"}
    assert await fetch(open_fetcher, f"http://127.0.0.1:{canary.port}/1") == PICTURE
    assert isinstance(
        await refused_fetch(open_fetcher, f"http://a.example:{canary.port}/0"), UrlFetchFailedError
    )  # The fourth.


async def test_proxies_of_the_environment_are_not_asked(
    canary: Canary, open_fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    canary.answers["/"] = answer(PICTURE)
    assert await fetch(open_fetcher, f"http://pictures.example:{canary.port}/") == PICTURE


LARGE = PICTURE + bytes(MAX_IMAGE_BYTES + 1 - len(PICTURE))


@pytest.mark.parametrize(
    "response",
    [
        answer(b"secret", "404 Not Found"),
        answer(PICTURE, "206 Partial Content"),
        answer(PICTURE, "500 Internal Server Error"),
        answer(status="304 Not Modified"),
        answer(status="302 Found"),
        answer(b"<html>secret</html>", Content_Type="image/png"),
        answer(b"<svg xmlns='http://www.w3.org/2000/svg'/>", Content_Type="image/svg+xml"),
        answer(b"II*\0" + bytes(100), Content_Type="image/tiff"),
        answer(b""),
        answer(PICTURE, Content_Encoding="gzip"),
        answer(PICTURE, Content_Length=str(len(PICTURE) + 1)),
        answer(PICTURE, Content_Length=str(MAX_IMAGE_BYTES + 1)),
        answer(LARGE, Content_Length="-1"),
        answer(b"zz\r\n", Transfer_Encoding="chunked"),
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
        b"HTTP/1.1 200 " + b"x" * 100_000,
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"",
    ],
    ids=lambda response: response[9:40].decode("latin-1"),
)
async def test_nothing_is_told_of_what_was_there(
    canary: Canary, open_fetcher: Fetcher, response: bytes
) -> None:
    """One sentence for all that goes wrong: no status, header, length or word of it."""
    canary.answers["/"] = response
    error = await refused_fetch(open_fetcher, f"http://pictures.example:{canary.port}/")
    assert isinstance(error, UrlFetchFailedError)
    assert error.message == (
        f"{FIELD} could not be fetched: it must lead to an image of at most 20 MiB within 10 seconds; "
        "or send its bytes"
    )
    assert not error.metadata


async def test_a_body_of_the_largest_size_is_taken(canary: Canary, open_fetcher: Fetcher) -> None:
    """20 MiB without a length; one byte more is not, as above."""
    canary.answers["/"] = b"HTTP/1.1 200 OK\r\n\r\n" + LARGE[:-1]
    assert len(await fetch(open_fetcher, f"http://pictures.example:{canary.port}/")) == MAX_IMAGE_BYTES


async def test_all_images_of_a_request_have_one_limit(canary: Canary, open_fetcher: Fetcher) -> None:
    canary.answers["/"] = answer(PICTURE)
    url, fetched = f"http://pictures.example:{canary.port}/", FetchedBytes(MAX_IMAGES_BYTES - len(PICTURE))
    assert await open_fetcher.fetch(url, FIELD, fetched) == PICTURE
    with pytest.raises(PayloadTooLargeError, match="48 MiB in all") as caught:
        await open_fetcher.fetch(url, FIELD, fetched)
    assert caught.value.field == FIELD


@pytest.mark.parametrize(
    ("path", "head", "endless"),
    [
        ("/silent", b"", b""),
        ("/silent", answer(PICTURE, Content_Length="9999"), b""),
        ("/endless", b"HTTP/1.1 200 OK\r\n", b"a"),
        ("/endless", b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        ("/endless", answer(PICTURE, Content_Length="99999999"[:7]), b"\0"),
    ],
    ids=["silent", "silent body", "endless header", "endless continue", "slow body"],
)
async def test_what_takes_too_long_is_left(canary: Canary, path: str, head: bytes, endless: bytes) -> None:
    """However it takes its time; the connection is closed and the turn given back."""
    canary.answers[path], canary.endless = head, endless
    policy = UrlPolicy(ports=(canary.port,), trusted_addresses=(LOOPBACK,))
    fetcher = Fetcher(policy, time_limit_seconds=0.2)
    error = await refused_fetch(fetcher, f"http://127.0.0.1:{canary.port}{path}")
    assert isinstance(error, UrlFetchFailedError)
    await left_alone(canary)


async def test_an_endless_body_is_counted(canary: Canary, open_fetcher: Fetcher) -> None:
    canary.answers["/endless"] = b"HTTP/1.1 200 OK\r\n\r\n" + PICTURE
    canary.endless = bytes(1024 * 1024)
    error = await refused_fetch(open_fetcher, f"http://pictures.example:{canary.port}/endless")
    assert isinstance(error, UrlFetchFailedError)
    await left_alone(canary)


async def test_a_caller_that_leaves_ends_its_fetch(canary: Canary, open_fetcher: Fetcher) -> None:
    task = asyncio.create_task(fetch(open_fetcher, f"http://pictures.example:{canary.port}/silent"))
    canary.answers["/silent"] = b""
    async with asyncio.timeout(30):
        while not canary.requests:
            await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await left_alone(canary)


async def left_alone(canary: Canary) -> None:
    """Return when nobody is connected and no thread is left of a fetch."""
    async with asyncio.timeout(30):
        while not canary.is_left or any(each.name == "image fetch" for each in threading.enumerate()):
            await asyncio.sleep(0.005)


# TLS.


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for secure.example, signed by itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "secure.example")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("secure.example")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path


async def test_tls_is_with_the_name_and_never_left_by_a_redirect(canary: Canary, certificate: Path) -> None:
    """The certificate is checked against the URL's name, though the connection goes to an address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    canary.answers["/"] = answer(PICTURE)
    secure = await Canary().start(context)
    secure.answers = {
        "/": answer(PICTURE),
        "/same": redirect("/"),
        "/plain": redirect(f"http://pictures.example:{canary.port}/"),
    }
    fetcher = Fetcher(
        UrlPolicy(ports=(secure.port, canary.port), trusted_addresses=(LOOPBACK,)),
        resolve=lambda host, port: ["127.0.0.1"],
        tls_context=lambda: ssl.create_default_context(cafile=str(certificate)),
    )
    try:
        assert await fetch(fetcher, f"https://secure.example:{secure.port}/same") == PICTURE
        canary.answers["/up"] = redirect(f"https://secure.example:{secure.port}/")
        assert await fetch(fetcher, f"http://pictures.example:{canary.port}/up") == PICTURE
        before = canary.connection_count
        error = await refused_fetch(fetcher, f"https://secure.example:{secure.port}/plain")
        assert isinstance(error, UrlBlockedError) and canary.connection_count == before
        count = len(secure.requests)
        for host in ("other.example", "127.0.0.1"):
            error = await refused_fetch(fetcher, f"https://{host}:{secure.port}/")
            assert isinstance(error, UrlFetchFailedError)
        assert len(secure.requests) == count  # The handshake failed.
    finally:
        await secure.stop()
