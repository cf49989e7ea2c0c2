"""How the bridge reads JSON: strictly, quickly, and naming what is wrong."""

import re

import pytest

from rest_bridge.errors import ApiError
from rest_bridge.json_body import Fields, parse_object
from rest_bridge.keep_alive import read_keep_alive


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"", "The body is empty"),
        (b" \n", "The body is empty"),
        (b"{", "not JSON"),
        (b"[1]", "must be a JSON object, not an array"),
        (b"null", "must be a JSON object, not null"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 10_000_000, "too many arrays"),
        (b'{"a":' * 500_000, "deeper than 64"),
        (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "deeper than 64"),
        (b'{"a":' + b"1" * 5000 + b"}", "number that cannot be read"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(raw: bytes, sentence: str) -> None:
    """Whatever is sent, the answer is a 400 that says what is wrong with it."""
    with pytest.raises(ApiError, match=re.escape(sentence)) as caught:
        parse_object(raw)
    assert caught.value.http_status == 400


def test_nesting_up_to_the_limit_is_read() -> None:
    """64 levels are allowed; the object itself is the first."""
    body = parse_object(b'{"a":' + b"[" * 63 + b"]" * 63 + b"}")
    assert list(body) == ["a"]


def test_duplicate_keys_are_refused() -> None:
    """By name, at any depth: whichever of two is taken, the caller may have meant the other."""
    with pytest.raises(ApiError, match="`a` is there twice"):
        parse_object(b'{"b":{"a":1,"a":2}}')


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b'{"x":NaN}', "`x` must be finite"),
        (b'{"x":-Infinity}', "`x` must be finite"),
        (b'{"x":1e999}', "`x` must be finite"),
        (b'{"x":1e300}', "`x` is out of range"),
        (b'{"x":' + b"9" * 400 + b"}", "`x` is out of range"),
        (b'{"x":"1"}', "`x` must be a number, not a string"),
        (b'{"x":true}', "`x` must be a number, not a boolean"),
        (b'{"x":[]}', "`x` must be a number, not an array"),
    ],
)
def test_a_wrong_number_is_named(raw: bytes, sentence: str) -> None:
    """Every number that a float32 cannot hold is refused under its field's name."""
    with pytest.raises(ApiError, match=re.escape(sentence)) as caught:
        Fields(parse_object(raw)).number("x")
    assert caught.value.param == "x"


@pytest.mark.parametrize("value", [1.5, "1", True, 2**31, -(2**31) - 1, {}, float("nan")])
def test_a_wrong_integer_is_named(value: object) -> None:
    """An integer is whole, fits 32 bits, and is no boolean."""
    with pytest.raises(ApiError) as caught:
        Fields({"x": value}, "outer").integer("x")
    assert caught.value.param == "outer.x"


def test_null_is_the_same_as_absent() -> None:
    """OpenAI's clients send null for what is not set."""
    fields = Fields({"a": None, "b": None})
    assert fields.text("a") is None
    assert fields.integer("a") is None
    assert fields.unread() == []


def test_half_a_surrogate_pair_is_refused() -> None:
    """It is valid JSON but no text that could be sent on."""
    with pytest.raises(ApiError, match="surrogate"):
        Fields(parse_object(rb'{"x":"a\ud800"}')).text("x")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0.0),
        (-1, -1.0),
        ("-1", -1.0),
        (300, 300.0),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("250ms", 0.25),
        ("90", 90.0),
    ],
)
def test_keep_alive_is_seconds_or_a_span(value: object, seconds: float) -> None:
    """The forms that Ollama's clients send."""
    assert read_keep_alive(value).ToTimedelta().total_seconds() == seconds


@pytest.mark.parametrize("value", ["", "5 minutes", "m", True, [], float("nan"), 1e18, "5m3"])
def test_another_keep_alive_is_refused(value: object) -> None:
    """Nothing is guessed."""
    with pytest.raises(ApiError) as caught:
        read_keep_alive(value)
    assert caught.value.param == "keep_alive"
