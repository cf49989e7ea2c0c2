"""Which URLs may be fetched, by the look of them: the addresses of their hosts are checked where they are known."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from mlxgui_grpc.images.addresses import Address

ON, OFF = "on", "off"
DEFAULT_PORTS = (80, 443)
MAX_HOSTS = 64

_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_UNWANTED = re.compile(r"[\x00-\x1f\x7f\\#]")
_BRACKETED = re.compile(r"\[([^\]]*)\](?::[0-9]*)?")
_NO_HOST = re.compile(r"[/@?#\\\s]")
_MAX_NAME_CHARACTERS = 253
_LOCAL_NAMES = ("localhost", "localdomain", "local", "internal", "home.arpa")
"""Ends of names that are of this machine or its network, whatever a resolver says."""
_SAFE_IN_PATH = "!$%&'()*+,/:;=?@[]~"
_SCHEME_PORTS = {"http": 80, "https": 443}


class BlockedError(Exception):
    """A URL that is not fetched."""


@dataclass(frozen=True, slots=True)
class UrlPolicy:
    """Which URLs may be fetched."""

    is_on: bool = True
    hosts: tuple[str, ...] = ()
    """Only these, where there are some; `*.example.com` is every host below example.com."""
    ports: tuple[int, ...] = DEFAULT_PORTS
    trusted_addresses: tuple[Address, ...] = ()
    """Addresses that may be connected to though they are not public: what answers there is open to every client that
    may send an image URL."""

    def allows_host(self, host: str) -> bool:
        """Whether the list of hosts, if there is one, has this one on it."""
        if not self.hosts:
            return True
        return any(
            host.endswith(allowed[1:]) if allowed.startswith("*.") else host == allowed
            for allowed in self.hosts
        )


@dataclass(frozen=True, slots=True)
class Target:
    """What a URL says, in the one spelling that is used from here on."""

    scheme: str
    host: str
    """A name in ASCII, or an address without brackets."""
    address: Address | None
    """The host, where it is an address."""
    port: int
    path: str
    """With its query."""

    @property
    def host_header(self) -> str:
        """As HTTP wants to have it."""
        host = f"[{self.host}]" if isinstance(self.address, IPv6Address) else self.host
        return host if self.port == _SCHEME_PORTS[self.scheme] else f"{host}:{self.port}"


def read_target(url: str, policy: UrlPolicy) -> Target:
    """The target of a URL; raises BlockedError where the policy or the form of the URL forbids it."""
    if not policy.is_on or _UNWANTED.search(url):
        raise BlockedError
    try:
        parts = urlsplit(url)
        scheme, port = parts.scheme, parts.port
    except ValueError:
        raise BlockedError from None
    if scheme not in _SCHEME_PORTS or "@" in parts.netloc:
        raise BlockedError
    port = _SCHEME_PORTS[scheme] if port is None else port
    host, address = _host(parts)
    if port not in policy.ports or not policy.allows_host(host):
        raise BlockedError
    path = quote(parts.path or "/", safe=_SAFE_IN_PATH)
    if parts.query:
        path += "?" + quote(parts.query, safe=_SAFE_IN_PATH)
    return Target(scheme, host, address, port, path)


def redirected(target: Target, url: str, location: str, policy: UrlPolicy) -> tuple[str, Target]:
    """Where a redirect from `url`, which is `target`, leads to; raises BlockedError as for any URL."""
    if _UNWANTED.search(location):  # `urljoin` would leave some of it out.
        raise BlockedError
    try:
        joined = urljoin(url, location)
    except ValueError:
        raise BlockedError from None
    following = read_target(joined, policy)
    if (target.scheme, following.scheme) == ("https", "http"):
        raise BlockedError
    return joined, following


def read_hosts(setting: str) -> tuple[str, ...]:
    """The hosts of a setting that is neither `on` nor `off`, each in its one spelling; raises ValueError in words."""
    hosts = []
    for word in filter(None, (part.strip() for part in setting.split(","))):
        below = "*." if word.startswith("*.") else ""
        try:
            parts = urlsplit(f"http://{word[len(below) :]}")
            name, address = _host(parts)
            if parts.port is not None or _NO_HOST.search(word) or (below and address is not None):
                raise BlockedError
        except (BlockedError, ValueError):
            raise ValueError(f"'{word[:80]}' is no host that can be fetched from") from None
        hosts.append(below + name)
    if not 0 < len(hosts) <= MAX_HOSTS:
        raise ValueError(f"it must name 1 to {MAX_HOSTS} hosts")
    return tuple(dict.fromkeys(hosts))


def policy_of(setting: str, ports: Sequence[int], trusted_addresses: Sequence[Address]) -> UrlPolicy:
    """The policy that a value of the setting `image_url_fetch` means; raises ValueError in words."""
    word = setting.strip().lower()
    hosts = () if word in (ON, OFF) else read_hosts(setting)
    return UrlPolicy(word != OFF, hosts, tuple(ports), tuple(trusted_addresses))


def _host(parts: SplitResult) -> tuple[str, Address | None]:
    """The host in its one spelling, and its address where it is one; raises BlockedError."""
    text = parts.netloc.rpartition("@")[2]
    if text.startswith("["):
        bracketed = _BRACKETED.fullmatch(text)
        try:
            # With its zone, if it has one: it is not public then.
            address = IPv6Address(bracketed[1] if bracketed else "")
        except ValueError:
            raise BlockedError from None
        return str(address), address
    try:
        # IDNA also makes one full stop of every sort, and plain digits of wide ones.
        name = text.rpartition(":")[0] if ":" in text else text
        name = name.encode("idna").decode("ascii").lower().removesuffix(".")
    except UnicodeError:
        raise BlockedError from None
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return name, IPv4Address(name)  # Not so `127.1`, `0177.0.0.1`, `0x7f.1`: they are nobody's habit.
        except ValueError:
            raise BlockedError from None
    if len(name) > _MAX_NAME_CHARACTERS or len(labels) < 2 or not all(map(_LABEL.fullmatch, labels)):
        raise BlockedError
    if any(name == local or name.endswith(f".{local}") for local in _LOCAL_NAMES):
        raise BlockedError
    return name, None
