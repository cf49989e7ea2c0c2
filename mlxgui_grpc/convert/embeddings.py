"""Embedding and reranking: requests of the contract, checked, and what is answered."""

import sys
from array import array

from mlxgui.v1 import common_pb2, inference_pb2
from mlxgui_grpc.convert.requests import check_user, prompt_from_proto
from mlxgui_grpc.convert.values import duration, keep_alive_seconds, model_name, priority
from mlxgui_grpc.embedding import Answered, EmbeddingRequest, RerankRequest, Use
from mlxgui_grpc.engine import frames
from mlxgui_grpc.errors import InvalidRequestError

MAX_INPUTS = 2_048


def embedding_from_proto(request: inference_pb2.EmbedRequest) -> EmbeddingRequest:
    """Texts to embed; raises InvalidRequestError naming the field."""
    _check_count(len(request.inputs), "inputs")
    if request.HasField("dimensions") and request.dimensions < 1:
        raise InvalidRequestError("dimensions must be at least 1", field="dimensions")
    if request.encoding not in inference_pb2.EmbeddingEncoding.values():
        raise InvalidRequestError("encoding is none of this version's", field="encoding")
    return EmbeddingRequest(
        use=_use(request),
        prompts=[prompt_from_proto(prompt, f"inputs[{i}]") for i, prompt in enumerate(request.inputs)],
        dimensions=request.dimensions,
    )


def embeddings_to_proto(
    answered: Answered[frames.Embedded], encoding: inference_pb2.EmbeddingEncoding.ValueType
) -> inference_pb2.EmbedResponse:
    """The vectors, in the encoding asked for."""
    result = answered.result
    # Four bytes a number.
    size = 4 * result.dimensions
    vectors = [result.vectors[start : start + size] for start in range(0, len(result.vectors), size)]
    response = inference_pb2.EmbedResponse(
        model=answered.model, usage=_usage(result), timing=_timing(answered), warnings=answered.warnings
    )
    for index, vector in enumerate(vectors):
        entry = response.embeddings.add(index=index)
        if encoding == inference_pb2.EMBEDDING_ENCODING_FLOAT32_LE:
            entry.float32_le = vector
        else:
            entry.floats.values.extend(_floats(vector))
    return response


def rerank_from_proto(request: inference_pb2.RerankRequest) -> RerankRequest:
    """Documents to score; raises InvalidRequestError naming the field."""
    if not request.query:
        raise InvalidRequestError("query must not be empty", field="query")
    _check_count(len(request.documents), "documents")
    for index, document in enumerate(request.documents):
        if not document:
            raise InvalidRequestError(f"documents[{index}] must not be empty", field=f"documents[{index}]")
    count = len(request.documents)
    if request.HasField("top_n") and not 1 <= request.top_n <= count:
        raise InvalidRequestError(
            f"top_n must be between 1 and {count}, the number of documents", field="top_n"
        )
    return RerankRequest(
        use=_use(request),
        query=request.query,
        documents=list(request.documents),
        top_count=request.top_n or count,
    )


def ranking_to_proto(answered: Answered[frames.Reranked], top_count: int) -> inference_pb2.RerankResponse:
    """The best documents, best first; equal ones in their order."""
    scores = answered.result.scores
    best = sorted(range(len(scores)), key=lambda index: -scores[index])[:top_count]
    return inference_pb2.RerankResponse(
        model=answered.model,
        results=[inference_pb2.RerankResult(index=index, score=scores[index]) for index in best],
        usage=_usage(answered.result),
        timing=_timing(answered),
        warnings=answered.warnings,
    )


def _check_count(count: int, field: str) -> None:
    if not 1 <= count <= MAX_INPUTS:
        raise InvalidRequestError(f"{field} must have 1 to {MAX_INPUTS} entries, not {count}", field=field)


def _use(request: inference_pb2.EmbedRequest | inference_pb2.RerankRequest) -> Use:
    check_user(request.user)
    return Use(
        model=model_name(request.model),
        priority=priority(request.priority),
        keep_alive_seconds=keep_alive_seconds(request),
        require_loaded=request.load_policy == common_pb2.LOAD_POLICY_REQUIRE_LOADED,
    )


def _usage(result: frames.Embedded | frames.Reranked) -> common_pb2.Usage:
    count = result.prompt_token_count
    return common_pb2.Usage(prompt_token_count=count, total_token_count=count)


def _timing(answered: Answered[frames.Embedded] | Answered[frames.Reranked]) -> common_pb2.Timing:
    return common_pb2.Timing(
        queue=duration(answered.result.queue_seconds),
        load=duration(answered.load_seconds) if answered.load_seconds else None,
        prefill=duration(answered.result.compute_seconds),
        total=duration(answered.total_seconds),
    )


def _floats(vector: bytes) -> "array[float]":
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
