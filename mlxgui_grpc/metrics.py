"""The server's metrics, named as vLLM names them, under the prefix `mlxgui:`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from mlxgui_grpc.engine.frames import Spent

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5.0, 10.0, 30.0, 60.0)
_SLOW = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)


class Metrics:
    """All series of one server, in a registry of its own. Use on the event loop only."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        model = ["model_name"]
        self._running = Gauge(
            "mlxgui:num_requests_running",
            "Requests submitted to an engine and not ended",
            model,
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "mlxgui:prompt_tokens", "Prompt tokens accepted", model, registry=registry
        )
        self._generation_tokens = Counter(
            "mlxgui:generation_tokens", "Tokens decoded", model, registry=registry
        )
        self._success = Counter(
            "mlxgui:request_success", "Choices finished", [*model, "finished_reason"], registry=registry
        )
        self._first_token = Histogram(
            "mlxgui:time_to_first_token_seconds",
            "Call to first token",
            model,
            buckets=_FAST,
            registry=registry,
        )
        self._per_token = Histogram(
            "mlxgui:time_per_output_token_seconds",
            "Decode time per token of a request, after its first",
            model,
            buckets=_FAST,
            registry=registry,
        )
        self._latency = Histogram(
            "mlxgui:e2e_request_latency_seconds",
            "Call to last token",
            model,
            buckets=_SLOW,
            registry=registry,
        )
        self._queue_time = Histogram(
            "mlxgui:request_queue_time_seconds",
            "Arrival in the worker to prefill",
            model,
            buckets=_FAST,
            registry=registry,
        )
        self._prefill_time = Histogram(
            "mlxgui:request_prefill_time_seconds",
            "Prefill to first token",
            model,
            buckets=_FAST,
            registry=registry,
        )
        self._decode_time = Histogram(
            "mlxgui:request_decode_time_seconds",
            "First to last token",
            model,
            buckets=_SLOW,
            registry=registry,
        )
        self.calls = Counter(
            "mlxgui:grpc_calls", "Finished gRPC calls", ["method", "code"], registry=registry
        )
        self.call_seconds = Histogram(
            "mlxgui:grpc_call_seconds", "Duration of gRPC calls", ["method"], buckets=_SLOW, registry=registry
        )
        self.waiting = Gauge(
            "mlxgui:num_requests_waiting", "Requests that wait for their prefill", model, registry=registry
        )
        self.kv_bytes = Gauge(
            "mlxgui:kv_cache_bytes", "KV cache of the running requests", model, registry=registry
        )
        self.memory = Gauge(
            "mlxgui:process_resident_memory_bytes",
            "Resident set of each process",
            ["process"],
            registry=registry,
        )
        self.mlx_memory = Gauge(
            "mlxgui:mlx_active_memory_bytes", "MLX's active memory", model, registry=registry
        )

    def exposition(self) -> tuple[str, bytes]:
        """(content type, body) of the Prometheus text format."""
        return CONTENT_TYPE_PLAIN_0_0_4, generate_latest(self._registry)

    @contextmanager
    def request(self, model: str) -> Iterator["RequestMetrics"]:
        """Count a request as running while the block runs."""
        running = self._running.labels(model)
        running.inc()
        try:
            yield RequestMetrics(self, model)
        finally:
            running.dec()


class RequestMetrics:
    """What is observed of one request."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self.first_token: Callable[[float], None] = metrics._first_token.labels(model).observe
        self.accepted: Callable[[float], None] = metrics._prompt_tokens.labels(model).inc

    def finished(self, reason: str, spent: Spent) -> None:
        """One choice is complete."""
        metrics, model = self._metrics, self._model
        metrics._success.labels(model, reason).inc()
        metrics._queue_time.labels(model).observe(spent.queue)
        metrics._prefill_time.labels(model).observe(spent.prefill)
        metrics._decode_time.labels(model).observe(spent.decode)

    def answered(self, queue_seconds: float, compute_seconds: float, total_seconds: float) -> None:
        """Vectors or scores are complete: nothing was decoded."""
        metrics, model = self._metrics, self._model
        metrics._success.labels(model, "stop").inc()
        metrics._queue_time.labels(model).observe(queue_seconds)
        metrics._prefill_time.labels(model).observe(compute_seconds)
        metrics._latency.labels(model).observe(total_seconds)

    def ended(self, token_count: int, total_seconds: float, decode_seconds: float) -> None:
        """The request is complete. `decode_seconds` are those from its first token to its last."""
        metrics, model = self._metrics, self._model
        metrics._generation_tokens.labels(model).inc(token_count)
        metrics._latency.labels(model).observe(total_seconds)
        if token_count > 1:
            metrics._per_token.labels(model).observe(decode_seconds / (token_count - 1))
