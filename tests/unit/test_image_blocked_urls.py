"""Images are fetched from public hosts and from nowhere else: 40 targets in 4 ways, and a canary that is never hit."""

import ipaddress
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from mlxgui_grpc.errors import UrlBlockedError
from mlxgui_grpc.images.addresses import Address, is_public
from mlxgui_grpc.images.fetch import Fetcher, connect
from mlxgui_grpc.images.urls import UrlPolicy, policy_of, read_hosts, read_target
from tests.support_images import Canary, answer, fetch, png, redirect, refused_fetch

LOOPBACK = ipaddress.ip_address("127.0.0.1")
PUBLIC = "93.184.215.14"
PICTURE = png()

# What each stands for, and the canary's port where a port is of no matter to the target.
TARGETS = [
    "http://127.0.0.1:{port}/",
    "http://127.1:{port}/",
    "http://2130706433:{port}/",
    "http://0x7f.1:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://0.0.0.0:{port}/",
    "http://localhost:{port}/",
    "http://localhost.:{port}/",
    "http://a.localhost:{port}/",
    "http://[::1]:{port}/",
    "http://[::]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/",
    "http://[64:ff9b::7f00:1]:{port}/",
    "http://[2002:7f00:1::]:{port}/",
    "http://[2001:0:7f00:1::80ff:fffe]:{port}/",
    "http://169.254.169.254:{port}/latest/meta-data/",
    "http://metadata.google.internal:{port}/",
    "http://metadata:{port}/",
    "http://[fd00:ec2::254]:{port}/",
    "http://10.0.0.1:{port}/",
    "http://172.16.0.1:{port}/",
    "http://192.168.0.1:{port}/",
    "http://100.64.0.1:{port}/",
    "http://192.0.0.1:{port}/",
    "http://198.18.0.1:{port}/",
    "http://224.0.0.1:{port}/",
    "http://240.0.0.1:{port}/",
    "http://255.255.255.255:{port}/",
    "http://[fe80::1%25lo]:{port}/",
    "http://[fc00::1]:{port}/",
    "http://93.184.215.14:8000/",
    "file:///etc/passwd",
    "ftp://127.0.0.1:{port}/",
    "gopher://127.0.0.1:{port}/",
    "data:image/png;base64,iVBORw0KGgo=",
    "http+unix://%2Frun%2Fmlxgui.sock/",
    "http://good.example@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}#good.example",
    "http://good.example\\@127.0.0.1:{port}/",
    "http://good.example:{port}/\r\nHost: 127.0.0.1",
    "http://127。0。0。1:{port}/",
    "http://good.example:0/",
    "http://good.example:65536/",
]
ADDRESSES = [
    "127.0.0.1",
    "127.255.255.254",
    "0.0.0.0",
    "169.254.169.254",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.0.1",
    "100.64.0.1",
    "192.0.0.1",
    "192.0.0.9",
    "192.0.2.1",
    "192.88.99.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "::7f00:1",
    "::ffff:127.0.0.1",
    "::ffff:7f00:1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a00:1",
    "64:ff9b:1::7f00:1",
    "2002:7f00:1::",
    "2002:c0a8:1::",
    "2001:0:7f00:1::80ff:fffe",
    "2001:db8::1",
    "100::1",
    "fd00:ec2::254",
    "fc00::1",
    "fe80::1",
    "fe80::1%lo",
    "fec0::1",
    "ff02::1",
]
"""Every range of the list, wrapped and bare, as a resolver answers."""

assert len(TARGETS) >= 40 and len(ADDRESSES) >= 40


class Network:
    """What the fetcher is given for a network: answers of a resolver, and every connection it wants, on record.

    A connection to a public address ends up at the canary: there is no public network here.
    """

    def __init__(self, canary: Canary, answers: Sequence[Sequence[str]] = ()) -> None:
        self.canary = canary
        self.answers = list(answers)
        self.resolved: list[str] = []
        self.connected: list[str] = []

    def resolve(self, host: str, port: int) -> Sequence[str]:
        self.resolved.append(host)
        return self.answers[min(len(self.resolved), len(self.answers)) - 1] if self.answers else [PUBLIC]

    def connect(self, address: Address, port: int, timeout_seconds: float) -> socket.socket:
        self.connected.append(str(address))
        return connect(LOOPBACK, self.canary.port, timeout_seconds)

    def fetcher(self, policy: UrlPolicy | None = None, **options: Any) -> Fetcher:
        ports = (80, 443, self.canary.port)
        return Fetcher(
            policy or UrlPolicy(ports=ports), resolve=self.resolve, connect=self.connect, **options
        )


@pytest.fixture
async def canary() -> AsyncIterator[Canary]:
    running = await Canary().start()
    yield running
    await running.stop()


async def test_no_url_leads_inside(canary: Canary) -> None:
    """With the port allowed, so that only the host, or the form of the URL, is in the way."""
    for target in TARGETS:
        network = Network(canary, [["127.0.0.1"]])
        error = await refused_fetch(network.fetcher(), target.format(port=canary.port))
        assert isinstance(error, UrlBlockedError), target
        assert network.connected == [], target
    assert canary.connection_count == 0


