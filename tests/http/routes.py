"""Every route of the bridge, as its own table has them."""

from dataclasses import dataclass

from werkzeug.routing import Map

from rest_bridge import backend
from rest_bridge.app import create_app
from rest_bridge.calls import LiveCalls
from rest_bridge.config import BridgeConfig
from rest_bridge.metrics import BridgeMetrics
from rest_bridge.web import Bridge

PLACES = {
    "<path:name>": "demo",
    "<path:model_id>": "routes/none",
    "<operation_id>": "none",
    "<key>": "log_level",
}
BODIES: dict[str, dict[str, object]] = {
    "models.install_model": {"model_id": "routes/none"},
    "models.generate": {"prompt": "x", "max_tokens": 1},
    "manager.set_priority": {"priority": 0},
    "system.set_setting": {"value": "INFO"},
    "openai.create_chat_completion": {
        "model": "demo",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 1,
    },
    "openai.create_completion": {"model": "demo", "prompt": "x", "max_tokens": 1},
    "openai.create_embedding": {"model": "demo", "input": "x"},
    "openai.create_ranking": {"model": "demo", "query": "x", "documents": ["x"]},
    "responses.create_response": {"model": "demo", "input": "x", "max_output_tokens": 1},
    "messages.create_message": {
        "model": "demo",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 1,
    },
    "messages.count_tokens": {"model": "demo", "messages": [{"role": "user", "content": "x"}]},
}
"""A body for each route that needs one."""


@dataclass(frozen=True)
class Route:
    """One method of one path, filled in, and what it is called in the bridge."""

    endpoint: str
    method: str
    rule: str

    @property
    def path(self) -> str:
        return self.filled({})

    def filled(self, names: dict[str, str]) -> str:
        """The path with these names, which are written as they are, in place of the usual ones."""
        path = self.rule
        for place, name in {**PLACES, **names}.items():
            path = path.replace(place, name)
        return path

    @property
    def body(self) -> dict[str, object] | None:
        return BODIES.get(self.endpoint)


def all_routes() -> list[Route]:
    """HEAD aside."""
    return sorted(
        (
            Route(rule.endpoint, method, rule.rule)
            for rule in url_map().iter_rules()
            for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        ),
        key=lambda route: (route.rule, route.method),
    )


def url_map() -> Map:
    """The routes of an application that is connected to nothing."""
    services = backend.connect("unix:/nowhere")
    try:
        bridge = Bridge(
            BridgeConfig(target="unix:/nowhere"), services, LiveCalls(limit=1), BridgeMetrics(), "test"
        )
        return create_app(bridge).url_map
    finally:
        services.channel.close()
