"""The machine and the settings as messages of the contract, and back."""

from collections.abc import Collection, Mapping

from google.protobuf import duration_pb2, field_mask_pb2

from mlxgui.v1 import system_pb2 as pb
from mlxgui_grpc.errors import InvalidRequestError, SettingNotFoundError
from mlxgui_grpc.machine import Machine
from mlxgui_grpc.memory import MachineMemory
from mlxgui_grpc.residency import DeviceInfo
from mlxgui_grpc.setting_table import SETTINGS, Value
from mlxgui_grpc.settings import Detail, Settings

DEFAULT_GRACE_SECONDS = 30.0


def host_to_proto(
    machine: Machine, memory: MachineMemory, device: DeviceInfo | None, used_bytes: int, *, runs_mlx: bool
) -> pb.HostInfo:
    """The machine now; the models use `used_bytes` of the device's memory."""
    host = pb.HostInfo(
        platform=machine.platform,
        architecture=machine.architecture,
        processor=machine.processor,
        is_apple_silicon=machine.is_apple_silicon,
        mlx_compatible=runs_mlx,
        memory=pb.MemoryInfo(
            total_bytes=memory.total_bytes,
            available_bytes=memory.available_bytes,
            used_bytes=memory.used_bytes,
            percent_used=round(memory.percent_used, 1),
        ),
    )
    if device is not None and device.is_gpu:
        host.gpu_memory.total_bytes = device.memory_bytes
        host.gpu_memory.available_bytes = max(0, device.memory_bytes - used_bytes)
        host.gpu_memory.device_name = device.name
    return host


def settings_to_proto(settings: Settings) -> pb.Settings:
    """The values in effect."""
    return pb.Settings(**{key: settings.value(key) for key in SETTINGS})  # type: ignore[arg-type]


def detail_to_proto(detail: Detail) -> pb.SettingDetail:
    """One setting."""
    return pb.SettingDetail(
        key=detail.key,
        source=pb.SettingSource.ValueType(int(detail.source)),
        pending_restart=detail.pending_restart,
        note=detail.note,
    )


def changes_from_proto(request: pb.UpdateSettingsRequest) -> tuple[Mapping[str, Value], Collection[str]]:
    """(values to store by key, keys to forget); raises SettingNotFoundError, InvalidRequestError."""
    changed, reset = _keys(request.update_mask), _keys(request.reset_mask)
    if not changed and not reset:
        raise InvalidRequestError("update_mask must name at least one setting", field="update_mask")
    values: dict[str, Value] = {}
    for key in changed:
        value = getattr(request.settings, key)
        values[key] = list(value) if SETTINGS[key].kind is list else value
    return values, reset


def grace_seconds(
    request: pb.ShutdownRequest | pb.RestartRequest,
) -> float:
    """How long running requests may go on; raises InvalidRequestError."""
    if not request.HasField("grace"):
        return DEFAULT_GRACE_SECONDS
    grace: duration_pb2.Duration = request.grace
    seconds = grace.seconds + grace.nanos / 1e9
    if seconds < 0:
        raise InvalidRequestError("grace must not be negative", field="grace")
    return seconds


def _keys(mask: field_mask_pb2.FieldMask) -> list[str]:
    for path in mask.paths:
        if path not in SETTINGS:
            raise SettingNotFoundError(f"Setting '{path}' not found", setting=path)
    return list(dict.fromkeys(mask.paths))