async def test_no_redirect_leads_inside(canary: Canary) -> None:
    """The one connection is the one to the public host that redirects."""
    for status in ("301 Moved Permanently", "302 Found", "303 See Other", "307 T", "308 P"):
        inside = redirect(f"http://127.0.0.1:{canary.port}/", status)
        canary.answers["/"] = inside
        error = await refused_fetch(Network(canary).fetcher(), "http://good.example/")
        assert isinstance(error, UrlBlockedError)
    for target in TARGETS:
        location = target.format(port=canary.port)
        if "\r" in location or not location.isascii():
            location = location.encode().decode("latin-1").replace("\r\n", "%0d%0a")
        canary.answers["/"] = redirect(location)
        before = canary.connection_count
        network = Network(canary, [[PUBLIC], ["127.0.0.1"]])
        error = await refused_fetch(network.fetcher(), "http://good.example/")
        assert isinstance(error, UrlBlockedError), target
        assert network.connected == [PUBLIC] and canary.connection_count == before + 1, target


@pytest.mark.parametrize("order", [lambda inside: [PUBLIC, inside], lambda inside: [inside, PUBLIC]])
async def test_no_mixed_answer_of_a_resolver_is_taken(
    canary: Canary, order: Callable[[str], list[str]]
) -> None:
    for inside in ADDRESSES:
        network = Network(canary, [order(inside)])
        error = await refused_fetch(network.fetcher(), "http://good.example/")
        assert isinstance(error, UrlBlockedError) and network.connected == [], inside
    assert canary.connection_count == 0


async def test_a_name_that_changes_its_meaning_after_the_check_changes_nothing(canary: Canary) -> None:
    """It is resolved once, and the connection goes to what was checked; a new request is checked anew."""
    canary.answers["/"] = answer(PICTURE)
    for inside in ADDRESSES:
        network = Network(canary, [[PUBLIC], [inside]])
        fetcher = network.fetcher()
        assert await fetch(fetcher, "http://good.example/") == PICTURE
        assert (network.resolved, network.connected) == (["good.example"], [PUBLIC])
        assert isinstance(await refused_fetch(fetcher, "http://good.example/"), UrlBlockedError)
        assert network.connected == [PUBLIC], inside
    assert canary.connection_count == len(ADDRESSES)


async def test_the_real_network_is_not_asked_for_what_is_inside(canary: Canary) -> None:
    """With the resolver and the connections of the system: the canary stays silent."""
    fetcher = Fetcher(UrlPolicy(ports=(80, 443, canary.port)))
    for target in TARGETS:
        await refused_fetch(fetcher, target.format(port=canary.port))
    assert canary.connection_count == 0


def test_addresses_are_what_they_are_wrapped_in() -> None:
    for inside in ADDRESSES:
        assert not is_public(ipaddress.ip_address(inside)), inside
    for outside in (PUBLIC, "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert is_public(ipaddress.ip_address(outside)), outside
    assert is_public(LOOPBACK, (LOOPBACK,)) and not is_public(ipaddress.ip_address("127.0.0.2"), (LOOPBACK,))


async def test_the_policy_is_off_or_a_list_of_hosts(canary: Canary) -> None:
    canary.answers["/"] = answer(PICTURE)
    network = Network(canary)
    fetcher = network.fetcher(policy_of("off", (80, 443), ()))
    assert "image_url_fetch is off" in (await refused_fetch(fetcher, "http://good.example/")).message
    fetcher.policy = policy_of("good.example, *.pictures.example", (80, 443), ())
    assert await fetch(fetcher, "http://GOOD.example./") == PICTURE
    assert await fetch(fetcher, "http://a.b.pictures.example/") == PICTURE
    for host in ("pictures.example", "evil-good.example", "good.example.evil.example", "xpictures.example"):
        assert "lists" in (await refused_fetch(fetcher, f"http://{host}/")).message
    canary.answers["/"] = redirect("http://other.example/")
    assert isinstance(await refused_fetch(fetcher, "http://good.example/"), UrlBlockedError)
    assert len(network.connected) == 3


def test_hosts_of_the_setting_have_one_spelling() -> None:
    assert read_hosts("B.example, bücher.example,*.A.example.,b.example,8.8.8.8") == (
        "b.example",
        "xn--bcher-kva.example",
        "*.a.example",
        "8.8.8.8",
    )
    for wrong in ("", ",", "on,off", "a.example:80", "http://a.example", "a b.example", "*.1.2.3.4", "*"):
        with pytest.raises(ValueError, match="host"):
            read_hosts(wrong)
    with pytest.raises(ValueError, match="1 to 64"):
        read_hosts(",".join(f"h{i}.example" for i in range(65)))


def test_a_target_has_one_spelling() -> None:
    target = read_target("HTTPS://Bücher.Example:443/ä b?q=1&r=%20", UrlPolicy())
    assert (target.scheme, target.host, target.port) == ("https", "xn--bcher-kva.example", 443)
    assert (target.path, target.host_header) == ("/%C3%A4%20b?q=1&r=%20", "xn--bcher-kva.example")
    target = read_target("http://[2606:4700::1111]:443", UrlPolicy())
    assert (target.path, target.host_header) == ("/", "[2606:4700::1111]:443")
