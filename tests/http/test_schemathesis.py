"""Schemathesis asks for whatever the API's description allows: no 5xx, and every answer is as described.

A few examples of each route in each run. The campaign, on a server of its own: SCHEMATHESIS_EXAMPLES=200
python -m pytest -m campaign tests/http/test_schemathesis.py
"""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from rest_bridge.errors import JsonObject
from tests.conftest import HTTP_SECONDS, RestSession
from tests.support_server import RunningServer

EXAMPLES = 2
CHECKS = [
    schemathesis.checks.not_a_server_error,
    response_schema_conformance,
    content_type_conformance,
    status_code_conformance,
]
ENDING = {"/v1/system/shutdown", "/v1/system/restart"}
ENDLESS = {"/v1/manager/watch"}
CHANGING = {
    ("put", "/v1/settings/{key}"),
    ("delete", "/v1/settings/{key}"),
}
"""What would change the shared server for the tests after it; the campaign asks these too."""
KEPT = {
    ("delete", "/v1/models/{name}"),
    ("post", "/v1/models/{name}/unload"),
    ("post", "/v1/models/{name}/pin"),
}
"""What the demo model is spared; a model that is not there is not."""
NAMES = {"name": ["demo", "none"], "model_id": ["none/none"], "operation_id": ["none"], "key": ["log_level"]}


def operations(document: JsonObject) -> list[Any]:
    """Those that schemathesis may ask for: audio is declared as not implemented."""
    schema = schemathesis.openapi.from_dict(document)
    found = []
    for path, item in document["paths"].items():
        if path in ENDING | ENDLESS or path.startswith("/v1/audio/"):
            continue
        found += [schema[path][method] for method in item]
    return found


def cheap(case: Any) -> Any:
    """The case about a model that is there, with few tokens to decode."""
    body = case.body
    if isinstance(body, dict) and {"messages", "prompt", "input"} & body.keys():
        if isinstance(body.get("model"), str | None):
            body["model"] = "demo"
        if case.path in ("/v1/chat/completions", "/v1/completions", "/v1/messages"):
            body["max_tokens"] = 2
            body.pop("max_completion_tokens", None)
        elif case.path == "/v1/responses":
            body["max_output_tokens"] = 2
    return case


def cases(operation: Any, mode: Any) -> Any:
    """Cases of one operation, about a model that is there or one that is not."""
    places = [place for place in NAMES if "{" + place + "}" in operation.path]
    if not places:
        return operation.as_strategy(generation_mode=mode).map(cheap)
    names = NAMES[places[0]]
    if (operation.method, operation.path) in KEPT:
        names = ["none"]
    return (
        st.sampled_from(names)
        .flatmap(lambda name: operation.as_strategy(generation_mode=mode, path_parameters={places[0]: name}))
        .map(cheap)
    )


def run(base_url: str, asked: Iterable[Any], examples: int) -> Counter[int]:
    """Asks `examples` cases of each operation that are right, and as many that are not; how often each status came."""
    statuses: Counter[int] = Counter()
    with requests.Session() as session:
        session.trust_env = False
        for operation in asked:
            for mode in GenerationMode:

                @settings(
                    max_examples=examples,
                    deadline=None,
                    database=None,
                    derandomize=True,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                @given(cases(operation, mode))
                def check(case: Any) -> None:
                    response = case.call(base_url=base_url, session=session, timeout=HTTP_SECONDS)
                    statuses[response.status_code] += 1
                    case.validate_response(response, checks=CHECKS)

                # Where nothing is asked for nothing can be wrong.
                with contextlib.suppress(Unsatisfiable):
                    check()
    return statuses


def test_what_the_description_allows_is_answered_as_described(http: RestSession) -> None:
    """On the shared server, which is left as it was."""
    asked = [
        operation
        for operation in operations(http.get("/openapi.json").json())
        if (operation.method, operation.path) not in CHANGING
    ]
    statuses = run(http.base_url, asked, EXAMPLES)
    assert statuses[200] > len(asked) / 2 and statuses[400] > len(asked) / 2, statuses


@pytest.mark.campaign
@pytest.mark.timeout(24 * 3600)
def test_a_campaign_of_what_the_description_allows(start_server: Callable[..., RunningServer]) -> None:
    """Settings included; the last lines say how many of which status."""
    server = start_server(bridge=True, standby_count=1)
    with RestSession(server.rest_url) as http:
        asked = operations(http.get("/openapi.json").json())
    statuses = run(server.rest_url, asked, int(os.environ.get("SCHEMATHESIS_EXAMPLES", "200")))
    print(f"\n{statuses.total()} requests to {len(asked)} operations: {dict(sorted(statuses.items()))}")
