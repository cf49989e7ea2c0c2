"""Vectors and scores from the real server: over gRPC, over REST, and through OpenAI's SDK."""

import base64
import json
import re
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import openai
import pytest

from mlxgui.v1 import common_pb2, inference_pb2, inference_pb2_grpc, model_pb2, model_pb2_grpc
from mlxgui_grpc.client import Client
from tests.conftest import RestSession
from tests.support_calls import CALL_SECONDS, fails, last_operation
from tests.support_calls import chat as chat_of
from tests.support_encoders import MAX_TOKENS, QWEN3_END, build_encoder
from tests.support_http import openai_error
from tests.support_server import RunningServer

Inference = inference_pb2_grpc.InferenceServiceStub
Models = model_pb2_grpc.ModelServiceStub

BERT, QWEN3, RANKER = "tiny-bert", "tiny-qwen3-embedding", "tiny-ranker"
TEXTS = ["the cat sat on the mat", "hello", "What is the capital of France?"]


@pytest.fixture(scope="module", autouse=True)
def installed(local_models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two embedding models and a cross-encoder, in this folder and on the session's server for this module."""
    folder = tmp_path_factory.mktemp("encoders")
    kinds = {BERT: "bert", QWEN3: "qwen3", RANKER: "bert-reranker"}
    for name, kind in kinds.items():
        path = build_encoder(folder / name, kind)
        request = model_pb2.InstallModelRequest(local_directory=str(path), name=name)
        assert last_operation(local_models.InstallModel(request)).HasField("success")
    yield folder
    for name in kinds:
        local_models.DeleteModel(model_pb2.DeleteModelRequest(name=name, force=True))


def embedding(*inputs: str | list[int], model: str = BERT, **fields: Any) -> inference_pb2.EmbedRequest:
    request = inference_pb2.EmbedRequest(model=model, **fields)
    for one in inputs:
        if isinstance(one, str):
            request.inputs.add(text=one)
        else:
            request.inputs.add().token_ids.ids.extend(one)
    return request


def embed(inference: Inference, *inputs: str | list[int], **fields: Any) -> inference_pb2.EmbedResponse:
    return inference.Embed(embedding(*inputs, **fields), timeout=CALL_SECONDS)


def vectors(reply: inference_pb2.EmbedResponse) -> Any:
    assert [one.index for one in reply.embeddings] == list(range(len(reply.embeddings)))
    return np.array([one.floats.values for one in reply.embeddings], np.float32)


def get(models: Models, name: str) -> model_pb2.Model:
    return models.GetModel(model_pb2.GetModelRequest(name=name)).model


def count(inference: Inference, text: str, model: str = BERT) -> int:
    prompt = inference_pb2.Prompt(text=text)
    return inference.CountTokens(inference_pb2.CountTokensRequest(model=model, prompt=prompt)).token_count


def test_a_model_says_what_it_makes(models: Models) -> None:
    bert, qwen3, ranker = (get(models, name) for name in (BERT, QWEN3, RANKER))
    assert (bert.type, bert.pooling, bert.embedding_dimensions, bert.context_length) == (
        model_pb2.MODEL_TYPE_EMBEDDING,
        model_pb2.POOLING_MEAN,
        48,
        MAX_TOKENS,
    )
    assert (qwen3.type, qwen3.pooling) == (model_pb2.MODEL_TYPE_EMBEDDING, model_pb2.POOLING_LAST_TOKEN)
    assert (ranker.type, ranker.pooling) == (model_pb2.MODEL_TYPE_RERANKER, model_pb2.POOLING_UNSPECIFIED)
    for model, capability in (
        (bert, model_pb2.CAPABILITY_EMBEDDING),
        (qwen3, model_pb2.CAPABILITY_EMBEDDING),
        (ranker, model_pb2.CAPABILITY_RERANK),
    ):
        assert list(model.capabilities) == [capability, model_pb2.CAPABILITY_BATCHING]
        assert not model.notes


def test_a_request_loads_its_model_and_its_usage_is_exact(inference: Inference, models: Models) -> None:
    require = {"load_policy": common_pb2.LOAD_POLICY_REQUIRE_LOADED}
    if get(models, BERT).state != model_pb2.MODEL_STATE_LOADED:
        assert fails(lambda: embed(inference, "hello", **require)).reason == "MODEL_NOT_LOADED"
    reply = embed(inference, *TEXTS)
    assert reply.model == BERT and vectors(reply).shape == (3, 48)
    assert np.allclose(np.linalg.norm(vectors(reply), axis=1), 1, atol=1e-6)
    counts = sum(count(inference, text) for text in TEXTS)
    assert (reply.usage.prompt_token_count, reply.usage.completion_token_count) == (counts, 0)
    assert reply.usage.total_token_count == counts
    assert reply.timing.total.ToMicroseconds() >= reply.timing.prefill.ToMicroseconds() > 0
    assert get(models, BERT).state == model_pb2.MODEL_STATE_LOADED
    again = embed(inference, *TEXTS, **require)
    assert not again.timing.HasField("load")


def token_ids(installed: Path, *words: str) -> list[int]:
    """Of BERT."""
    vocabulary = json.loads((installed / BERT / "tokenizer.json").read_text())["model"]["vocab"]
    return [vocabulary[word] for word in words]


def test_every_way_to_ask_gives_the_same_vectors(inference: Inference, installed: Path) -> None:
    """Alone or together, as text or as its token ids, as floats or as bytes, whole or cut and normalised again."""
    together = vectors(embed(inference, *TEXTS))
    for index, text in enumerate(TEXTS):
        assert np.abs(vectors(embed(inference, text))[0] - together[index]).max() < 1e-5
    encoded = embed(inference, *TEXTS, encoding=inference_pb2.EMBEDDING_ENCODING_FLOAT32_LE)
    raw = [np.frombuffer(one.float32_le, "<f4") for one in encoded.embeddings]
    assert np.abs(np.array(raw) - together).max() < 1e-6
    part = vectors(embed(inference, *TEXTS, dimensions=5))
    head = together[:, :5]
    assert np.allclose(part, head / np.linalg.norm(head, axis=1, keepdims=True), atol=1e-5)
    ids = token_ids(installed, "[CLS]", "hello", "[SEP]")
    mixed = embed(inference, "hello", ids, ids[1:])
    assert mixed.usage.prompt_token_count == 3 + 3 + 2
    text, same, other = vectors(mixed)
    assert np.abs(text - same).max() < 1e-6 < np.abs(text - other).max()


def test_qwen3_pools_its_end_token(inference: Inference) -> None:
    """Which the text does not have and the count does."""
    text, without = "hello", count(inference, "hello", model="demo")
    reply = embed(inference, text, model=QWEN3)
    assert reply.usage.prompt_token_count == count(inference, text, model=QWEN3) == without + 1
    ids = [5, 6, QWEN3_END]
    assert embed(inference, ids, model=QWEN3).usage.prompt_token_count == 3


REFUSED: list[tuple[inference_pb2.EmbedRequest, str, str, str]] = [
    (embedding(), "INVALID_PARAMETER", "inputs", "1 to 2048"),
    (embedding(*["x"] * 2049), "INVALID_PARAMETER", "inputs", "not 2049"),
    (embedding("x", ""), "INVALID_PARAMETER", "inputs[1]", "empty"),
    (embedding("x", []), "INVALID_PARAMETER", "inputs[1]", "empty"),
    (embedding([1, 99_999]), "INVALID_PARAMETER", "inputs[0]", "vocabulary"),
    (embedding([1, -1]), "INVALID_PARAMETER", "inputs[0]", "vocabulary"),
    (embedding("x", "a " * 200), "CONTEXT_LENGTH_EXCEEDED", "inputs[1]", f"202 tokens .* {MAX_TOKENS}"),
    (embedding("x", dimensions=0), "INVALID_PARAMETER", "dimensions", "at least 1"),
    (embedding("x", dimensions=49), "INVALID_PARAMETER", "dimensions", "at most 48"),
    (embedding("x", encoding=9), "INVALID_PARAMETER", "encoding", ""),
    (embedding("x", priority=101), "INVALID_PARAMETER", "priority", ""),
    (embedding("x", user="u" * 257), "PAYLOAD_TOO_LARGE", "user", ""),
    (embedding("x", model="demo"), "MODEL_TYPE_MISMATCH", "model", "makes no vectors.*Chat"),
    (embedding("x", model=RANKER), "MODEL_TYPE_MISMATCH", "model", "reranker.*Rerank"),
    (embedding("x", model="none"), "MODEL_NOT_FOUND", "", "none"),
]


@pytest.mark.parametrize(("request_", "reason", "field", "words"), REFUSED)
def test_what_cannot_be_embedded_is_refused_with_the_reason(
    inference: Inference, request_: inference_pb2.EmbedRequest, reason: str, field: str, words: str
) -> None:
    failure = fails(lambda: inference.Embed(request_, timeout=CALL_SECONDS))
    assert (failure.reason, failure.fields) == (reason, [field] if field else [])
    assert re.search(words, failure.message), failure.message


def test_an_embedding_model_does_not_chat(inference: Inference, http: RestSession) -> None:
    request = inference_pb2.GenerateRequest(model=BERT, prompts=[inference_pb2.Prompt(text="x")])
    failure = fails(lambda: inference.Generate(request, timeout=CALL_SECONDS))
    assert (failure.reason, failure.fields) == ("MODEL_TYPE_MISMATCH", ["model"])
    assert "embedding" in failure.message
    chat = inference_pb2.CountTokensRequest(chat=chat_of("x", BERT))
    failure = fails(lambda: inference.CountTokens(chat, timeout=CALL_SECONDS))
    assert (failure.reason, failure.fields) == ("MODEL_TYPE_MISMATCH", ["model"])
    assert "takes no chat: count a prompt" in failure.message
    body = {"model": BERT, "messages": [{"role": "user", "content": "x"}]}
    assert openai_error(http.post("/v1/chat/completions", json=body), 400)["code"] == "model_type_mismatch"


def test_many_callers_at_once_get_each_their_own(inference: Inference) -> None:
    """One of them with 2,048 texts, whom the others overtake, and who leaves then: the vectors do not suffer."""
    texts = [f"{word} {'a ' * (index % 60)}" for index in range(30) for word in ("cat", "dog")]
    alone = vectors(embed(inference, *texts[:4]))
    long = inference.Embed.future(embedding(*[f"{index} {'a ' * 80}" for index in range(2048)]))
    answers = [vectors(embed(inference, texts[0]))[0]]
    assert long.cancel()
    with ThreadPoolExecutor(8) as pool:
        answers += pool.map(lambda index: vectors(embed(inference, texts[index]))[0], [1, 2, 3, 0] * 4)
    for index, vector in enumerate(answers):
        assert np.abs(vector - alone[index % 4]).max() < 1e-5
    with pytest.raises(grpc.FutureCancelledError):
        long.result()
    assert len(embed(inference, "hello").embeddings) == 1


def test_documents_are_ranked(inference: Inference, http: RestSession) -> None:
    documents = ["Paris is the capital of France.", "the cat sat on the mat", "hello"]
    request = inference_pb2.RerankRequest(model=RANKER, query="What is the capital?", documents=documents)
    reply = inference.Rerank(request, timeout=CALL_SECONDS)
    scores = {result.index: result.score for result in reply.results}
    assert sorted(scores) == [0, 1, 2] and all(0 <= score <= 1 for score in scores.values())
    assert list(scores) == sorted(scores, key=lambda index: -scores[index])
    assert reply.usage.prompt_token_count == reply.usage.total_token_count > 20
    request.top_n = 2
    best = inference.Rerank(request, timeout=CALL_SECONDS)
    assert [result.index for result in best.results] == list(scores)[:2]

    objects = [documents[0], {"text": documents[1]}, documents[2]]
    body = {"model": RANKER, "query": "What is the capital?", "documents": objects}
    answer = http.post(
        "/v1/rerank", json={**body, "top_n": 10, "return_documents": True, "rank_fields": ["a"]}
    )
    assert answer.status_code == 200 and "`rank_fields`" in answer.headers["X-MLXGUI-Warnings"]
    assert [result["index"] for result in answer.json()["results"]] == list(scores)
    for result in answer.json()["results"]:
        assert result["document"] == {"text": documents[result["index"]]}
        assert abs(result["relevance_score"] - scores[result["index"]]) < 1e-5
    assert answer.json()["usage"]["total_tokens"] == reply.usage.total_token_count
    for changes, param in (
        ({"documents": []}, "documents"),
        ({"documents": ["a", ""]}, "documents[1]"),
        ({"documents": [{"title": "a"}]}, "documents[0].text"),
        ({"documents": ["a " * 200]}, "documents[0]"),
        ({"query": ""}, "query"),
        ({"top_n": 0}, "top_n"),
    ):
        assert openai_error(http.post("/v1/rerank", json={**body, **changes}), 400)["param"] == param
    error = openai_error(http.post("/v1/rerank", json={**body, "model": BERT}), 400)
    assert "install a cross-encoder" in error["message"]


def test_over_rest_as_openai_has_it(http: RestSession) -> None:
    """Every form of the input and both encodings; errors name the caller's field."""
    body: dict[str, Any] = {"model": BERT, "input": TEXTS, "encoding_format": "float", "user": "me"}
    answer = http.post("/v1/embeddings", json=body).json()
    assert (answer["object"], answer["model"]) == ("list", BERT)
    assert [(one["object"], one["index"]) for one in answer["data"]] == [("embedding", i) for i in range(3)]
    assert answer["usage"] == {"prompt_tokens": answer["usage"]["total_tokens"]} | answer["usage"]
    packed = http.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()
    for one, other in zip(answer["data"], packed["data"], strict=True):
        numbers = struct.unpack("<48f", base64.b64decode(other["embedding"]))
        assert np.abs(np.array(numbers) - one["embedding"]).max() < 1e-6
    for given, length in (("hello", 1), ([2, 9, 3], 1), ([[2, 9, 3], [2, 3]], 2)):
        assert len(http.post("/v1/embeddings", json={**body, "input": given}).json()["data"]) == length
    unknown = http.post("/v1/embeddings", json={**body, "input_type": "query"})
    assert unknown.status_code == 200 and "`input_type`" in unknown.headers["X-MLXGUI-Warnings"]
    for changes, param in (
        ({"input": ""}, "input[0]"),
        ({"input": []}, "input"),
        ({"input": ["a", "b " * 200]}, "input[1]"),
        ({"dimensions": 49}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
    ):
        assert openai_error(http.post("/v1/embeddings", json={**body, **changes}), 400)["param"] == param
    error = openai_error(http.post("/v1/embeddings", json={**body, "model": "demo"}), 400)
    assert error["code"] == "model_type_mismatch" and "GET /v1/discover/embeddings" in error["message"]


def test_openai_s_sdk_decodes_its_default_to_the_same(server: RunningServer) -> None:
    with openai.OpenAI(
        base_url=f"{server.rest_url}/v1",
        api_key="sk-any",
        http_client=openai.DefaultHttpxClient(trust_env=False),
    ) as client:
        plain = client.embeddings.create(model=BERT, input=TEXTS)  # base64 on the wire
        floats = client.embeddings.create(model=BERT, input=TEXTS, encoding_format="float")
        assert (
            np.abs(np.array([a.embedding for a in plain.data]) - [b.embedding for b in floats.data]).max()
            < 1e-6
        )
        short = client.embeddings.create(model=BERT, input="hello", dimensions=8)
        assert len(short.data[0].embedding) == 8 and short.usage.total_tokens == 3
        with pytest.raises(openai.BadRequestError, match="makes no vectors"):
            client.embeddings.create(model="demo", input="hello")


def test_our_own_client(server: RunningServer) -> None:
    with Client(server.grpc_address) as client:
        reply = client.embed(BERT, TEXTS, dimensions=4)
        assert (len(reply.vectors), len(reply.vectors[0]), reply.model) == (3, 4, BERT)
        assert reply.usage.prompt_token_count > 3
        ranking = client.rerank(RANKER, "what", ["the cat", "hello"], top_n=1)
        assert len(ranking.results) == 1
