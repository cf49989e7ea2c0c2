"""The wall round a server on loopback: which hosts, origins and keys a request may come with. Pure."""

import hmac
import ipaddress
import re

from rest_bridge.config import BridgeConfig
from rest_bridge.errors import ApiError

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_WILDCARDS = frozenset({"0.0.0.0", "::", ""})
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
# A host of letters, digits, dots and hyphens, or an IPv6 address in brackets; then perhaps a port.
_HOST = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::\d{1,5})?", re.ASCII)


def is_loopback(host: str) -> bool:
    """Whether an address to bind to can be reached from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_name(text: str) -> str | None:
    """The host of a Host header, without its port and in its one spelling. None: it names no host."""
    match = _HOST.fullmatch(text)
    host = text if match is None else match["v6"] or match["name"]
    try:
        return ipaddress.ip_address(host).compressed
    except ValueError:
        return None if match is None or match["name"] is None else host.lower().removesuffix(".")


def check_host(header: str | None, config: BridgeConfig) -> None:
    """Refuses a name that is not ours: a page whose own name leads here (DNS rebinding) is stopped by this."""
    host = host_name(header or "")
    if host is None:
        raise ApiError("PERMISSION_DENIED", "The request has no Host header that names this server.")
    if host in _LOOPBACK_NAMES or host == host_name(config.host) or host in config.allowed_hosts:
        return
    # Bound to every address: each of them is ours, and no address in figures can be rebound.
    if config.host in _WILDCARDS and _is_address(host):
        return
    raise ApiError(
        "PERMISSION_DENIED",
        f"Host '{host}' is not allowed; start the server with --allowed-host {host} to allow it.",
    )


def check_origin(method: str, origin: str | None, host_header: str, config: BridgeConfig) -> None:
    """Refuses to change anything for a page of another origin. Programs that are no browser send no Origin."""
    if method in _SAFE_METHODS or origin is None or allowed_origin(origin, config) is not None:
        return
    host = host_header.lower()
    if origin.lower() in (f"http://{host}", f"https://{host}"):
        return
    raise ApiError(
        "PERMISSION_DENIED",
        f"Pages of origin '{origin[:128]}' may not use this server; start it with --cors-origin to allow them.",
    )


def allowed_origin(origin: str, config: BridgeConfig) -> str | None:
    """What Access-Control-Allow-Origin says to pages of `origin`. None: nothing, they are not allowed."""
    if "*" in config.cors_origins:
        return "*"
    return origin if origin.lower() in config.cors_origins else None


def check_key(authorization: str | None, x_api_key: str | None, config: BridgeConfig) -> None:
    """Refuses a missing or wrong key where one is required; in constant time."""
    if config.api_key is None:
        return
    scheme, _, token = (authorization or "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else x_api_key or ""
    # WSGI gives a header's bytes as latin-1; the environment's come as UTF-8, what is none of it as surrogates.
    key = config.api_key.encode("utf-8", "surrogateescape")
    if not hmac.compare_digest(given.encode("latin-1", "replace"), key):
        raise ApiError(
            "UNAUTHENTICATED",
            "An API key is required; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
            extra_headers={"WWW-Authenticate": "Bearer"},
        )


def cors_headers(origin: str | None, config: BridgeConfig) -> dict[str, str]:
    """Headers that let pages of an allowed origin read an answer. Credentials are never allowed."""
    if not config.cors_origins:
        return {}
    headers = {"Vary": "Origin"}
    allowed = None if origin is None else allowed_origin(origin, config)
    if allowed is not None:
        headers["Access-Control-Allow-Origin"] = allowed
        headers["Access-Control-Expose-Headers"] = "X-Request-Id, X-MLXGUI-Warnings, Retry-After, Location"
    return headers


def preflight_headers(
    origin: str | None, requested_headers: str | None, config: BridgeConfig
) -> dict[str, str]:
    """Headers of the answer to a browser's question whether a page may send a request."""
    headers = cors_headers(origin, config)
    if "Access-Control-Allow-Origin" in headers:
        headers["Access-Control-Allow-Methods"] = "GET, POST, PUT, DELETE"
        headers["Access-Control-Allow-Headers"] = (
            requested_headers or "Authorization, Content-Type, X-Api-Key, X-Request-Id"
        )
        headers["Access-Control-Allow-Private-Network"] = "true"
        headers["Access-Control-Max-Age"] = "600"
    return headers


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
