"""Changing the settings of a server, and waiting for it to come back from a restart."""

from typing import Any

import grpc
from google.protobuf import duration_pb2, field_mask_pb2

from mlxgui.v1 import system_pb2 as pb
from mlxgui.v1 import system_pb2_grpc
from tests.support_metrics import wait_until

RESTART_SECONDS = 120.0


def update(
    system: system_pb2_grpc.SystemServiceStub, *reset: str, **values: Any
) -> pb.UpdateSettingsResponse:
    """Set `values` and reset the other keys, in one call."""
    return system.UpdateSettings(
        pb.UpdateSettingsRequest(
            settings=pb.Settings(**values),
            update_mask=field_mask_pb2.FieldMask(paths=list(values)),
            reset_mask=field_mask_pb2.FieldMask(paths=list(reset)),
        )
    )


def details(system: system_pb2_grpc.SystemServiceStub) -> dict[str, pb.SettingDetail]:
    """What there is to know about each setting, by key."""
    return {detail.key: detail for detail in system.GetSettings(pb.GetSettingsRequest()).details}


def info(system: system_pb2_grpc.SystemServiceStub) -> pb.GetServerInfoResponse:
    return system.GetServerInfo(pb.GetServerInfoRequest())


def restart(
    system: system_pb2_grpc.SystemServiceStub, grace_seconds: int | None = None
) -> pb.RestartResponse:
    grace = None if grace_seconds is None else duration_pb2.Duration(seconds=grace_seconds)
    return system.Restart(pb.RestartRequest(grace=grace))


def shutdown(
    system: system_pb2_grpc.SystemServiceStub, grace_seconds: int | None = None
) -> pb.ShutdownResponse:
    grace = None if grace_seconds is None else duration_pb2.Duration(seconds=grace_seconds)
    return system.Shutdown(pb.ShutdownRequest(grace=grace))


def wait_until_restarted(
    system: system_pb2_grpc.SystemServiceStub, before: pb.GetServerInfoResponse
) -> pb.GetServerInfoResponse:
    """What the server says of itself once a later start of it serves."""
    found: list[pb.GetServerInfoResponse] = []

    def is_back() -> bool:
        try:
            now = info(system)
        except grpc.RpcError:
            return False
        found[:] = [now]
        is_later = now.start_time.ToNanoseconds() > before.start_time.ToNanoseconds()
        return is_later and now.state == pb.SERVER_STATE_RUNNING

    wait_until(is_back, "the server is back")
    return found[0]
