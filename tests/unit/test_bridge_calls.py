"""What a client is told whose call was ended from outside."""

import threading

import pytest

from rest_bridge.calls import LiveCalls, as_api_error
from rest_bridge.errors import ApiError

CANCELLED = ApiError("CANCELLED", "The request was cancelled.")


def test_a_call_that_somebody_else_cancelled_is_a_conflict() -> None:
    """An install that is cancelled, a model that is unloaded by force: its client is still there, and reads 409."""
    with (
        LiveCalls(limit=1).open(lambda: False) as live,
        pytest.raises(ApiError) as caught,
        as_api_error(live),
    ):
        raise CANCELLED
    assert (caught.value.http_status, caught.value.headers()) == (409, {"X-Should-Retry": "false"})


def test_a_call_whose_client_went_is_counted_as_such() -> None:
    """499, which nobody reads but the metrics."""
    calls, ended = LiveCalls(limit=1), threading.Event()

    class Call:
        def cancel(self) -> None:
            ended.set()

    with calls.open(lambda: True) as live:
        live.attach(Call())
        assert ended.wait(60)
        assert live.blame(CANCELLED).http_status == 499


def test_a_call_that_the_end_of_the_bridge_cut_may_be_repeated() -> None:
    calls = LiveCalls(limit=1)
    with calls.open(lambda: False) as live:
        calls.cancel_all()
        error = live.blame(CANCELLED)
        assert (error.reason, error.http_status, error.headers()) == (
            "SERVER_DRAINING",
            503,
            {"Retry-After": "5"},
        )
        # What it failed with by itself before stays what it is.
        other = ApiError("ENGINE_DEAD", "The worker ended.")
        assert live.blame(other) is other


def test_every_429_and_503_that_may_be_repeated_says_when() -> None:
    """A second at least, also where the server named no time."""
    for reason in ("QUEUE_FULL", "ENGINE_DEAD", "SERVER_UNREACHABLE", "SERVER_DRAINING", "HUB_RATE_LIMITED"):
        assert ApiError(reason, "Words.").headers() == {"Retry-After": "1"}
    assert ApiError("SLOW_CONSUMER", "Words.").headers() == {"X-Should-Retry": "false"}
