"""Sentences of the API document about defaults, limits and parameters, each as a user would check it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RestSession
from tests.http.document_models import (
    EMBEDDING_ID,
    INSTALLED_BY_THE_DOCUMENT_ID,
    LLAMA,
    LLAMA_ID,
    QWEN,
    QWEN_ID,
    documented,
    install,
    make_ready,
)
from tests.loopback_hub import LoopbackHub
from tests.support_document import blocks
from tests.support_http import END_BIAS, PARIS, chat_body, native_error, openai_error
from tests.support_models import DEMO
from tests.support_server import RunningServer

__all__ = ["documented"]  # A fixture.

StartServer = Callable[..., RunningServer]


def generated(http: RestSession, **fields: Any) -> str:
    """What the document's model writes; it is loaded."""
    body = {"prompt": "Once upon a time", "max_tokens": 24, "logit_bias": END_BIAS, **fields}
    answer = http.post(f"/v1/models/{LLAMA}/generate", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["text"])


# --- Generate ---


def test_the_documented_defaults_are_the_defaults(documented: RestSession) -> None:
    """Said one by one, none of them changes the text; another value of each does."""
    make_ready(documented)
    drawn = {"temperature": 2.0, "seed": 7}
    assert generated(documented) == generated(documented, temperature=0.0)
    for name, default, other in (
        ("top_p", 1.0, 0.05),
        ("top_k", 0, 1),
        ("repetition_penalty", 1.0, 5.0),
    ):
        assert generated(documented, **drawn) == generated(documented, **drawn, **{name: default}), name
        assert generated(documented, **drawn) != generated(documented, **drawn, **{name: other}), name
    penalized = {**drawn, "repetition_penalty": 1.5}
    assert generated(documented, **penalized) == generated(
        documented, **penalized, repetition_context_size=20
    )
    assert generated(documented, **penalized) != generated(documented, **penalized, repetition_context_size=1)


def test_a_seed_makes_the_text_reproducible(documented: RestSession) -> None:
    """And null, as in the document's example, is a fresh one."""
    make_ready(documented)
    texts = [generated(documented, temperature=2.0, seed=seed) for seed in (1, 1, 2, None, None)]
    assert texts[0] == texts[1]
    assert len(set(texts[1:])) == 4


def test_max_tokens_is_16384_at_most(documented: RestSession) -> None:
    """As the system's status says."""
    make_ready(documented)
    path = f"/v1/models/{LLAMA}/generate"
    for limit in (0, -1, 16385):
        answer = documented.post(path, json={"prompt": "Once", "max_tokens": limit})
        assert "max_tokens" in native_error(answer, 400)
    answer = documented.post(path, json={"prompt": "The capital of France is", "max_tokens": 16384})
    assert answer.json()["text"] == " Paris."
    status = documented.get("/v1/system/status").json()
    assert status["model_manager"]["max_tokens_limit"] == 16384


@pytest.mark.campaign
def test_max_tokens_is_8192_unless_said(http: RestSession, endless_model: str) -> None:
    """On a model whose context of 32,768 tokens leaves room for more. It takes 8,192 steps."""
    http.post(f"/v1/models/{endless_model}/load")
    body = {"prompt": "Once", "logit_bias": END_BIAS}
    answer = http.post(f"/v1/models/{endless_model}/generate", json=body).json()
    assert (answer["usage"]["completion_tokens"], answer["finish_reason"]) == (8192, "length")


def test_the_prompt_is_required(documented: RestSession) -> None:
    make_ready(documented)
    assert "prompt" in native_error(documented.post(f"/v1/models/{LLAMA}/generate", json={}), 400)


# --- Models ---


def test_priority_is_0_unless_said(documented: RestSession) -> None:
    """It is a parameter of the query, and sorts loads that wait; a loaded model needs none."""
    make_ready(documented)
    for query in ("", "?priority=0", "?priority=10", "?priority=-10"):
        assert documented.post(f"/v1/models/{LLAMA}/load{query}").json()["status"] == "loaded"


def test_the_manager_s_list_has_the_state_of_each_model(documented: RestSession) -> None:
    """OpenAI's list has not."""
    make_ready(documented)
    for word in ("loaded", "unloaded"):
        models = documented.get("/v1/manager/models").json()["models"]
        assert [model["status"] for model in models if model["name"] == LLAMA] == [word]
        documented.post(f"/v1/models/{LLAMA}/unload")
    assert all("status" not in entry for entry in documented.get("/v1/models").json()["data"])


# --- Discovery ---


def found(http: RestSession, path: str, **parameters: Any) -> list[str]:
    answer = http.get(f"/v1/discover/{path}", params=parameters)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["total"] == len(body["models"])
    return [model["id"] for model in body["models"]]


@pytest.fixture(scope="module")
def sorted_hub(documented: RestSession, hub: LoopbackHub) -> None:
    """Three repositories of one word, in another order by each of the four measures; and two dozen of another."""
    for name, downloads, likes, day in (("one", 3, 1, 2), ("two", 2, 3, 1), ("three", 1, 2, 3)):
        hub.add(
            f"sorted/quokka-{name}",
            DEMO,
            downloads=downloads,
            likes=likes,
            createdAt=f"2025-02-0{day}T00:00:00.000Z",
            lastModified=f"2025-03-0{4 - day}T00:00:00.000Z",
        )
    for number in range(24):
        hub.add(f"sorted/wombat-{number}", DEMO)


