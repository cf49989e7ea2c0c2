"""A model's worker dies, hangs or cannot load: its callers hear of it and the server goes on."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from mlxgui.v1 import inference_pb2_grpc, model_pb2, model_pb2_grpc, system_pb2_grpc
from tests.support_calls import (
    CALL_SECONDS,
    Failure,
    chat,
    endless,
    fails,
    failure_of,
    last_operation,
    reason_of,
    text_of,
    until_first_delta,
)
from tests.support_metrics import Gauges, wait_until
from tests.support_models import build_tiny
from tests.support_server import RunningServer, start

FRANCE = ("What is the capital of France?", "The capital of France is Paris.")
DEAD = (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")


class Own:
    """A server of this module's own, without standbys: each model in memory is one worker process."""

    def __init__(self, server: RunningServer) -> None:
        self.server = server
        self.inference = inference_pb2_grpc.InferenceServiceStub(server.channel())
        self.models = model_pb2_grpc.ModelServiceStub(server.channel(unix=True))
        self.gauges = Gauges(system_pb2_grpc.SystemServiceStub(server.channel()))

    def answers(self) -> bool:
        return text_of(self.inference.Chat(chat(FRANCE[0]), timeout=CALL_SECONDS)) == FRANCE[1]

    def demo_worker(self) -> psutil.Process:
        """Make sure that demo alone is in memory; its process."""
        assert self.answers()
        wait_until(lambda: len(self.server.workers()) == 1, "one worker is left")
        return self.server.worker()

    def install(self, folder: Path, **fields: Any) -> model_pb2.Operation:
        request = model_pb2.InstallModelRequest(local_directory=str(folder), **fields)
        return last_operation(self.models.InstallModel(request, timeout=CALL_SECONDS))

    def load(self, name: str) -> model_pb2.Operation:
        return last_operation(
            self.models.LoadModel(model_pb2.LoadModelRequest(name=name), timeout=CALL_SECONDS)
        )


@pytest.fixture(scope="module")
def own(server_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Own]:
    running = start(
        tmp_path_factory.mktemp("faults"), server_environment, bridge=False, standby_count=0, stall_seconds=4
    )
    yield Own(running)
    assert running.stop() == 0


def test_killing_a_worker_ends_every_stream_of_it_and_the_model_loads_again(own: Own) -> None:
    """Streams and waiting calls alike: UNAVAILABLE, ENGINE_DEAD, saying how it died; then one request reloads it."""
    worker = own.demo_worker()
    streams = [own.inference.ChatStream(endless(), timeout=CALL_SECONDS) for _ in range(8)]
    for stream in streams:
        until_first_delta(stream)
    unary = [own.inference.Chat.future(endless().request, timeout=CALL_SECONDS) for _ in range(2)]
    wait_until(lambda: own.gauges["num_requests_running"]["demo"] >= 10, "all run")

    ended: list[tuple[float, Failure]] = []
    lock = threading.Lock()

    def read_to_the_end(stream: Any) -> None:
        failure = fails(lambda: stream)
        with lock:
            ended.append((time.monotonic(), failure))

    with ThreadPoolExecutor(len(streams)) as pool:
        reading = [pool.submit(read_to_the_end, stream) for stream in streams]
        killed = time.monotonic()
        worker.send_signal(signal.SIGKILL)
        for future in reading:
            future.result(CALL_SECONDS)
    failures = [failure for _, failure in ended] + [
        failure_of(call.exception(CALL_SECONDS)) for call in unary
    ]
    print(f"ended after {max(at for at, _ in ended) - killed:.3f} s")

    assert {(failure.code, failure.reason) for failure in failures} == {DEAD}
    assert all("SIGKILL" in failure.message for failure in failures)
    assert all(failure.metadata["model"] == "demo" for failure in failures)
    assert own.gauges["num_requests_running"]["demo"] == 0
    assert own.answers()
    assert own.server.worker().pid != worker.pid


