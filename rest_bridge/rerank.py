"""The body of /v1/rerank, as Jina's and Cohere's clients send it, as a request of the contract, and its answer."""

from dataclasses import dataclass, field

from mlxgui.v1 import inference_pb2
from rest_bridge.errors import JsonObject, invalid
from rest_bridge.json_body import Fields, text_value, type_name
from rest_bridge.openai import Options, read_scheduling, read_user, report_unread


@dataclass
class RerankOptions(Options):
    """What else a request says about the answer's form."""

    documents: list[str] = field(default_factory=list)
    """What the answer repeats beside the scores; empty: nothing."""


def rerank_request(body: JsonObject) -> tuple[inference_pb2.RerankRequest, RerankOptions]:
    """The scores that a body of /v1/rerank asks for. Raises ApiError (400)."""
    fields = Fields(body)
    options = RerankOptions(model=fields.text("model") or "")
    documents = _documents(fields)
    request = inference_pb2.RerankRequest(
        model=options.model,
        query=fields.required_text("query"),
        documents=documents,
    )
    top_count = fields.integer("top_n")
    if top_count is not None:
        # The clients send their own habit, whatever the number of documents.
        request.top_n = min(top_count, len(documents))
    if fields.boolean("return_documents"):
        options.documents = documents
    read_scheduling(fields, request)
    read_user(fields, request, options)
    report_unread(fields, options)
    return request, options


def ranking(response: inference_pb2.RerankResponse, options: RerankOptions) -> JsonObject:
    """The body of /v1/rerank."""
    results: list[JsonObject] = []
    for result in response.results:
        entry: JsonObject = {"index": result.index, "relevance_score": result.score}
        if options.documents:
            entry["document"] = {"text": options.documents[result.index]}
        results.append(entry)
    body: JsonObject = {
        "object": "list",
        "model": response.model or options.model,
        "results": results,
        "usage": {
            "prompt_tokens": response.usage.prompt_token_count,
            "total_tokens": response.usage.total_token_count,
        },
    }
    warnings = options.told(response.warnings)
    return {**body, "warnings": warnings} if warnings else body


def _documents(fields: Fields) -> list[str]:
    documents = fields.array("documents")
    if documents is None:
        fields.missing("documents")
    return [_document(fields, value, f"documents[{index}]") for index, value in enumerate(documents)]


def _document(fields: Fields, value: object, name: str) -> str:
    """A text, or an object that has one."""
    if isinstance(value, str):
        return text_value(value, name)
    if isinstance(value, dict):
        text = fields.child(value, name).text("text")
        if text is None:
            raise invalid(f"`{name}.text` is missing.", f"{name}.text")
        return text
    raise invalid(f"`{name}` must be a string or an object, not {type_name(value)}.", name)