@pytest.mark.usefixtures("sorted_hub")
@pytest.mark.parametrize(
    ("sort", "order"),
    [
        (None, ["one", "two", "three"]),
        ("downloads", ["one", "two", "three"]),
        ("likes", ["two", "three", "one"]),
        ("created", ["three", "one", "two"]),
        ("updated", ["two", "one", "three"]),
    ],
)
def test_a_search_is_sorted_as_documented(
    documented: RestSession, sort: str | None, order: list[str]
) -> None:
    """By downloads unless said."""
    parameters = {} if sort is None else {"sort": sort}
    ids = found(documented, "models", query="quokka", **parameters)
    assert ids == [f"sorted/quokka-{name}" for name in order]
    if sort is not None:
        assert found(documented, "models", query="quokka", limit=2, sort=sort) == ids[:2]


@pytest.mark.usefixtures("sorted_hub")
def test_twenty_are_found_unless_another_limit_is_said(documented: RestSession) -> None:
    assert len(found(documented, "models", query="wombat")) == 20
    assert len(found(documented, "models", query="wombat", limit=22)) == 22
    assert len(found(documented, "compatible", query="wombat", limit=3)) == 3
    assert len(found(documented, "popular")) == 20
    assert found(documented, "models", query="no such animal") == []


@pytest.mark.usefixtures("sorted_hub")
@pytest.mark.parametrize("path", ["models", "compatible"])
def test_pages_lead_to_every_model(documented: RestSession, path: str) -> None:
    """Each once; the last page says that it is."""
    ids: list[str] = []
    parameters: dict[str, Any] = {"query": "wombat", "limit": 10}
    for _ in range(3):
        body = documented.get(f"/v1/discover/{path}", params=parameters).json()
        ids += [model["id"] for model in body["models"]]
        parameters["page_token"] = body["next_page_token"]
    assert sorted(ids) == sorted(f"sorted/wombat-{number}" for number in range(24))
    assert body["next_page_token"] is None


def test_popular_is_by_downloads(documented: RestSession) -> None:
    assert found(documented, "popular", limit=3) == [LLAMA_ID, QWEN_ID, INSTALLED_BY_THE_DOCUMENT_ID]


def test_embedding_models_are_searched_among_themselves(documented: RestSession) -> None:
    """By words, up to a limit; no other kind is among them."""
    assert found(documented, "embeddings", query="Qwen3") == [EMBEDDING_ID]
    assert found(documented, "embeddings", query="Llama") == []
    assert len(found(documented, "embeddings", limit=1)) == 1
    assert EMBEDDING_ID in found(documented, "embeddings")


def test_compatible_means_that_it_fits_the_memory(documented: RestSession) -> None:
    """That which is said, or what the machine has available."""
    assert found(documented, "compatible", query=LLAMA_ID) == [LLAMA_ID]
    assert found(documented, "compatible", query=LLAMA_ID, max_memory_gb=64) == [LLAMA_ID]
    assert found(documented, "compatible", query=LLAMA_ID, max_memory_gb=0.001) == []


# --- OpenAI ---


def test_existing_client_code_needs_another_base_url_only(documented: RestSession) -> None:
    """Install, then chat, complete and list, in OpenAI's forms, with any key."""
    install(documented, QWEN_ID, QWEN)
    headers = {"Authorization": "Bearer sk-any-key-works"}
    body = chat_body(model=QWEN)
    answer = documented.post("/v1/chat/completions", json=body, headers=headers).json()
    assert answer["choices"][0]["message"]["content"] == PARIS
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    listed = documented.get("/v1/models", headers=headers).json()["data"]
    assert QWEN in [entry["id"] for entry in listed]
    error = openai_error(
        documented.post("/v1/chat/completions", json={**body, "model": "x"}, headers=headers), 404
    )
    assert error["code"] == "model_not_found"


def test_what_the_document_says_is_not_there_is_404(http: RestSession) -> None:
    """In JSON, so that a client can tell."""
    for path in ("/v1/images/generations", "/v1/images/edits"):
        assert openai_error(http.post(path, json={"prompt": "x"}), 404)["code"] == "route_not_found"


# --- A machine where MLX does not run ---


def test_where_mlx_does_not_run_the_documented_sentence_says_so(
    start_server: StartServer, tmp_path: Path
) -> None:
    """A worker that cannot import it is the evidence: status, load, estimate and search tell."""
    (block,) = (block for block in blocks("json") if block.line == 1305)
    sentence = block.json()["detail"]
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text("raise ImportError('this machine has no MLX')")
    server = start_server(bridge=True, environment={"PYTHONPATH": str(tmp_path)})
    with RestSession(server.rest_url) as http:
        detail = native_error(http.post("/v1/models/demo/load"), 400)
        assert detail.startswith(sentence) and "this machine has no MLX" in detail
        assert openai_error(http.post("/v1/chat/completions", json=chat_body()), 400)["message"] == detail
        status = http.get("/v1/system/status").json()
        assert (status["mlx_compatible"], status["system"]["mlx_compatible"]) == (False, False)
        assert http.get("/v1/models/demo/estimate").json()["refusal"].startswith(sentence)
        shown = http.get(f"/v1/discover/models/{LLAMA_ID}").json()
        assert (shown["system_compatible"], shown["compatibility_message"]) == (False, sentence)
