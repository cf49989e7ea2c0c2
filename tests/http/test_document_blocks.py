"""The API document's bash and python blocks, run as they stand: by bash with curl, and by Python with requests.

Only the port is another, and the names are served by the loopback hub. A `.curlrc` has curl tell each status.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import RestSession
from tests.http.document_models import (
    EMBEDDING,
    INSTALLED_BY_THE_DOCUMENT,
    LLAMA,
    LLAMA_ID,
    QWEN,
    QWEN_ID,
    documented,
    install,
)
from tests.http.document_scripts import localized, needs_curl, run_bash
from tests.support_document import LATER, VISION_LINES, Block, block_at, blocks, faults
from tests.support_http import chat_body, parse_events, stream_text

__all__ = ["documented"]  # A fixture.

BLOCKS = [block for block in blocks("bash", "python") if block.line not in VISION_LINES]
# The statuses of each block's requests, in order.
STATUSES = {
    # The document shows the headers only: with a GET. That the key is no reason to refuse is checked below.
    18: [405],
    23: [405],
    28: [405],
    1079: [200],
    1122: [200],
    1145: [200],
    1167: [200],
    1193: [200],
    1236: [200],
}
WORKFLOW = 1337
ANSWERED_BY = {1079: 1095, 1145: 1155, 1167: 1173, 1193: 1212}
"""Line of the example answer to a block with one request."""


def prepare(http: RestSession) -> None:
    """Installed; the requests themselves load."""
    install(http)
    install(http, QWEN_ID, QWEN)


@needs_curl
@pytest.mark.parametrize(
    "block",
    [block for block in BLOCKS if block.language == "bash" and block.line != WORKFLOW],
    ids=lambda block: f"line {block.line}",
)
def test_a_bash_block_runs(documented: RestSession, tmp_path: Path, block: Block) -> None:
    """With the documented answer, where the document has one."""
    if block.line in LATER:
        pytest.skip(LATER[block.line])
    prepare(documented)
    if EMBEDDING in block.text:
        install(documented, **block_at(1248).json())
    outputs, statuses = run_bash(localized(block.text, documented.base_url), tmp_path)
    assert statuses == STATUSES[block.line], outputs
    if block.line in ANSWERED_BY:
        example = block_at(ANSWERED_BY[block.line]).json()
        (output,) = outputs
        answer = json.loads(output)
        assert faults(example, answer) == []
        if "message" in example:
            assert answer == example


@needs_curl
@pytest.mark.parametrize("line", [18, 23, 28])
def test_any_key_and_none_is_accepted_as_the_blocks_say(
    documented: RestSession, tmp_path: Path, line: int
) -> None:
    """The block's own curl, given a chat to send."""
    body = json.dumps(chat_body(max_tokens=1))
    line_of_shell = block_at(line).text.partition("#")[0].strip()
    script = localized(line_of_shell, documented.base_url) + f" -d '{body}'"
    (output,), statuses = run_bash(script, tmp_path)
    assert statuses == [200], output
    assert json.loads(output)["object"] == "chat.completion"


@needs_curl
def test_the_streaming_block_streams_the_documented_chunks(documented: RestSession, tmp_path: Path) -> None:
    """Chunks of the documented form, the role first, a finish reason last, then [DONE]."""
    prepare(documented)
    (output,), _ = run_bash(localized(block_at(1122).text, documented.base_url), tmp_path)
    chunks = parse_events((output.rstrip("\n") + "\n\n").encode())
    examples = parse_events((block_at(1134).text.strip() + "\n\n").encode())
    assert faults(examples[0], chunks[0]) == []
    for chunk in chunks[1:-1]:
        assert faults(examples[1], chunk) == []
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert {chunk["model"] for chunk in chunks} == {QWEN} and len({chunk["id"] for chunk in chunks}) == 1
    assert stream_text(chunks)


@needs_curl
def test_the_workflow_does_what_its_comments_say(documented: RestSession, tmp_path: Path) -> None:
    """Seen in each answer and, afterwards, in what is left."""
    install(documented)
    files = Path(documented.get(f"/v1/models/{LLAMA}").json()["path"])
    script = localized(block_at(WORKFLOW).text, documented.base_url)
    outputs, statuses = run_bash(script, tmp_path)
    # The last one deletes again, in another way, what the one before has deleted.
    assert statuses == [200, 200, 200, 200, 200, 200, 200, 404]
    status, found, loaded, health, generated, unloaded, deleted, gone = map(json.loads, outputs)
    assert status["status"] == "running"
    assert all(model["memory_fit"] for model in found["models"])
    assert any(model["id"] == LLAMA_ID for model in found["models"])
    assert loaded["status"] == "loaded" and health["healthy"] is True
    assert generated["text"] and generated["usage"]["completion_tokens"] <= 50
    assert unloaded["status"] == "unloaded"
    assert (deleted["status"], deleted["removed_files"]) == ("deleted", True)
    assert gone == {"detail": f"Model '{LLAMA}' not found"}
    assert not files.exists()

    # 8. by itself: the files are kept.
    install(documented)
    files = Path(documented.get(f"/v1/models/{LLAMA}").json()["path"])
    (output,), statuses = run_bash(script.partition("# 8.")[2].partition("\n")[2], tmp_path)
    assert statuses == [200] and json.loads(output)["removed_files"] is False
    assert (files / "config.json").exists()


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "python"], ids=lambda block: f"line {block.line}"
)
def test_a_python_block_runs(documented: RestSession, tmp_path: Path, block: Block) -> None:
    """By a Python of its own, and prints what it was given."""
    if block.line in LATER:
        pytest.skip(LATER[block.line])
    install(documented)
    done = subprocess.run(
        [sys.executable, "-c", localized(block.text, documented.base_url)],
        cwd=tmp_path,
        env={**os.environ, "NO_PROXY": "*", "no_proxy": "*"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, _, rest = done.stdout.partition("\n")
    assert first == str({"message": f"Model '{LLAMA}' loaded successfully", "status": "loaded"})
    assert rest.startswith("Generated: ") and len(rest) > len("Generated: \n")


def test_no_block_is_left_out() -> None:
    """Each is run here, or is about images, or belongs to a later issue."""
    run = {*STATUSES, WORKFLOW, *(block.line for block in BLOCKS if block.language == "python")}
    assert {block.line for block in BLOCKS} == run | {block.line for block in BLOCKS if block.line in LATER}
    assert INSTALLED_BY_THE_DOCUMENT in block_at(1145).text
