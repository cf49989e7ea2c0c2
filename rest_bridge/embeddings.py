"""The body of /v1/embeddings as a request of the contract, and its answer. Pure."""

import binascii

from mlxgui.v1 import inference_pb2
from rest_bridge.errors import JsonObject, invalid
from rest_bridge.json_body import Fields
from rest_bridge.openai import Options, read_prompts, read_scheduling, read_user, report_unread


def embedding_request(body: JsonObject) -> tuple[inference_pb2.EmbedRequest, Options]:
    """The vectors that a body of /v1/embeddings asks for. Raises ApiError (400)."""
    fields = Fields(body)
    options = Options(model=fields.text("model") or "")
    request = inference_pb2.EmbedRequest(model=options.model)
    request.inputs.extend(read_prompts(fields, "input"))
    dimensions = fields.integer("dimensions")
    if dimensions is not None:
        request.dimensions = dimensions
    match fields.text("encoding_format"):
        case None | "float":
            request.encoding = inference_pb2.EMBEDDING_ENCODING_FLOATS
        case "base64":
            request.encoding = inference_pb2.EMBEDDING_ENCODING_FLOAT32_LE
        case _:
            raise invalid("`encoding_format` must be `float` or `base64`.", "encoding_format")
    read_scheduling(fields, request)
    read_user(fields, request, options)
    report_unread(fields, options)
    return request, options


def embeddings(response: inference_pb2.EmbedResponse, options: Options) -> JsonObject:
    """The body of /v1/embeddings."""
    body: JsonObject = {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "embedding": list(embedding.floats.values)
                if embedding.WhichOneof("vector") == "floats"
                else binascii.b2a_base64(embedding.float32_le, newline=False).decode(),
                "index": embedding.index,
            }
            for embedding in response.embeddings
        ],
        "model": response.model or options.model,
        "usage": {
            "prompt_tokens": response.usage.prompt_token_count,
            "total_tokens": response.usage.total_token_count,
        },
    }
    warnings = options.told(response.warnings)
    return {**body, "warnings": warnings} if warnings else body
