"""The body of an event stream, whatever happens in it."""

from collections.abc import Iterator

import pytest

from rest_bridge import sse, web
from rest_bridge.calls import LiveCalls


def test_a_fault_of_the_bridge_ends_its_stream_with_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """An error event and [DONE], not a connection that breaks; the log has what it was."""

    def chunks() -> Iterator[bytes]:
        yield b"data: {}\n\n"
        raise ValueError("what nobody expects")

    calls = LiveCalls(limit=1)
    response = web.event_stream(sse.Stream(chunks()), calls.open(lambda: False))
    first, error, last = response.iter_encoded()
    response.close()
    assert (first, last) == (b"data: {}\n\n", sse.DONE)
    assert b'"code":"internal"' in error and b"nobody" not in error
    assert "what nobody expects" in caplog.text
    assert len(calls) == 0
