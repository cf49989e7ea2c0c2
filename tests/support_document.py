"""Reads the API document: its code blocks, its sentences, and whether an answer keeps to an example."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parent / "mlx-gui-api.md"
INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")

LATER = dict.fromkeys(range(648, 853), "issue 5 (audio)")
"""Lines of the document that another issue of the tracker serves."""
VISION_LINES = range(856, 1040)
"""Lines about images, whose blocks tests/http/test_document_vision.py runs."""

_ROUTE = re.compile(r"#### `([A-Z]+) (/[^`]*)`")
_TOPIC = re.compile(r"#+ (?!`[A-Z]+ /)")
_LABEL = re.compile(r"\*\*[^*]+:\*\*")
_RULE = re.compile(r"[-| :]+")


@dataclass(frozen=True)
class Block:
    """One block of code: the line of its fence, what it is under, and its text without indentation."""

    line: int
    language: str
    heading: str
    label: str
    text: str

    @property
    def route(self) -> tuple[str, str] | None:
        """Method and path, where the heading is a route."""
        match = _ROUTE.fullmatch(self.heading)
        return None if match is None else (match[1], match[2])

    def json(self) -> Any:
        return json.loads(self.text.replace(", ...]", "]"))


def blocks(*languages: str) -> list[Block]:
    """The document's blocks of these languages, in order."""
    found = []
    heading = label = ""
    lines = iter(enumerate(DOCUMENT.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        text = line.strip()
        if text.startswith("```"):
            indent = len(line) - len(line.lstrip())
            body = "\n".join(inner[indent:] for _, inner in _until_fence(lines))
            found.append(Block(number, text[3:], heading, label, body))
        elif text.startswith("#"):
            heading, label = text, ""
        elif text:
            label = text
    return [block for block in found if block.language in languages]


def block_at(line: int) -> Block:
    """The one whose fence is at a line."""
    (block,) = (block for block in blocks("bash", "python", "json", "") if block.line == line)
    return block


def statements() -> list[tuple[int, str]]:
    """Every line that says something, with its number: prose, bullets, table rows, route headings and code blocks."""
    found = []
    lines = iter(enumerate(DOCUMENT.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        text = line.strip()
        if text.startswith("```"):
            for _ in _until_fence(lines):
                pass
            found.append((number, f"{text[3:] or 'text'} block"))
        elif text and not _TOPIC.match(text) and not _LABEL.fullmatch(text) and not _RULE.fullmatch(text):
            found.append((number, text))
    return found


def faults(documented: Any, answer: Any, path: str = "$") -> list[str]:
    """Where an answer does not keep to the document's example of it.

    Every documented key is there, with a value of the same JSON type, inside as well; null stands for null, and
    an instant for an instant. Items of a list are held to the first of the example. More keys may be there.
    """
    wanted, got = _kind(documented), _kind(answer)
    if wanted != got:
        return [f"{path} is {got} and not {wanted}: {json.dumps(answer)[:80]}"]
    if isinstance(documented, dict):
        missing = [f"{path}.{key} is missing" for key in documented if key not in answer]
        return missing + [
            fault
            for key, value in documented.items()
            if key in answer
            for fault in faults(value, answer[key], f"{path}.{key}")
        ]
    if isinstance(documented, list) and documented:
        if not answer:
            return [f"{path} is empty"]
        return [
            fault
            for index, item in enumerate(answer)
            for fault in faults(documented[0], item, f"{path}[{index}]")
        ]
    return []


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "an instant" if INSTANT.fullmatch(value) else "a string"
        case list():
            return "an array"
    return "an object"


def _until_fence(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for number, line in lines:
        if line.strip().startswith("```"):
            return
        yield number, line