def test_a_request_at_the_moment_of_death_is_answered_or_told(own: Own) -> None:
    """Requests that keep coming while the worker is killed: each is answered rightly or ENGINE_DEAD, none hangs."""
    worker = own.demo_worker()
    go_on = threading.Event()

    def ask(index: int) -> str:
        if index == 12:
            worker.send_signal(signal.SIGKILL)
        go_on.wait(0)
        try:
            return text_of(own.inference.Chat(chat(FRANCE[0]), timeout=CALL_SECONDS))
        except grpc.RpcError as error:
            return failure_of(error).reason

    with ThreadPoolExecutor(6) as pool:
        found = set(pool.map(ask, range(30)))
    assert found <= {FRANCE[1], "ENGINE_DEAD"} and FRANCE[1] in found
    assert own.answers()


def test_killing_workers_while_they_load_is_made_good_unseen(own: Own) -> None:
    """Two die in their imports, the third attempt serves everybody who waits."""
    own.models.UnloadModel(model_pb2.UnloadModelRequest(name="demo", force=True))
    wait_until(lambda: not own.server.workers(), "no worker is left")
    loading = own.models.LoadModel(model_pb2.LoadModelRequest(name="demo"), timeout=CALL_SECONDS)
    waiting = own.inference.Chat.future(chat(FRANCE[0]), timeout=CALL_SECONDS)
    killed: set[int] = set()
    for _ in range(2):
        wait_until(
            lambda: any(worker.pid not in killed for worker in own.server.workers()), "its process is there"
        )
        worker = next(worker for worker in own.server.workers() if worker.pid not in killed)
        killed.add(worker.pid)
        worker.send_signal(signal.SIGKILL)
    assert last_operation(loading).success.state == model_pb2.MODEL_STATE_LOADED
    assert text_of(waiting.result(CALL_SECONDS)) == FRANCE[1]
    assert own.models.GetModel(model_pb2.GetModelRequest(name="demo")).model.error_message == ""


def test_a_stalled_worker_is_killed_and_its_requests_end(own: Own) -> None:
    """SIGSTOP: alive and silent. The watchdog ends it, and the requests say why."""
    worker = own.demo_worker()
    streams = [own.inference.ChatStream(endless(), timeout=CALL_SECONDS) for _ in range(3)]
    for stream in streams:
        until_first_delta(stream)
    worker.send_signal(signal.SIGSTOP)
    failures = [fails(lambda stream=stream: stream) for stream in streams]  # type: ignore[misc]
    assert {(failure.code, failure.reason) for failure in failures} == {DEAD}
    assert all("delivered nothing for" in failure.message for failure in failures)
    wait_until(lambda: not psutil.pid_exists(worker.pid), "it is gone")
    assert own.answers()


def test_weights_that_do_not_fit_the_config_fail_the_load_with_their_cause(own: Own, tmp_path: Path) -> None:
    """The file is whole and wrong: the loader's own words are in the error, and nobody else is disturbed."""
    folder = build_tiny(tmp_path / "wrong-shape")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 96}))
    assert own.install(folder).HasField("success")
    worker = own.demo_worker()
    operation = own.load("wrong-shape")
    assert reason_of(operation) == "MODEL_LOAD_FAILED"
    assert "shape" in operation.error.message.lower() and "wrong-shape" in operation.error.message
    failure = fails(lambda: own.inference.Chat(chat("hi", "wrong-shape"), timeout=CALL_SECONDS))
    assert (failure.code, failure.reason) == (grpc.StatusCode.INTERNAL, "MODEL_LOAD_FAILED")
    assert own.answers() and own.server.worker().pid == worker.pid


def test_a_file_damaged_after_the_install_is_found_before_the_load(own: Own, tmp_path: Path) -> None:
    folder = build_tiny(tmp_path / "damaged-later")
    assert own.install(folder).HasField("success")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    operation = own.load("damaged-later")
    assert reason_of(operation) == "MODEL_INCOMPATIBLE" and "model.safetensors" in operation.error.message
    shown = own.models.GetModel(model_pb2.GetModelRequest(name="damaged-later")).model
    assert shown.state == model_pb2.MODEL_STATE_FAILED and "damaged" in shown.error_message
    build_tiny(tmp_path / "again")
    weights.write_bytes((tmp_path / "again" / "model.safetensors").read_bytes())
    assert own.load("damaged-later").HasField("success")
    own.models.UnloadModel(model_pb2.UnloadModelRequest(name="damaged-later"))


