"""Long actions: list, show, cancel."""

from flask import Blueprint, Response

from mlxgui.v1 import model_pb2
from rest_bridge import native, web

blueprint = Blueprint("operations", __name__)


@blueprint.get("/v1/operations")
def list_operations() -> Response:
    fields = web.query()
    include_done = fields.boolean("include_done")
    message = model_pb2.ListOperationsRequest(
        page_size=fields.integer_between("limit", 1, 1000) or 50,
        page_token=fields.text("page_token") or "",
        include_done=True if include_done is None else include_done,
    )
    fields.refuse_unread()
    answer = web.ask(web.bridge().backend.models.ListOperations, message)
    return web.json_response(
        {
            "operations": [native.operation_json(operation) for operation in answer.operations],
            "next_page_token": answer.next_page_token or None,
        }
    )


@blueprint.get("/v1/operations/<operation_id>")
def show_operation(operation_id: str) -> Response:
    web.no_query()
    answer = web.ask(web.bridge().backend.models.GetOperation, model_pb2.GetOperationRequest(id=operation_id))
    return web.json_response(native.operation_json(answer.operation))


@blueprint.delete("/v1/operations/<operation_id>")
def cancel_operation(operation_id: str) -> Response:
    web.parameters().refuse_unread()
    message = model_pb2.CancelOperationRequest(id=operation_id)
    answer = web.ask_to_change(web.bridge().backend.models.CancelOperation, message)
    return web.json_response(native.operation_json(answer.operation))
