"""Names of installed models: safe as a name, and found again without regard to case."""

import random
import re
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxgui_grpc import naming
from mlxgui_grpc.errors import InvalidRequestError

ALLOWED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
LETTERS = "abcdAZ0189._-" * 3 + "/\\ \n\t\0~%:é漢\u202e🙂"
alphabet = st.sampled_from(sorted(set(LETTERS)))
names = st.text(alphabet, max_size=110) | st.text(max_size=20)


def random_names(count: int) -> Iterator[str]:
    rng = random.Random(5)
    for _ in range(count):
        yield "".join(rng.choices(LETTERS, k=rng.choice([0, 1, 2, 3, 5, 8, 96, 97])))


def test_ten_thousand_random_names_are_taken_as_they_are_or_refused() -> None:
    taken = [name for name in random_names(10_000) if is_taken_as_it_is(name)]
    assert 100 < len(taken) < 9_000


@settings(max_examples=300, deadline=None)
@given(names)
def test_a_name_is_taken_as_it_is_or_refused(name: str) -> None:
    is_taken_as_it_is(name)


def is_taken_as_it_is(name: str) -> bool:
    """What is taken can be no path, no option, no hidden file and no device."""
    try:
        taken = naming.check_name(name)
    except InvalidRequestError as error:
        assert error.field == "name"
        return False
    assert taken == name and ALLOWED.fullmatch(name)
    assert ".." not in name and not set(name) & set("/\\\0\n:~%") and not name.startswith(("-", "."))
    return True


@settings(max_examples=300, deadline=None)
@given(names)
def test_a_default_name_is_an_allowed_one(source: str) -> None:
    """Whatever the hub id or path, but for the names of devices."""
    try:
        name = naming.default_name(source)
    except InvalidRequestError:
        assert source.rstrip("/").rpartition("/")[2].lower().strip("-._ ").partition(".")[0][:3] in (
            "con",
            "prn",
            "aux",
            "nul",
            "com",
            "lpt",
        )
        return
    assert naming.check_name(name) == name == name.lower()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("mlx-community/Qwen3-0.6B-4bit", "qwen3-0.6b-4bit"),
        ("/models/My Model!/", "my-model"),
        ("a/b..c", "b.c"),
        ("///", "model"),
        ("a/" + "x" * 200, "x" * 96),
    ],
)
def test_default_names(source: str, name: str) -> None:
    assert naming.default_name(source) == name


@pytest.mark.parametrize(
    "name", ["con", "CON", "nul.txt", "com1", "LPT9.x", "..", "a..b", "", "a\n", "x" * 97]
)
def test_names_that_mean_something_else_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError):
        naming.check_name(name)


def test_a_suggestion_is_another_allowed_name() -> None:
    assert naming.suggested_name("m", "Owner") == "owner-m"
    assert naming.suggested_name("m", "") == "m-2"
