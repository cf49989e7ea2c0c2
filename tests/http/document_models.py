"""The models that the API document names, on the loopback hub and on the session's server."""

from collections.abc import Iterator

import pytest

from tests.conftest import RestSession
from tests.loopback_hub import LoopbackHub
from tests.support_models import DEMO

LLAMA_ID, LLAMA = "mlx-community/Llama-3.2-3B-Instruct-4bit", "llama-3.2-3b-instruct"
QWEN_ID, QWEN = "mlx-community/Qwen3-8B-6bit", "qwen3-8b-6bit"
INSTALLED_BY_THE_DOCUMENT_ID, INSTALLED_BY_THE_DOCUMENT = (
    "mlx-community/Qwen2.5-7B-Instruct-4bit",
    "qwen-7b-4bit",
)
# The demo model's weights as a conversion has them: only the repository's name says that it is for embedding.
EMBEDDING_ID, EMBEDDING = "mlx-community/Qwen3-Embedding-0.6B-4bit-DWQ", "qwen3-embedding-0-6b-4bit"
# A tiny model of the same architecture; tests/http/test_document_vision.py publishes it.
VISION_ID, VISION = "mlx-community/Qwen2-VL-2B-Instruct-4bit", "qwen2-vl-2b-instruct"


def publish(hub: LoopbackHub) -> None:
    """Put the document's repositories on the hub; more people fetch them than what other tests put there."""
    hub.recover()
    for model_id, downloads in ((LLAMA_ID, 10**9), (QWEN_ID, 10**8), (INSTALLED_BY_THE_DOCUMENT_ID, 10**7)):
        tags = ("mlx", "safetensors", "llama", "instruct", "4-bit")
        hub.add(model_id, DEMO, tags=tags, downloads=downloads, likes=89)
    hub.add(
        EMBEDDING_ID,
        DEMO,
        pipeline_tag="feature-extraction",
        tags=("mlx", "safetensors", "embedding"),
        downloads=1543,
        likes=12,
    )


def install(http: RestSession, model_id: str = LLAMA_ID, name: str = LLAMA) -> None:
    """Have a model installed; cheap where it is so already."""
    installed = http.post("/v1/models/install", json={"model_id": model_id, "name": name})
    assert installed.status_code == 200, installed.text


def make_ready(http: RestSession) -> None:
    """Have the document's model installed, loaded, and used at least once."""
    install(http)
    assert http.post(f"/v1/models/{LLAMA}/load").status_code == 200
    if http.get(f"/v1/models/{LLAMA}/health").json()["last_used"] is None:
        answer = http.post(f"/v1/models/{LLAMA}/generate", json={"prompt": "Hello", "max_tokens": 1})
        assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def documented(http: RestSession, hub: LoopbackHub) -> Iterator[RestSession]:
    """The session's server, with the document's repositories in reach; its models are gone afterwards."""
    publish(hub)
    yield http
    for name in (LLAMA, QWEN, INSTALLED_BY_THE_DOCUMENT, EMBEDDING):
        assert http.delete(f"/v1/models/{name}?force=true").status_code in (200, 404)
