"""The two pages that a browser gets: the front page and the README as documentation."""

import re
from html import escape
from importlib import metadata

_HEADING = re.compile(r"(#{1,3}) (.+)")

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 46rem; margin: 3rem auto; padding: 0 1rem; }
pre { white-space: pre-wrap; font: 14px/1.5 ui-monospace, monospace; }
h1, h2, h3 { line-height: 1.2; }
table { border-collapse: collapse; }
td { padding: 0 1em .25em 0; vertical-align: top; }
a { color: LinkText; }
.quiet { opacity: .7; }
"""


def readme() -> str:
    """The README of the installed package. Empty where the package is not installed."""
    try:
        return str(metadata.metadata("mlxgui-grpc").json.get("description", ""))
    except metadata.PackageNotFoundError:
        return ""


def front_page(version: str, status: str, readme_text: str) -> str:
    """What this server is and where to go from here."""
    sections = [title for level, title in _headings(readme_text) if level == 2]
    documentation = "".join(
        f'<li><a href="/docs#{_slug(title)}">{escape(title)}</a></li>' for title in sections
    )
    return _page(
        "MLX-GUI API",
        f"""<h1>MLX-GUI API</h1>
<p class="quiet">Version {escape(version)}, {escape(status)}.</p>
<p>A model server for MLX. OpenAI clients use it with this address and <code>/v1</code> as their base URL.</p>
<h2>This server</h2>
<ul>
<li><a href="/v1/models">Installed models</a></li>
<li><a href="/v1/operations">Downloads and loads</a></li>
<li><a href="/v1/manager/status">Models in memory</a></li>
<li><a href="/v1/system/status">System</a></li>
<li><a href="/v1/settings?details=true">Settings</a></li>
<li><a href="/health">Health</a></li>
<li><a href="/metrics">Metrics</a></li>
</ul>
<h2><a href="/docs">Documentation</a></h2>
<ul>{documentation}<li><a href="/openapi.json">OpenAPI description</a></li></ul>""",
    )


def documentation(readme_text: str, reference: str) -> str:
    """The README as it is written, with headings that can be linked to, and the HTML of the API's reference."""
    body: list[str] = []
    plain: list[str] = []
    in_code = False
    for line in readme_text.splitlines():
        in_code ^= line.startswith("```")
        heading = None if in_code else _HEADING.fullmatch(line)
        if heading is None:
            plain.append(escape(line))
            continue
        body.append(_preformatted(plain))
        plain.clear()
        level = len(heading[1])
        body.append(f'<h{level} id="{_slug(heading[2])}">{escape(heading[2])}</h{level}>')
    body.append(_preformatted(plain))
    links = '<p><a href="/">MLX-GUI API</a> · <a href="#api-reference">API reference</a></p>'
    return _page("MLX-GUI documentation", links + "".join(body) + reference)


def _headings(text: str) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    in_code = False
    for line in text.splitlines():
        in_code ^= line.startswith("```")
        heading = None if in_code else _HEADING.fullmatch(line)
        if heading is not None:
            found.append((len(heading[1]), heading[2]))
    return found


def _preformatted(lines: list[str]) -> str:
    text = "\n".join(lines).strip("\n")
    return f"<pre>{text}</pre>" if text else ""


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{body}</body></html>"
    )
