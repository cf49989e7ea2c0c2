"""Which requests get past the bridge's wall."""

import pytest

from rest_bridge import wall
from rest_bridge.config import BridgeConfig
from rest_bridge.errors import ApiError

LOOPBACK = BridgeConfig("unix:/s")
NAMED = BridgeConfig("unix:/s", allowed_hosts=frozenset({"box.local"}))
EVERYWHERE = BridgeConfig("unix:/s", host="0.0.0.0", api_key="k")
PAGES = BridgeConfig("unix:/s", cors_origins=frozenset({"http://app.test"}))
ANY_PAGE = BridgeConfig("unix:/s", cors_origins=frozenset({"*"}))


@pytest.mark.parametrize(
    ("header", "config"),
    [
        ("localhost", LOOPBACK),
        ("LOCALHOST:8000", LOOPBACK),
        ("127.0.0.1:1", LOOPBACK),
        ("[::1]:8000", LOOPBACK),
        ("localhost.:80", LOOPBACK),
        ("[0:0:0:0:0:0:0:1]:8000", LOOPBACK),
        ("Box.Local:8000", NAMED),
        ("192.168.1.5:8000", EVERYWHERE),
        ("[fe80::1]", EVERYWHERE),
    ],
)
def test_our_own_names_pass(header: str, config: BridgeConfig) -> None:
    """Loopback, what was allowed, and any address in figures where every address is ours."""
    wall.check_host(header, config)


@pytest.mark.parametrize(
    ("header", "config"),
    [
        (None, LOOPBACK),
        ("", LOOPBACK),
        ("evil.test", LOOPBACK),
        ("evil.test", EVERYWHERE),
        ("localhost.evil.test", LOOPBACK),
        ("127.0.0.1.evil.test", LOOPBACK),
        ("192.168.1.5", LOOPBACK),
        ("localhost@evil.test", LOOPBACK),
        ("localhost, evil.test", LOOPBACK),
        ("localhost:80:80", LOOPBACK),
        ("[::1", LOOPBACK),
        ("box.local", LOOPBACK),
    ],
)
def test_another_name_is_refused(header: str | None, config: BridgeConfig) -> None:
    """A page whose name was rebound to this machine sends its own name."""
    with pytest.raises(ApiError) as caught:
        wall.check_host(header, config)
    assert caught.value.http_status == 403


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.test",
        "null",
        "http://localhost:3000",
        "http://localhost:8000.evil.test",
        "file://",
        "http://[",
    ],
)
def test_a_page_of_another_origin_changes_nothing(method: str, origin: str) -> None:
    """Another port is another origin."""
    with pytest.raises(ApiError) as caught:
        wall.check_origin(method, origin, "localhost:8000", LOOPBACK)
    assert caught.value.http_status == 403


def test_our_own_pages_programs_and_allowed_pages_may() -> None:
    """Programs that are no browser send no Origin."""
    wall.check_origin("POST", None, "localhost:8000", LOOPBACK)
    wall.check_origin("POST", "http://localhost:8000", "localhost:8000", LOOPBACK)
    wall.check_origin("POST", "http://app.test", "localhost:8000", PAGES)
    wall.check_origin("DELETE", "http://whoever.test", "localhost:8000", ANY_PAGE)
    wall.check_origin("GET", "http://evil.test", "localhost:8000", LOOPBACK)


def test_cors_is_off_unless_it_is_said() -> None:
    """And no answer ever allows credentials."""
    assert wall.cors_headers("http://app.test", LOOPBACK) == {}
    assert wall.cors_headers("http://evil.test", PAGES) == {"Vary": "Origin"}
    assert wall.cors_headers("http://app.test", PAGES)["Access-Control-Allow-Origin"] == "http://app.test"
    assert wall.cors_headers("http://app.test", ANY_PAGE)["Access-Control-Allow-Origin"] == "*"
    for config in (PAGES, ANY_PAGE):
        headers = wall.preflight_headers("http://app.test", "x-api-key", config)
        assert headers["Access-Control-Allow-Headers"] == "x-api-key"
        assert "Access-Control-Allow-Credentials" not in headers
    assert "Access-Control-Allow-Methods" not in wall.preflight_headers("http://evil.test", None, PAGES)


def test_any_key_is_accepted_until_one_is_required() -> None:
    """As documented: any key, or none."""
    wall.check_key(None, None, LOOPBACK)
    wall.check_key("Bearer sk-whatever", None, LOOPBACK)
    wall.check_key("Bearer k", None, EVERYWHERE)
    wall.check_key("bearer  k", None, EVERYWHERE)
    wall.check_key(None, "k", EVERYWHERE)


@pytest.mark.parametrize(
    ("authorization", "x_api_key"),
    [
        (None, None),
        ("Bearer", None),
        ("Bearer K", None),
        ("Basic k", None),
        (None, "kk"),
        ("Bearer é", None),
        ("Bearer x", "k"),
    ],
)
def test_a_required_key_must_be_the_key(authorization: str | None, x_api_key: str | None) -> None:
    """A wrong bearer token is not mended by another header."""
    with pytest.raises(ApiError) as caught:
        wall.check_key(authorization, x_api_key, EVERYWHERE)
    assert caught.value.http_status == 401
    assert caught.value.headers()["WWW-Authenticate"] == "Bearer"


def test_a_key_may_have_any_characters() -> None:
    """A header's bytes come as latin-1."""
    config = BridgeConfig("unix:/s", api_key="schlüssel")
    wall.check_key(None, "schlüssel".encode().decode("latin-1"), config)
    with pytest.raises(ApiError):
        wall.check_key(None, "schlussel", config)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Box.Local:8000", "box.local"),
        ("box.local.", "box.local"),
        ("[FE80:0::1]:80", "fe80::1"),
        ("fe80::1", "fe80::1"),
        ("*", None),
        ("http://box.local", None),
        ("[1.2.3]", None),
    ],
)
def test_a_host_has_one_spelling(text: str, name: str | None) -> None:
    """In what is allowed as in what comes."""
    assert wall.host_name(text) == name


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("127.9.9.9", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("box.local", False),
    ],
)
def test_what_can_be_reached_from_other_machines(host: str, loopback: bool) -> None:
    """A name that is not loopback's own counts as reachable."""
    assert wall.is_loopback(host) is loopback
