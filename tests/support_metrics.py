"""Reads the server's gauges, and waits for a state that the server reaches by itself."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping

from prometheus_client.parser import text_string_to_metric_families

from mlxgui.v1 import system_pb2, system_pb2_grpc

DEADLINE_SECONDS = 60.0


class Gauges:
    """The metrics as they are at each look: `gauges["num_requests_running"]["demo"]`; 0 where there is none."""

    def __init__(self, system: system_pb2_grpc.SystemServiceStub) -> None:
        self._system = system

    def __getitem__(self, name: str) -> Mapping[str, float]:
        body = self._system.GetMetrics(system_pb2.GetMetricsRequest()).body.decode()
        values: dict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(body):
            for sample in family.samples:
                if sample.name == f"mlxgui:{name}":
                    values[sample.labels.get("model_name") or sample.labels.get("process", "")] += (
                        sample.value
                    )
        return values

    def is_idle(self, model: str) -> bool:
        """No request of the model runs, waits, or holds a KV cache."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_bytes")
        return all(self[name][model] == 0 for name in names)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = DEADLINE_SECONDS) -> None:
    """Return once the condition holds; the time is generous and no test depends on how long it took."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain until {what}"
        time.sleep(0.02)
