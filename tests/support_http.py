"""What tests over HTTP share: bodies, strict readers of answers and event streams, and waiting."""

import http.client
import json
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import grpc
import requests
from prometheus_client.parser import text_string_to_metric_families

from mlxgui.v1 import model_pb2, model_pb2_grpc, system_pb2, system_pb2_grpc
from tests.support_calls import END_TOKENS, last_operation

WAIT_SECONDS = 90.0
_POLL_SECONDS = 0.05

CAPITAL = "What is the capital of France?"
PARIS = "The capital of France is Paris."

JsonObject = dict[str, Any]

END_BIAS = {str(token): value for token, value in END_TOKENS.items()}
"""As `logit_bias`: the model cannot end by itself."""

FAULT_TYPES = {
    "invalid_request_error",
    "rate_limit_error",
    "server_error",
    "conflict",
    "permission_error",
    "authentication_error",
}


def chat_body(text: str = CAPITAL, model: str = "demo", **fields: Any) -> JsonObject:
    """A chat of one user message in OpenAI's form."""
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}


def endless_body(model: str, **fields: Any) -> JsonObject:
    """A chat that decodes 16,384 tokens or until the context is full: the model cannot end it."""
    return chat_body("Tell me a story.", model, **{"max_tokens": 16_384, "logit_bias": END_BIAS, **fields})


def native_error(response: requests.Response, status: int) -> str:
    """The sentence of an error in the documented form, which is all that its body holds."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    body = response.json()
    assert list(body) == ["detail"]
    assert isinstance(body["detail"], str) and body["detail"]
    return str(body["detail"])


def openai_error(response: requests.Response, status: int) -> JsonObject:
    """The `error` object of an answer in OpenAI's form, which has the documented `detail` too."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    return checked_openai_error(response.json())


def checked_openai_error(body: Any) -> JsonObject:
    """The `error` object of a body in OpenAI's form."""
    assert set(body) == {"error", "detail"}
    error: JsonObject = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"] == body["detail"] != ""
    assert error["type"] in FAULT_TYPES
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or re.fullmatch(r"[a-z_]+", error["code"])
    return error


def anthropic_error(response: requests.Response, status: int) -> JsonObject:
    """The `error` object of an answer in the form of Anthropic's API."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    body = response.json()
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
    assert body["request_id"] == response.headers["Request-Id"]
    error: JsonObject = body["error"]
    assert set(error) == {"type", "message", "details"} and error["message"]
    return error


def parse_named_events(raw: bytes) -> list[JsonObject]:
    """The payloads of a whole stream of Responses or Messages.

    Checks its grammar byte by byte: every event is its name, one `data: ` line of ASCII and an empty line; the name is
    the payload's type.
    """
    assert raw.endswith(b"\n\n")
    payloads = []
    for event in raw.decode("ascii").removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        assert data.startswith("data: {") and "\r" not in event, event
        payloads.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {payloads[-1]['type']}"
    return payloads


def parse_events(raw: bytes) -> list[JsonObject]:
    """The payloads of a whole event stream.

    Checks its grammar byte by byte: every event is one `data: ` line of ASCII and an empty line, and the last,
    only the last, is [DONE].
    """
    assert raw.endswith(b"\n\n")
    *events, done = raw.decode("ascii").removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    payloads = []
    for event in events:
        assert event.startswith("data: {") and "\n" not in event and "\r" not in event, event
        payloads.append(json.loads(event.removeprefix("data: ")))
    return payloads


def stream_text(payloads: Iterable[JsonObject], index: int = 0) -> str:
    """The text of one choice of a chat or of a completion."""
    text = ""
    for payload in payloads:
        for choice in payload.get("choices", ()):
            if choice["index"] == index:
                text += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
    return text


class EventReader:
    """A request over a socket of its own, whose event stream is read one event at a time, and closed at will."""

    def __init__(
        self,
        base_url: str,
        path: str,
        body: JsonObject | None,
        headers: Mapping[str, str] | None = None,
        *,
        method: str = "POST",
    ) -> None:
        address = urlsplit(base_url)
        self._connection = http.client.HTTPConnection(
            str(address.hostname), address.port, timeout=WAIT_SECONDS
        )
        self._connection.request(
            method,
            path,
            None if body is None else json.dumps(body),
            {"Content-Type": "application/json", **(headers or {})},
        )
        self.response: http.client.HTTPResponse | None = None

    def open(self) -> http.client.HTTPResponse:
        """Wait for the head of the answer."""
        self.response = self._connection.getresponse()
        return self.response

    def read_event(self) -> bytes:
        """The next event's line; empty at the end of the stream."""
        assert self.response is not None
        line = self.response.readline()
        if line:
            assert self.response.readline() == b"\n"
        return line.rstrip(b"\n")

    def read_until_content(self) -> None:
        """Read up to the first text: from then on it decodes."""
        while line := self.read_event():
            choices = json.loads(line.removeprefix(b"data: "))["choices"]
            if choices and choices[0]["delta"].get("content"):
                return
        raise AssertionError("the stream ended before its first text")

    def read_rest(self) -> list[bytes]:
        """Every whole event that still comes, until the stream ends or breaks."""
        assert self.response is not None
        lines = []
        try:
            while line := self.response.readline():
                if line.endswith(b"\n") and line != b"\n":
                    lines.append(line.rstrip(b"\n"))
        except (http.client.HTTPException, OSError):
            pass
        return lines

    def close(self, *, reset: bool = False) -> None:
        """Go away: with a FIN, or with an RST."""
        if reset and self._connection.sock is not None:
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
            self._connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if self.response is not None:
            self.response.close()
        self._connection.close()


