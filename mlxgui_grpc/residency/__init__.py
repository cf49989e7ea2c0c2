"""Who is in memory: who may come in, who has to go, and who waits."""

from mlxgui_grpc.residency.budget import DeviceInfo
from mlxgui_grpc.residency.residency import Residency
from mlxgui_grpc.residency.residents import Lease, Limits, LoadWish, Resident
from mlxgui_grpc.residency.snapshot import ModelStatus, QueuedLoad, Snapshot

__all__ = [
    "DeviceInfo",
    "Lease",
    "Limits",
    "LoadWish",
    "ModelStatus",
    "QueuedLoad",
    "Residency",
    "Resident",
    "Snapshot",
]
