"""Embedding and reranking as the clients have them: plain arguments to requests, and what comes back."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from mlxgui.v1 import common_pb2, inference_pb2
from mlxgui_grpc.client.messages import checked, duration, load_policy


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The vectors of texts, in their order, each of length 1."""

    model: str
    vectors: tuple[Sequence[float], ...]
    usage: common_pb2.Usage
    timing: common_pb2.Timing
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ranking:
    """The scores of documents, best first; `index` is a document's place in the request."""

    model: str
    results: tuple[inference_pb2.RerankResult, ...]
    usage: common_pb2.Usage
    timing: common_pb2.Timing
    warnings: tuple[str, ...]


@checked
def embed_request(
    model: str,
    inputs: str | Sequence[str] | Sequence[Sequence[int]],
    *,
    dimensions: int | None,
    keep_alive_seconds: float | None,
    require_loaded: bool,
) -> inference_pb2.EmbedRequest:
    """The request for those arguments of `Client.embed`."""
    request = inference_pb2.EmbedRequest(
        model=model,
        dimensions=dimensions,
        encoding=inference_pb2.EMBEDDING_ENCODING_FLOAT32_LE,
        keep_alive=duration(keep_alive_seconds),
        load_policy=load_policy(require_loaded),
    )
    for one in [inputs] if isinstance(inputs, str) else inputs:
        if isinstance(one, str):
            request.inputs.add(text=one)
        else:
            request.inputs.add().token_ids.ids.extend(one)
    return request


@checked
def rerank_request(
    model: str,
    query: str,
    documents: Sequence[str],
    *,
    top_n: int | None,
    keep_alive_seconds: float | None,
    require_loaded: bool,
) -> inference_pb2.RerankRequest:
    """The request for those arguments of `Client.rerank`."""
    return inference_pb2.RerankRequest(
        model=model,
        query=query,
        documents=documents,
        top_n=top_n,
        keep_alive=duration(keep_alive_seconds),
        load_policy=load_policy(require_loaded),
    )


def embeddings(response: inference_pb2.EmbedResponse) -> Embeddings:
    """The vectors that a response holds."""
    return Embeddings(
        model=response.model,
        vectors=tuple(array("f", one.float32_le) for one in response.embeddings),
        usage=response.usage,
        timing=response.timing,
        warnings=tuple(response.warnings),
    )


def ranking(response: inference_pb2.RerankResponse) -> Ranking:
    """The ranking that a response is."""
    return Ranking(
        model=response.model,
        results=tuple(response.results),
        usage=response.usage,
        timing=response.timing,
        warnings=tuple(response.warnings),
    )
