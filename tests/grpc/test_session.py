"""InferenceService.Session: many requests over one stream, each with its own events and its own end."""

import queue
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from mlxgui.v1 import common_pb2, inference_pb2, inference_pb2_grpc, system_pb2_grpc
from tests.support_calls import CALL_SECONDS, chat, completion, endless, failure_of
from tests.support_metrics import Gauges, wait_until
from tests.support_server import RunningServer

Stub = inference_pb2_grpc.InferenceServiceStub
Request = inference_pb2.SessionRequest

ANSWERS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "What is the capital of Italy?": "The capital of Italy is Rome.",
    "What is the capital of Japan?": "The capital of Japan is Tokyo.",
}
UNKNOWN = chat("hi", "no-such-model")


class Client:
    """One session: what is sent when, and the items that came, by request."""

    def __init__(self, stub: Stub) -> None:
        self._outgoing: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self.call: Any = stub.Session(self._requests(), timeout=CALL_SECONDS)
        self.items: dict[int, list[inference_pb2.SessionItem]] = defaultdict(list)

    def _requests(self) -> Iterator[Request]:
        while (request := self._outgoing.get()) is not None:
            yield request

    def send(self, **fields: Any) -> None:
        self._outgoing.put(Request(**fields))

    def half_close(self) -> None:
        self._outgoing.put(None)

    def read(self) -> None:
        """Take one message; raises the status that ended the session, or StopIteration."""
        message = next(self.call)
        assert message.items
        for item in message.items:
            assert not self.is_ended(item.id), "an item after the end"
            self.items[item.id].append(item)

    def is_ended(self, number: int) -> bool:
        last = self.items[number][-1] if self.items[number] else None
        return last is not None and (
            last.HasField("error") or last.chat.HasField("end") or last.generate.HasField("end")
        )

    def read_until_ended(self, *numbers: int) -> None:
        while not all(self.is_ended(number) for number in numbers):
            self.read()

    def text(self, number: int) -> str:
        return "".join(item.chat.delta.text + item.generate.delta.text for item in self.items[number])

    def reason(self, number: int) -> str:
        """Why the request failed; empty when it did not."""
        error = self.items[number][-1].error
        return common_pb2.ErrorReason.Name(error.reason).removeprefix("ERROR_REASON_") if error.code else ""


@pytest.fixture
def session(inference: Stub) -> Iterator[Client]:
    client = Client(inference)
    yield client
    client.half_close()
    client.call.cancel()


def test_requests_of_one_session_decode_together_and_end_apart(session: Client, inference: Stub) -> None:
    """Chats, completions and failures side by side; the events are those of the streams of their own."""
    for number, question in enumerate(ANSWERS, start=1):
        session.send(id=number, chat=inference_pb2.ChatStreamRequest(request=chat(question)))
    request = completion("One", "Two", n=2, max_tokens=5, temperature=1.0, seed=4)
    request.echo = True
    session.send(id=50, generate=inference_pb2.GenerateStreamRequest(request=request))
    session.send(id=2**62, chat=inference_pb2.ChatStreamRequest(request=UNKNOWN))
    session.send(id=7, chat=inference_pb2.ChatStreamRequest(request=chat("hi", temperature=9.0)))
    session.half_close()
    with pytest.raises(StopIteration):
        while True:
            session.read()

    assert [session.text(number) for number in (1, 2, 3)] == list(ANSWERS.values())
    kinds = [item.chat.WhichOneof("event") for item in session.items[1]]
    assert kinds[0] == "start" and kinds[-2:] == ["finish", "end"] and set(kinds[1:-2]) == {"delta"}
    alone = inference.Generate(request)
    for choice in alone.choices:
        got = "".join(
            item.generate.delta.text
            for item in session.items[50]
            if item.generate.delta.index == choice.index
        )
        assert got == choice.text
    assert session.items[50][-1].generate.end.usage == alone.usage
    assert session.reason(2**62) == "MODEL_NOT_FOUND"
    error = session.items[7][-1].error
    assert (session.reason(7), error.field) == ("INVALID_PARAMETER", "sampling.temperature")
    assert session.call.code() == grpc.StatusCode.OK


def test_one_request_is_cancelled_and_the_others_go_on(session: Client) -> None:
    """Its last item is CANCELLED; its number is free again."""
    for number in (1, 2):
        session.send(id=number, chat=endless())
    while not (session.text(1) and session.text(2)):
        session.read()
    session.send(id=1, cancel=inference_pb2.SessionCancel())
    session.read_until_ended(1)
    assert session.reason(1) == "CANCELLED" and not session.is_ended(2)
    (question, answer), *_ = ANSWERS.items()
    session.items[1].clear()
    session.send(id=1, chat=inference_pb2.ChatStreamRequest(request=chat(question)))
    session.read_until_ended(1)
    assert session.text(1) == answer
    # Cancelling what has ended, or never was, is passed over.
    for number in (1, 99):
        session.send(id=number, cancel=inference_pb2.SessionCancel())
    session.send(id=3, chat=inference_pb2.ChatStreamRequest(request=chat(question)))
    session.read_until_ended(3)
    assert session.text(3) == answer and not session.items[99]


