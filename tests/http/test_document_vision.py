"""The API document's part about images: its blocks, run by bash with curl, and its sentences.

The port is another, and so is what the examples only hint at: the dots of their pictures, the host of their URL, and
two of their three models, which are one here.
"""

import base64
import json
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RestSession
from tests.http.document_models import VISION, VISION_ID, install
from tests.http.document_scripts import localized, needs_curl, run_bash
from tests.loopback_hub import LoopbackHub
from tests.picture_host import PictureHost
from tests.support_document import VISION_LINES, block_at, blocks, faults
from tests.support_http import chat_body, openai_error
from tests.support_images import encoded
from tests.support_vision import build_tiny_vision

CHAT = "/v1/chat/completions"
PACKAGES, INSTALLATION, ANSWER = 873, 1018, 972
CHATS = (886, 914, 941)
CONTEXT_LENGTH = 192
"""The model does not end by itself, and most examples set no limit."""
FILES = {
    "jpeg": encoded("JPEG", (56, 56)),
    "png": encoded("PNG", (56, 56)),
    "gif": encoded("GIF", (56, 56)),
    "webp": encoded("WEBP", (56, 56), lossless=True),
}
HINT = re.compile(r'data:image/(\w+);base64,([^".]*)\.\.\.')


@pytest.fixture(scope="module")
def published(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The document's vision model is on the hub."""
    hub.recover()
    folder = build_tiny_vision(tmp_path_factory.mktemp("document") / "vision", "qwen2_vl")
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = CONTEXT_LENGTH
    (folder / "config.json").write_text(json.dumps(config))
    hub.add(VISION_ID, folder, pipeline_tag="image-text-to-text")


@pytest.fixture(scope="module")
def seeing(published: None, http: RestSession) -> Iterator[RestSession]:
    """The session's server, with the document's vision model installed."""
    install(http, VISION_ID, VISION)
    yield http
    assert http.delete(f"/v1/models/{VISION}?force=true").status_code == 200


def data_url(kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(FILES[kind]).decode()}"


def picture_for(hint: re.Match[str]) -> str:
    """A whole picture that begins as the one of an example, which breaks off."""
    whole = data_url(hint[1])
    assert whole.startswith(hint[0].removesuffix("..."))
    return whole


def completed(text: str, pictures: PictureHost) -> str:
    """An example with whole pictures, a host that is there, and the model that is installed."""
    pictures.files["/image.jpg"] = FILES["jpeg"]
    text = text.replace("https://example.com/image.jpg", pictures.url("/image.jpg"))
    text, count = re.subn(
        r'"model": "(gemma-3n-e4b-it|qwen2-vl-[27]b-instruct)"', f'"model": "{VISION}"', text
    )
    assert count == 1
    return HINT.sub(picture_for, text)


def body_of(line: int) -> Any:
    """What the curl of a block sends."""
    found = re.search(r"-d '(.*)'", block_at(line).text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def content_of(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


# --- Blocks ---


@needs_curl
@pytest.mark.usefixtures("published")
def test_the_installation_block_installs_a_vision_model(http: RestSession, tmp_path: Path) -> None:
    """Under the name that the other examples have for it, and it is known to be one."""
    (output,), statuses = run_bash(localized(block_at(INSTALLATION).text, http.base_url), tmp_path)
    assert statuses == [200], output
    assert body_of(INSTALLATION) == {"model_id": VISION_ID, "name": VISION}
    assert http.get(f"/v1/models/{VISION}").json()["type"] == "vision"


@needs_curl
@pytest.mark.parametrize("line", CHATS)
def test_a_block_with_images_is_answered(
    seeing: RestSession, picture_host: PictureHost, tmp_path: Path, line: int
) -> None:
    """In the documented form, which is that of a text model's answers; the images are in the prompt."""
    script = completed(localized(block_at(line).text, seeing.base_url), picture_host)
    picture_host.requests.clear()
    (output,), statuses = run_bash(script, tmp_path)
    assert statuses == [200], output
    answer = json.loads(output)
    assert faults(block_at(ANSWER).json(), answer) == []
    assert answer["model"] == VISION and content_of(answer) and "warnings" not in answer
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    parts = body_of(line)["messages"][0]["content"]
    words = chat_body(parts[0]["text"], VISION, max_tokens=1)
    assert usage["prompt_tokens"] > seeing.post(CHAT, json=words).json()["usage"]["prompt_tokens"]
    assert picture_host.requests == (["/image.jpg"] if line == 914 else [])


@pytest.mark.parametrize("line", [886, 941])
def test_the_blocks_pictures_as_they_stand_are_refused(seeing: RestSession, line: int) -> None:
    """They break off; the first is named."""
    error = openai_error(seeing.post(CHAT, json={**body_of(line), "model": VISION}), 400)
    assert error["param"] == "messages[0].content[1].image_url.url"


def test_no_block_about_images_is_left_out() -> None:
    lines = {block.line for block in blocks("bash", "python", "json", "") if block.line in VISION_LINES}
    assert lines == {PACKAGES, INSTALLATION, ANSWER, *CHATS}


# --- Sentences ---


def test_the_documented_extra_brings_mlx_vlm() -> None:
    """`pip install ...[vision]`, with at least the documented version; it is what is installed here."""
    first, second = re.findall(r"^pip install (\S+)$", block_at(PACKAGES).text, re.MULTILINE)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extra = first.partition("[")[2].removesuffix("]")
    name, _, least = second.partition(">=")
    (pinned,) = project["optional-dependencies"][extra]
    assert pinned == f"{name}=={version(name)}"
    assert [int(part) for part in version(name).split(".")] >= [int(part) for part in least.split(".")]


@pytest.mark.parametrize("kind", FILES)
def test_each_documented_format_is_seen_by_data_url_and_by_url(
    seeing: RestSession, picture_host: PictureHost, kind: str
) -> None:
    """To the same answer, which is another one than without the picture."""
    picture_host.files[f"/a.{kind}"] = FILES[kind]
    content: list[Any] = [{"type": "text", "text": "What do you see in this image?"}]
    answers = []
    for url in (None, data_url(kind), picture_host.url(f"/a.{kind}")):
        images = [{"type": "image_url", "image_url": {"url": url}}] if url else []
        body = {"model": VISION, "messages": [{"role": "user", "content": content + images}]}
        response = seeing.post(CHAT, json={**body, "max_tokens": 8, "temperature": 0})
        assert response.status_code == 200, response.text
        answers.append(content_of(response.json()))
    without, sent, fetched = answers
    assert sent == fetched != without
