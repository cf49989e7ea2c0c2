"""Query strings are read as strictly as bodies."""

import pytest

from rest_bridge.errors import ApiError
from rest_bridge.query import Query


def test_texts_are_read_as_what_is_asked_for() -> None:
    query = Query(
        [("priority", "-10"), ("force", "TRUE"), ("wait", "0"), ("max_memory_gb", "8.5"), ("query", "")]
    )
    assert query.integer("priority") == -10
    assert (query.boolean("force"), query.boolean("wait")) == (True, False)
    assert query.number("max_memory_gb") == 8.5
    assert query.text("query") == ""
    assert query.integer("limit") is None
    query.refuse_unread()


@pytest.mark.parametrize(
    "text",
    ["", "x", "1.5", "1e3", "0x10", "1_000", "٣", " 5", "5 ", "--5", "true", "null", "9" * 100, "9" * 20],
)
def test_what_is_no_integer_is_refused_by_name(text: str) -> None:
    """Also what int() would take: blanks, underscores and the digits of other scripts."""
    with pytest.raises(ApiError) as caught:
        Query([("priority", text)]).integer("priority")
    assert (caught.value.http_status, caught.value.param) == (400, "priority")
    assert len(caught.value.message) < 128


@pytest.mark.parametrize(
    "text", ["", "x", "nan", "inf", "-Infinity", "1e999", "1_0", "0x1p3", "1,5", "9" * 100]
)
def test_what_is_no_number_is_refused_by_name(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        Query([("max_memory_gb", text)]).number("max_memory_gb")
    assert (caught.value.http_status, caught.value.param) == (400, "max_memory_gb")


@pytest.mark.parametrize("text", ["", "maybe", "2", "on", "null", "t", "y" * 1000])
def test_what_is_no_truth_is_refused_by_name(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        Query([("force", text)]).boolean("force")
    assert (caught.value.http_status, caught.value.param) == (400, "force")
    assert len(caught.value.message) < 128


def test_of_two_values_none_is_guessed() -> None:
    with pytest.raises(ApiError) as caught:
        Query([("force", "true"), ("force", "false")])
    assert (caught.value.http_status, caught.value.param) == (400, "force")


def test_an_unknown_parameter_is_refused_with_those_that_are_known() -> None:
    query = Query([("forse", "true")])
    query.boolean("force")
    with pytest.raises(ApiError, match=r"Unknown parameter `forse`; known are force\."):
        query.refuse_unread()
    with pytest.raises(ApiError, match="none is known here"):
        Query([("x", "1")]).refuse_unread()
