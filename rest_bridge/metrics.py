"""The bridge's own metrics; those of the models are the server's."""

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})


class BridgeMetrics:
    """HTTP requests by route. Any thread may use it."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "mlxgui:http_requests",
            "HTTP requests answered, streams when they begin",
            ["method", "route", "code"],
            registry=self._registry,
        )
        self.live_calls = Gauge(
            "mlxgui:http_live_calls",
            "Long requests in progress",
            registry=self._registry,
        )

    def count(self, method: str, route: str, status: int) -> None:
        # A label has few values, whatever is sent.
        self._requests.labels(method if method in _METHODS else "other", route, str(status)).inc()

    def exposition(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self._registry)
