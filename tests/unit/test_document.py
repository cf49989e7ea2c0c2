"""The table of the API document's sentences: none is left out, and each names tests that exist."""

import ast
import re
from functools import cache
from pathlib import Path

from tests.support_document import LATER, statements

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "tests" / "document.md"
ROW = re.compile(r"\| (\d+) \| (.+) \| (.+) \|")
LATER_ISSUE = re.compile(r"issue 5 \(\w+\)")
NOTHING = "nothing to check: "


def rows() -> list[tuple[int, str, str]]:
    """Line, words and the last column of each row."""
    found = []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        match = ROW.fullmatch(line)
        if match is not None:
            found.append((int(match[1]), match[2].replace("\\|", "|"), match[3]))
    return found


@cache
def names_in(path: str) -> set[str]:
    """Names of the tests that a file has."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in tree.body if isinstance(node, functions) and node.name.startswith("test_")}


def test_every_sentence_is_a_row() -> None:
    """In order, word by word."""
    assert [(line, words) for line, words, _ in rows()] == statements()


def test_every_row_names_tests_that_exist() -> None:
    """Or the issue that brings it, or why there is nothing to check."""
    for line, _, checked_by in rows():
        if LATER_ISSUE.fullmatch(checked_by) or checked_by.startswith(NOTHING):
            continue
        for test in checked_by.split("<br>"):
            path, _, name = test.partition("::")
            assert path.startswith("tests/") and name in names_in(path), f"line {line}: there is no {test}"


def test_what_another_issue_brings_is_what_the_harness_leaves_out() -> None:
    """No line of a part that is served already is put off, but those that name what a later part brings."""
    named_elsewhere = {1060, 1061, 1325, 1329}
    put_off = {line for line, _, checked_by in rows() if LATER_ISSUE.fullmatch(checked_by)}
    assert put_off - named_elsewhere <= set(LATER)
    assert named_elsewhere <= put_off


def test_few_rows_have_nothing_to_check() -> None:
    assert sum(checked_by.startswith(NOTHING) for _, _, checked_by in rows()) < 12
