"""The bridge's session, at the other end of which a script answers."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mlxgui.v1 import inference_pb2
from rest_bridge.errors import ApiError
from rest_bridge.session import Session, SessionStream

Script = Callable[[Iterator[inference_pb2.SessionRequest]], Iterator[inference_pb2.SessionResponse]]


class _Answers:
    """What a call gives: an iterator that can be cancelled."""

    def __init__(self, answers: Iterator[inference_pb2.SessionResponse]) -> None:
        self._answers = answers

    def __iter__(self) -> Iterator[inference_pb2.SessionResponse]:
        return self._answers

    def cancel(self) -> None:
        return


class _Server:
    def __init__(self, script: Script) -> None:
        self._script = script

    def Session(self, requests: Iterator[inference_pb2.SessionRequest]) -> _Answers:
        return _Answers(self._script(requests))


def _open(script: Script, timeout_seconds: float = 60.0) -> SessionStream:
    server: Any = _Server(script)
    return Session(server).open(inference_pb2.GenerateStreamRequest(), timeout_seconds, "id")


def _text(number: int) -> inference_pb2.SessionResponse:
    event = inference_pb2.GenerateStreamResponse(delta=inference_pb2.TextDelta(text="on"))
    return inference_pb2.SessionResponse(items=[inference_pb2.SessionItem(id=number, generate=event)])


def test_a_client_that_reads_too_slowly_is_cancelled() -> None:
    """What waits for it has a bound, and the server is told."""
    cancelled = threading.Event()

    def flood(
        requests: Iterator[inference_pb2.SessionRequest],
    ) -> Iterator[inference_pb2.SessionResponse]:
        number = next(requests).id
        for _ in range(5000):
            yield _text(number)
        last = next(requests)
        assert last.id == number and last.HasField("cancel")
        cancelled.set()
        yield from ()

    stream = _open(flood)
    assert cancelled.wait(60)
    with pytest.raises(ApiError) as caught:
        for count, _ in enumerate(stream):
            assert count < 2000
    assert caught.value.reason == "SLOW_CONSUMER"


def test_a_fault_of_the_reader_ends_its_streams_and_the_next_begins_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nobody waits for a thread that has ended."""

    def broken(
        requests: Iterator[inference_pb2.SessionRequest],
    ) -> Iterator[inference_pb2.SessionResponse]:
        yield _text(next(requests).id)
        raise ValueError("what nobody expects")

    server: Any = _Server(broken)
    session = Session(server)
    for _ in range(2):
        stream = session.open(inference_pb2.GenerateStreamRequest(), 60.0, "id")
        assert next(stream).delta.text == "on"
        with pytest.raises(ApiError) as caught:
            next(stream)
        assert caught.value.reason == "INTERNAL"
    assert "what nobody expects" in caplog.text


def test_a_frozen_server_is_not_waited_for_beyond_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """It should end the request itself; a stopped process cannot."""
    monkeypatch.setattr("rest_bridge.session._DEADLINE_GRACE_SECONDS", 0.0)
    thawed = threading.Event()

    def frozen(
        requests: Iterator[inference_pb2.SessionRequest],
    ) -> Iterator[inference_pb2.SessionResponse]:
        thawed.wait(60)
        yield from ()

    with pytest.raises(ApiError) as caught:
        next(_open(frozen, timeout_seconds=0.05))
    assert caught.value.reason == "DEADLINE"
    thawed.set()