def raw_request(base_url: str, request: bytes, *, end: bool = False) -> tuple[int, dict[str, str], bytes]:
    """Send bytes as they are; status, headers and body of the answer. `end` closes our half after it."""
    address = urlsplit(base_url)
    with socket.create_connection((str(address.hostname), address.port or 80), WAIT_SECONDS) as connection:
        connection.settimeout(WAIT_SECONDS)
        connection.sendall(request)
        if end:
            connection.shutdown(socket.SHUT_WR)
        response = http.client.HTTPResponse(connection)
        response.begin()
        return response.status, {key.lower(): value for key, value in response.getheaders()}, response.read()


def eventually(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of a condition that something outside this process makes true."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(_POLL_SECONDS)
    return value


class Series:
    """The server's metrics, read over gRPC, so that no request of the bridge is in the way."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._system = system_pb2_grpc.SystemServiceStub(channel)

    def value(self, name: str, **labels: str) -> float:
        """The sum of a series over what the labels leave open."""
        body = self._system.GetMetrics(system_pb2.GetMetricsRequest()).body.decode()
        return metric_value(body, name, **labels)

    def running(self, model: str) -> float:
        """Requests of a model that its engine has."""
        return self.value("mlxgui:num_requests_running", model_name=model)

    def finished(self, model: str) -> float:
        """Choices of a model that ended by themselves."""
        return self.value("mlxgui:request_success_total", model_name=model)


def metric_value(exposition: str, name: str, **labels: str) -> float:
    """The sum of a series of a Prometheus exposition over what the labels leave open."""
    assert f"\n# TYPE {name.removesuffix('_total').removesuffix('_count')}" in exposition, f"no series {name}"
    return sum(
        sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


@contextmanager
def installed_directory(unix_channel: grpc.Channel, directory: Any, name: str) -> Iterator[str]:
    """A directory as a loaded model of the server while the block runs."""
    models = model_pb2_grpc.ModelServiceStub(unix_channel)
    request = model_pb2.InstallModelRequest(local_directory=str(directory), name=name)
    assert last_operation(models.InstallModel(request)).success.name == name
    last_operation(models.LoadModel(model_pb2.LoadModelRequest(name=name)))
    try:
        yield name
    finally:
        models.DeleteModel(model_pb2.DeleteModelRequest(name=name, force=True))
