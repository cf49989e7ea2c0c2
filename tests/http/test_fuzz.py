"""Bodies of every shape: no 5xx but what is declared as not implemented, always JSON of the right shape.

300 cases in each run. The campaign: FUZZ_CASES=100000 FUZZ_SEED=1 python -m pytest -m campaign tests/http/test_fuzz.py
"""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import RestSession
from tests.http.fuzz import make_case
from tests.support_http import (
    PARIS,
    Series,
    anthropic_error,
    chat_body,
    eventually,
    native_error,
    openai_error,
    parse_events,
    parse_named_events,
)

CASES = 300
GOOD, DECLARED = 200, 501
REFUSALS = {400, 404, 409, 413, DECLARED}


def ask(http: RestSession, seed: int) -> int:
    """Send the case of a seed and check the answer; its status."""
    case = make_case(seed)
    response = http.post(case.path, data=case.body)
    status = response.status_code
    words = f"seed {seed}: {case.path} {case.body[:1000]!r} gave {status} {response.text[:500]}"
    assert status == GOOD or status in REFUSALS, words
    assert "Traceback" not in response.text, words
    try:
        if status == GOOD:
            if response.headers["Content-Type"].startswith("text/event-stream"):
                is_named = case.path in ("/v1/responses", "/v1/messages")
                (parse_named_events if is_named else parse_events)(response.content)
            else:
                assert response.json()
        elif case.path.startswith("/v1/models/"):
            native_error(response, status)
        elif case.path.startswith("/v1/messages"):
            anthropic_error(response, status)
        else:
            openai_error(response, status)
    except Exception as error:
        raise AssertionError(words) from error
    return status


def test_no_body_is_too_strange(http: RestSession, series: Series) -> None:
    """Some are right, most are not; after them the model answers as before and nothing is left running."""
    http.post("/v1/models/demo/load")
    statuses = [ask(http, seed) for seed in range(CASES)]
    assert statuses.count(400) > CASES / 4
    assert statuses.count(GOOD) > CASES / 20
    check_goes_on(http, series)


@pytest.mark.campaign
@pytest.mark.timeout(24 * 3600)
def test_a_hundred_thousand_bodies(http: RestSession, series: Series) -> None:
    """The campaign, from eight clients at once; the failing seed is in the message."""
    first = int(os.environ.get("FUZZ_SEED", "1")) * 1_000_000
    count = int(os.environ.get("FUZZ_CASES", "100000"))
    http.post("/v1/models/demo/load")

    def run(share: int) -> None:
        with RestSession(http.base_url) as session:
            for seed in range(first + share, first + count, 8):
                ask(session, seed)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(run, share) for share in range(8)]:
            done.result()
    check_goes_on(http, series)


def check_goes_on(http: RestSession, series: Series) -> None:
    answer = http.post("/v1/chat/completions", json=chat_body()).json()
    assert answer["choices"][0]["message"]["content"] == PARIS
    eventually(lambda: series.running("demo") == 0, "the engine is idle")
    assert [model["name"] for model in http.get("/v1/models").json()["models"] if "fuzz" in str(model)] == []
