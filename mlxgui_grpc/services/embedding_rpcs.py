"""The RPCs of InferenceService that turn texts into vectors and scores."""

from typing import Any

import grpc

from mlxgui.v1 import inference_pb2 as pb
from mlxgui.v1 import inference_pb2_grpc
from mlxgui_grpc.convert import embeddings
from mlxgui_grpc.embedding import Embedder

Context = grpc.aio.ServicerContext[Any, Any]


class EmbeddingRpcs(inference_pb2_grpc.InferenceServiceServicer):
    """Cancelling a call takes its texts out of the worker's queue after the pass that is running."""

    _embedder: Embedder

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        embedding = embeddings.embedding_from_proto(request)
        return embeddings.embeddings_to_proto(await self._embedder.embed(embedding), request.encoding)

    async def Rerank(self, request: pb.RerankRequest, context: Context) -> pb.RerankResponse:
        ranking = embeddings.rerank_from_proto(request)
        return embeddings.ranking_to_proto(await self._embedder.rerank(ranking), ranking.top_count)
