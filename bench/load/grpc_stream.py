"""A gRPC chat client with the generated stubs: one ChatStream call per request, one channel."""

import time

import grpc
import grpc.aio

from bench.load import closed_loop
from bench.load.serve import serve
from bench.load.tally import Tally
from bench.protocol import Order
from mlxgui.v1 import common_pb2, inference_pb2, inference_pb2_grpc

# Quoted: that class exists in the stubs of types alone.
_stubs: dict[str, "inference_pb2_grpc.InferenceServiceAsyncStub"] = {}


def connect(order: Order) -> closed_loop.Chat:
    """A client of the InferenceService at the order's endpoint; its channel stays open over all orders."""
    stub = _stubs.get(order.endpoint)
    if stub is None:
        stub = inference_pb2_grpc.InferenceServiceStub(grpc.aio.insecure_channel(order.endpoint))
        _stubs[order.endpoint] = stub

    async def chat(prompt: str, max_tokens: int, tally: Tally) -> None:
        request = inference_pb2.ChatStreamRequest(
            request=inference_pb2.ChatRequest(
                model=order.model,
                messages=[
                    inference_pb2.ChatMessage(
                        role=inference_pb2.ROLE_USER, content=[inference_pb2.ContentPart(text=prompt)]
                    )
                ],
                sampling=common_pb2.SamplingParams(max_tokens=max_tokens, temperature=0),
            )
        )
        reply = tally.begin(max_tokens)
        tokens: int | None = None
        call = stub.ChatStream(request)
        try:
            async for response in call:
                event = response.WhichOneof("event")
                if event == "delta":
                    delta = response.delta
                    if delta.text or delta.reasoning:
                        tally.event(reply, time.perf_counter(), delta.token_count or 1)
                elif event == "end":
                    tokens = response.end.usage.completion_token_count
        except grpc.aio.AioRpcError as error:
            raise RuntimeError(f"{error.code().name} {error.details()}") from error
        finally:
            call.cancel()
        if reply.first is None:
            raise RuntimeError("the reply had no text")
        tally.end(reply, tokens)

    return chat


if __name__ == "__main__":
    serve(connect)
