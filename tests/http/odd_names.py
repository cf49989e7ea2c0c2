"""Names that try to be paths, and requests that carry one where a route takes a name. The same for a seed for ever."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.http.routes import Route

MARK = "zq"
"""In every name, so that none is by accident that of a model, or of a file that is there."""

_UP = [
    "..",
    "../..",
    "..\\..",
    "....//",
    "..;",
    "．．",
    "‥",
    "%2e%2e",
    "%252e%252e",
    ".",
    "~",
    "~root",
    "$HOME",
]
_SLASHES = ["/", "//", "\\", "\\\\", "%2f", "%5c", "%252f", "／", "∕", "⁄", ":"]
_PIECES = [
    *("\0", "\n", "\r\n", "\t", " ", "\x7f", "\x1b[2J", "\u202e", "\u200b", "\u0301" * 9, "\ufeff", "\ufffd"),
    *(
        "e\u0301",
        "é",
        "ß",
        "İ",
        "ſ",
        "K",
        "模型",
        "🙂",
        "\U0001f468\u200d\U0001f469",
        "ｄｅｍｏ",
        "demo\u200b",
    ),
    *("`id`", "$(id)", ";id", "|id", "'", '"', "<b>", "&", "?", "#", "%", "%00", "%s%n", "{0}", "${x}", "*"),
    *(
        "con",
        "nul",
        ".git",
        ".ssh",
        "models--a--b",
        "blobs",
        "snapshots",
        "refs",
        "catalog.sqlite3",
        "config.toml",
    ),
    *("load", "unload", "status", "install", "health", "x.safetensors", "x.part", "-rf", "--help"),
]
_FILES = ["canary/file", "canary", "canary/new", "canary/deep/er", "new"]


@dataclass(frozen=True)
class OddRequest:
    """One request: its method, its path and query with escapes as they are to be sent, and its body."""

    method: str
    path: str
    body: dict[str, Any] | None


def make_name(choose: random.Random, outside: Path) -> str:
    """A name that would lead to `outside` if it were taken for a path, or is otherwise no name."""
    kind = choose.randrange(8)
    target = choose.choice(_FILES)
    if kind == 0:
        name = f"{outside}/{target}"
    elif kind in (1, 2):
        # From any folder of the server's up to the one around it, and down again.
        slash = choose.choice(_SLASHES)
        ups = slash.join([choose.choice(_UP) if kind == 2 else ".."] * choose.randint(1, 8))
        name = slash.join([ups, *target.split("/")])
    elif kind == 3:
        name = f"file://{outside}/{target}"
    elif kind == 4:
        name = choose.choice(["x", "../", "模", "\0", "%2e", "a/"]) * choose.choice([97, 600, 2500])
    else:
        name = "".join(
            choose.choice([*_PIECES, *_UP, *_SLASHES, "a", "b"]) for _ in range(choose.randint(1, 6))
        )
    place = choose.choice(["before", "after", "owner"])
    if place == "before":
        return MARK + name
    return f"{MARK}/{name}" if place == "owner" else name + MARK


def make_request(seed: int, routes: list[Route], outside: Path) -> OddRequest:
    """The request of a seed. None of them is right by accident but a search."""
    choose = random.Random(seed)
    name = make_name(choose, outside)
    in_bodies: list[OddRequest] = [
        OddRequest("POST", "/v1/models/install", {"model_id": name}),
        OddRequest("POST", "/v1/models/install", {"model_id": f"a/{name}", "name": name}),
        OddRequest("POST", "/v1/models/install", {"model_id": "odd/none", "name": name}),
        OddRequest("POST", "/v1/models/install", {"model_id": "odd/none", "revision": name}),
        OddRequest("POST", "/v1/models/install", {"path": name, "name": "odd"}),
        OddRequest("POST", "/v1/models/demo/update", {"revision": name, "wait": name}),
        OddRequest(
            "POST", "/v1/chat/completions", {"model": name, "messages": [{"role": "user", "content": "x"}]}
        ),
        OddRequest("POST", "/v1/completions", {"model": name, "prompt": "x"}),
        OddRequest("POST", "/v1/embeddings", {"model": name, "input": "x"}),
        OddRequest("POST", "/v1/models/demo/generate", {"prompt": "x", "adapter": name}),
        OddRequest("POST", "/v1/models/demo/generate", {"prompt": "x", "draft_model": name}),
        OddRequest("PUT", "/v1/settings/log_level", {"value": name}),
        OddRequest("PUT", "/v1/settings/preload_models", {"value": [name]}),
        OddRequest("GET", f"/v1/operations?page_token={quote(name)}", None),
        OddRequest("GET", f"/v1/discover/models?limit=1&query={quote(name)}", None),
    ]
    named = [route for route in routes if "<" in route.rule]
    if choose.random() < 0.4:
        return choose.choice(in_bodies)
    route = choose.choice(named)
    # As a client would write it, with every character escaped, with dots and slashes as they are, and escaped twice.
    writings = [quote(name), quote(name, safe=""), _all_escaped(name), quote(quote(name, safe=""))]
    place = route.rule[route.rule.index("<") : route.rule.index(">") + 1]
    return OddRequest(route.method, route.filled({place: choose.choice(writings)}), route.body)


def _all_escaped(name: str) -> str:
    return "".join(f"%{byte:02x}" for byte in name.encode())