def test_a_request_that_is_cancelled_at_once_ends_too(
    session: Client, system: system_pb2_grpc.SystemServiceStub
) -> None:
    """Whatever it had come to; the session ends when all have."""
    for number in range(1, 41):
        session.send(id=number, chat=endless())
        session.send(id=number, cancel=inference_pb2.SessionCancel())
    session.read_until_ended(*range(1, 41))
    assert {session.reason(number) for number in range(1, 41)} == {"CANCELLED"}
    session.half_close()
    with pytest.raises(StopIteration):
        session.read()
    wait_until(lambda: Gauges(system).is_idle("demo"), "nothing is left")


def test_a_request_s_own_timeout_ends_it_alone(session: Client) -> None:
    request = Request(id=1, chat=endless())
    request.timeout.FromMilliseconds(300)
    session._outgoing.put(request)
    session.send(id=2, chat=inference_pb2.ChatStreamRequest(request=chat("What is the capital of Italy?")))
    session.read_until_ended(1, 2)
    assert session.reason(1) == "DEADLINE" and session.text(2) == "The capital of Italy is Rome."


def test_a_timeout_longer_than_any_calendar_is_the_server_s_own_limit(session: Client) -> None:
    request = Request(
        id=1, chat=inference_pb2.ChatStreamRequest(request=chat("What is the capital of Italy?"))
    )
    request.timeout.seconds = 10**17
    session._outgoing.put(request)
    session.read_until_ended(1)
    assert session.text(1) == "The capital of Italy is Rome."


def test_a_session_ends_with_the_drain_when_its_last_request_has_ended(
    start_server: Callable[..., RunningServer],
) -> None:
    """An idle one at once; the status says why, and the request that ran is answered whole."""
    server = start_server()
    channel = server.channel()
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    busy, idle = Client(stub), Client(stub)
    for client in (busy, idle):
        client.send(id=1, chat=inference_pb2.ChatStreamRequest(request=chat("hi", max_tokens=1)))
        client.read_until_ended(1)
    busy.send(id=2, chat=endless(max_tokens=700))
    while not busy.text(2):
        busy.read()
    server.process.send_signal(signal.SIGTERM)
    for client in (idle, busy):
        with pytest.raises(grpc.RpcError) as raised:
            while True:
                client.read()
        failure = failure_of(raised.value)
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING")
    assert busy.items[2][-1].chat.end.usage.completion_token_count == 700
    assert server.process.wait(CALL_SECONDS) == 0


@pytest.mark.parametrize(
    "bad",
    [
        Request(id=0, chat=endless()),
        Request(id=-5, chat=endless()),
        Request(id=1, chat=endless()),
        Request(id=3),
    ],
    ids=["zero", "negative", "in use", "no command"],
)
def test_what_breaks_the_session_ends_all_of_it(
    session: Client, bad: Request, system: system_pb2_grpc.SystemServiceStub
) -> None:
    session.send(id=1, chat=endless())
    while not session.text(1):
        session.read()
    session._outgoing.put(bad)
    with pytest.raises(grpc.RpcError) as raised:
        while True:
            session.read()
    failure = failure_of(raised.value)
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER")
    wait_until(lambda: Gauges(system).is_idle("demo"), "its requests are gone")


def test_cancelling_the_call_cancels_every_request(
    session: Client, system: system_pb2_grpc.SystemServiceStub
) -> None:
    for number in range(1, 9):
        session.send(id=number, chat=endless())
    while not all(session.text(number) for number in range(1, 9)):
        session.read()
    session.call.cancel()
    wait_until(lambda: Gauges(system).is_idle("demo"), "nothing is left")


def test_a_session_carries_more_requests_than_decode_at_once(session: Client) -> None:
    """64 of them, each with a seed of its own: all end, exactly once, with what they have alone."""
    for number in range(1, 65):
        request = chat("Tell me a story.", temperature=1.0, seed=number % 4, max_tokens=8)
        session.send(id=number, chat=inference_pb2.ChatStreamRequest(request=request))
    session.half_close()
    with pytest.raises(StopIteration):
        while True:
            session.read()
    assert all(session.is_ended(number) for number in range(1, 65))
    texts = {number % 4: session.text(number) for number in range(1, 5)}
    assert all(session.text(number) == texts[number % 4] for number in range(1, 65))
