"""The server itself: how it does, how it is set, and ending it; blocking."""

from typing import Unpack

from grpc_health.v1 import health_pb2

from mlxgui.v1 import system_pb2
from mlxgui_grpc.client import management
from mlxgui_grpc.client import messages as conversion
from mlxgui_grpc.client.blocking.connection import Connection
from mlxgui_grpc.client.management import SettingValues


class ServerCalls(Connection):
    """SystemService, and the standard health check."""

    def server_info(self) -> system_pb2.GetServerInfoResponse:
        """What the server is: version, addresses, capabilities and limits."""
        request = system_pb2.GetServerInfoRequest()
        return self._call(self._system.GetServerInfo, request, self._timeout_seconds)

    def system_status(self) -> system_pb2.GetSystemStatusResponse:
        """How the machine and the models do."""
        request = system_pb2.GetSystemStatusRequest()
        return self._call(self._system.GetSystemStatus, request, self._timeout_seconds)

    def settings(self) -> system_pb2.GetSettingsResponse:
        """The settings in effect, and what there is to know about each."""
        request = system_pb2.GetSettingsRequest()
        return self._call(self._system.GetSettings, request, self._timeout_seconds)

    def set_settings(self, **values: Unpack[SettingValues]) -> system_pb2.UpdateSettingsResponse:
        """Change settings, all of them or none; the answer says which take effect only after `restart`."""
        request = management.settings_request(values)
        return self._call(self._system.UpdateSettings, request, self._timeout_seconds)

    def reset_settings(self, *keys: str) -> system_pb2.UpdateSettingsResponse:
        """Forget what was set, so that config.toml or the default counts again."""
        request = management.reset_request(keys)
        return self._call(self._system.UpdateSettings, request, self._timeout_seconds)

    def shutdown(self, *, grace_seconds: float | None = None) -> int:
        """End the server; answers at once, with the number of requests that it still lets finish.

        They may go on for `grace_seconds`, by default 30.
        """
        grace = conversion.duration(grace_seconds, "grace")
        request = conversion.checked(system_pb2.ShutdownRequest)(grace=grace)
        return self._call(self._system.Shutdown, request, self._timeout_seconds).in_flight_count

    def restart(self, *, grace_seconds: float | None = None) -> int:
        """End the server as `shutdown` does and start it again in the same process; answers at once."""
        grace = conversion.duration(grace_seconds, "grace")
        request = conversion.checked(system_pb2.RestartRequest)(grace=grace)
        return self._call(self._system.Restart, request, self._timeout_seconds).in_flight_count

    def is_serving(self, service: str = "") -> bool:
        """Whether the server, one service or one model (`model/<name>`) serves: the standard health check."""
        request = conversion.checked(health_pb2.HealthCheckRequest)(service=service)
        response = self._call(self._check_health, request, self._timeout_seconds)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)