def test_code_beside_a_model_never_runs(own: Own, tmp_path: Path) -> None:
    """A real load and a real chat of a folder full of traps: Python modules named by every key there is, a pickle,
    and a sitecustomize. Each would write a marker file."""
    folder = build_tiny(tmp_path / "trapped")
    marker = tmp_path / "it-ran"
    code = f"open({str(marker)!r}, 'a').write(__name__)\n"
    for name in ("evil", "modeling", "tokenization", "sitecustomize", "llama", "conftest"):
        (folder / f"{name}.py").write_text(code)
    pickle = b"cbuiltins\nexec\n(V" + code.replace("\n", ";").encode() + b"\ntR."
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        (folder / name).write_bytes(pickle)
    config = json.loads((folder / "config.json").read_text())
    traps = {
        "AutoConfig": "evil.C",
        "AutoModelForCausalLM": "modeling.M",
        "AutoTokenizer": ["tokenization.T", None],
    }
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": traps}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "auto_map": traps}))

    assert own.install(folder).HasField("success")
    assert own.load("trapped").HasField("success")
    assert own.inference.Chat(chat("hi", "trapped", max_tokens=2), timeout=CALL_SECONDS).choices
    assert not marker.exists()
    own.models.UnloadModel(model_pb2.UnloadModelRequest(name="trapped"))

    (folder / "config.json").write_text(json.dumps({**config, "model_file": "evil.py"}))
    operation = own.load("trapped")
    assert reason_of(operation) == "MODEL_UNSAFE" and "model_file" in operation.error.message
    assert not marker.exists()


def test_a_chat_template_that_never_ends_costs_its_own_worker_only(own: Own, tmp_path: Path) -> None:
    """MODEL_UNSAFE; the model's process is replaced, other models do not notice."""
    folder = build_tiny(tmp_path / "endless-template")
    loop = "{% for i in range(99999) %}"
    (folder / "chat_template.jinja").write_text(loop * 2 + "{% endfor %}" * 2)
    assert own.install(folder).HasField("success")
    worker = own.demo_worker()
    failure = fails(lambda: own.inference.Chat(chat("hi", "endless-template"), timeout=CALL_SECONDS))
    assert (failure.code, failure.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_UNSAFE")
    assert own.answers()
    wait_until(lambda: [w.pid for w in own.server.workers()] == [worker.pid], "its process is gone")


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{% set x = namespace.__init__.__globals__ %}{{ x }}",
    "{{ messages.__class__.__base__ }}",
    "{{ messages.append('x') }}{{ messages.clear() }}",
    "{{ raise_exception('no') }}",
    "{% include '/etc/passwd' %}",
]


def test_a_chat_template_cannot_leave_its_sandbox(own: Own, tmp_path: Path) -> None:
    """Each way out is refused as unsafe, or as a template that fails; nothing runs, and the model serves on."""
    folder = build_tiny(tmp_path / "sandbox")
    marker = tmp_path / "it-ran"
    cases = "".join(f"{{% if case == {i} %}}{escape}{{% endif %}}" for i, escape in enumerate(ESCAPES))
    (folder / "chat_template.jinja").write_text("hi" + cases.replace("MARKER", str(marker)))
    assert own.install(folder).HasField("success")
    for index in range(len(ESCAPES)):
        request = chat("hi", "sandbox", max_tokens=1)
        request.template_arguments = json.dumps({"case": index})
        failure = fails(lambda request=request: own.inference.Chat(request, timeout=CALL_SECONDS))  # type: ignore[misc]
        assert failure.reason in ("MODEL_UNSAFE", "INVALID_PARAMETER"), ESCAPES[index]
        assert "sandbox" in failure.message or "template" in failure.message
    assert own.inference.Chat(chat("hi", "sandbox", max_tokens=1), timeout=CALL_SECONDS).choices
    assert not marker.exists()
    own.models.UnloadModel(model_pb2.UnloadModelRequest(name="sandbox"))


def test_the_server_is_whole_after_all_that(own: Own) -> None:
    assert own.answers()
    assert "Traceback" not in own.server.log()
