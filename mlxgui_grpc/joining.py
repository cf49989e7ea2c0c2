"""Decides whether a call joins an operation that is there already."""

from typing import Any

from mlxgui_grpc.errors import InvalidRequestError, ModelExistsError, ModelInUseError
from mlxgui_grpc.operations import Operation, Operations


def joinable(operations: Operations, kind: str, name: str, request: dict[str, Any]) -> Operation | None:
    """The operation of this kind that does, or did, what `request` asks for; a failed one is not joined.

    `request` has a `request_id`, empty where the caller gave none. Raises InvalidRequestError where that was used for
    something else, ModelExistsError or ModelInUseError where something else is under way for the name.
    """

    def is_same(operation: Operation) -> bool:
        return (
            operation.kind == kind
            and operation.model.casefold() == name.casefold()
            and {**operation.request, "request_id": ""} == {**request, "request_id": ""}
        )

    if request_id := request["request_id"]:
        if len(request_id) > 36 or not request_id.isascii():
            raise InvalidRequestError("request_id must be at most 36 ASCII characters", field="request_id")
        for operation in operations.list(include_done=True):
            if operation.request.get("request_id") != request_id:
                continue
            if not is_same(operation):
                raise InvalidRequestError(
                    f"request_id was used for another {operation.kind}: choose another",
                    field="request_id",
                )
            if operation.result is not None or not operation.is_done:
                return operation
    running = operations.running(kind, name)
    if running is None or is_same(running):
        return running
    if kind == "update":
        raise ModelInUseError(
            f"Model '{name}' is being updated to another revision; wait for operation {running.id}",
            model=name,
        )
    raise ModelExistsError(
        f"A model named '{name}' is being installed from elsewhere; choose another name", model=name
    )
