"""Snapshots, as the client streams them: of long actions, and of what is in memory."""

from mlxgui.v1 import model_pb2
from mlxgui_grpc.client.failures import failure_of_operation

OperationResponse = (
    model_pb2.InstallModelResponse
    | model_pb2.UpdateModelResponse
    | model_pb2.LoadModelResponse
    | model_pb2.WatchOperationResponse
)


def snapshot(response: OperationResponse) -> model_pb2.Operation:
    """The operation as it stands; raises what it failed with."""
    if response.operation.HasField("error"):
        raise failure_of_operation(response.operation.error)
    return response.operation


def manager_snapshot(response: model_pb2.WatchManagerResponse) -> model_pb2.ManagerSnapshot:
    """What is in memory at that moment."""
    return response.snapshot
