"""The worker process by itself, driven through frames by its real supervisor."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from mlxgui_grpc.engine import frames, runtime
from mlxgui_grpc.engine.calls import Call
from mlxgui_grpc.engine.environment import worker_environment
from mlxgui_grpc.engine.supervisor import WorkerConfig, WorkerProcess
from mlxgui_grpc.errors import (
    ContextLengthExceededError,
    EngineDeadError,
    InvalidRequestError,
    ModelServerError,
    QueueFullError,
)
from tests.support_models import DEMO

WAIT_SECONDS = 120.0


def prompt(text: str) -> frames.Prompt:
    return frames.Prompt(messages=json.dumps([{"role": "user", "content": text}]).encode())


FRANCE = prompt("What is the capital of France?")
ENDLESS = frames.Sampling(max_tokens=4000, logit_bias={0: -100.0, 2: -100.0})


async def pieces(call: Call) -> list[frames.Piece]:
    """Everything until the call's rows are finished."""
    found: list[frames.Piece] = []
    with call:
        while sum(bool(piece.finish) for piece in found) < len(call.keys):
            events = await asyncio.wait_for(call.take(), WAIT_SECONDS)
            found += [event for event in events if isinstance(event, frames.Piece)]
    return found


async def test_one_worker_through_its_life(tmp_path: Path) -> None:
    """One process for all of it, for starting one costs seconds of CPU: ready, load, serve, pause, bound, die."""
    config = WorkerConfig(tmp_path, max_rows=2, max_waiting_rows=2)
    worker = await WorkerProcess.spawn(config, {**os.environ, "HF_TOKEN": "hf_secret"})
    ready = await asyncio.wait_for(worker.ready(), WAIT_SECONDS)
    assert {"mlx", "mlx-lm", "transformers"} <= set(ready.versions) and worker.is_ready
    environment = Path(f"/proc/{worker.pid}/environ")
    if environment.exists():
        assert b"hf_secret" not in environment.read_bytes()

    loaded = await asyncio.wait_for(worker.load("demo", DEMO, context_limit=3000), WAIT_SECONDS)
    assert loaded.batchable and loaded.context_length == 3000 and loaded.weight_bytes > 10**6
    assert loaded.active_bytes >= loaded.weight_bytes and loaded.kv_bytes_per_token > 0
    assert worker.footprint_bytes > 10**7 and worker.tokens_per_second == 0

    # Rows, counts and usage.
    (first, *_), *_ = [await pieces(worker.submit([FRANCE], frames.Sampling(), 1, 0))]
    assert first.key == 1
    found = await pieces(
        worker.submit([FRANCE, prompt("What is the capital of Italy?")], frames.Sampling(), 1, 0)
    )
    texts = ["".join(p.text for p in found if p.key == key) for key in sorted({p.key for p in found})]
    assert texts == ["The capital of France is Paris.", "The capital of Italy is Rome."]
    with worker.count(FRANCE) as counting:
        (counted,) = await asyncio.wait_for(counting.take(), WAIT_SECONDS)
    assert isinstance(counted, frames.Counted) and counted.token_count > 5
    usage = await asyncio.wait_for(worker.usage(), WAIT_SECONDS)
    assert (usage.running_count, usage.waiting_count, usage.kv_bytes) == (0, 0, 0)
    assert usage.active_bytes >= loaded.weight_bytes

    # What it reports unasked: what was done, and that it is idle now. The row below had pieces within 5 seconds.
    async with asyncio.timeout(WAIT_SECONDS):
        while worker.latest_usage is None or worker.latest_usage.running_count:
            await asyncio.sleep(0.05)
    assert worker.latest_usage.work_count > 40 and worker.latest_usage.peak_bytes >= loaded.active_bytes
    await pieces(worker.submit([FRANCE], frames.Sampling(), 1, 0))
    assert worker.tokens_per_second > 0 and (worker.running_count, worker.waiting_count) == (0, 0)

    # A prompt beyond the limit it was loaded with is refused, though the model could hold it.
    with pytest.raises(ContextLengthExceededError, match="3000"):
        await pieces(worker.submit([frames.Prompt(token_ids=(5,) * 3000)], frames.Sampling(), 1, 0))

    # Replies of a given form, two that share a prefill, with log-probabilities; a form that is none, and a cancel
    # while one is compiled.
    form = frames.Constraint(
        "json_schema",
        '{"type": "object", "properties": {"a": {"type": "boolean"}}, '
        '"required": ["a"], "additionalProperties": false}',
    )
    guided = frames.Sampling(constraint=form, temperature=2.0, seed=1, top_logprobs=1)
    work_before = (await asyncio.wait_for(worker.usage(), WAIT_SECONDS)).work_count
    found = await pieces(worker.submit([FRANCE], guided, 2, 0))
    work = (await asyncio.wait_for(worker.usage(), WAIT_SECONDS)).work_count - work_before
    assert work < 2 * counted.token_count + sum(piece.token_count for piece in found)
    for key in {piece.key for piece in found}:
        own = [piece for piece in found if piece.key == key]
        assert json.loads("".join(piece.text for piece in own))["a"] in (True, False)
        told = sum(len(piece.extra.logprobs) for piece in own if piece.extra)
        assert told == sum(piece.token_count for piece in own)
    with pytest.raises(InvalidRequestError, match="'not'") as refused:
        bad = frames.Constraint("json_schema", '{"not": {}}')
        await pieces(worker.submit([FRANCE], frames.Sampling(constraint=bad), 1, 0))
    assert refused.value.field == "sampling.json_schema"
    large = frames.Constraint("json_schema", json.dumps({"required": [f"k{i}" for i in range(4000)]}))
    worker.submit([FRANCE], frames.Sampling(constraint=large), 3, 0).__exit__()
    await pieces(worker.submit([FRANCE], guided, 1, 0))
    async with asyncio.timeout(WAIT_SECONDS):
        while (usage := await worker.usage()).running_count or usage.waiting_count:
            await asyncio.sleep(0.05)

    # A paused row holds its place and its text; others go on; resumed, it goes on where it was.
    story = "".join(
        p.text for p in await pieces(worker.submit([prompt("Tell me a story.")], frames.Sampling(), 1, 0))
    )
    paused = worker.submit([prompt("Tell me a story.")], frames.Sampling(), 1, 0)
    (key,) = paused.keys
    got: list[frames.Piece] = []
    with paused:
        while not got:
            got += [
                e for e in await asyncio.wait_for(paused.take(), WAIT_SECONDS) if isinstance(e, frames.Piece)
            ]
        worker._send(frames.Pause(key))
        await pieces(worker.submit([FRANCE], frames.Sampling(), 1, 0))
        usage = await asyncio.wait_for(worker.usage(), WAIT_SECONDS)
        if not got[-1].finish:
            assert usage.running_count == 0 and usage.kv_bytes > 0
        worker._send(frames.Resume(key))
        while not got[-1].finish:
            got += [
                e for e in await asyncio.wait_for(paused.take(), WAIT_SECONDS) if isinstance(e, frames.Piece)
            ]
    assert "".join(piece.text for piece in got) == story

    # The bound counts rows, and those that were given back make room.
    running = [worker.submit([FRANCE], ENDLESS, 2, 0) for _ in range(2)]
    with pytest.raises(QueueFullError):
        worker.submit([FRANCE], ENDLESS, 1, 0)
    running[0].__exit__()
    assert worker.open_call_count == 2

    # Limits change while rows run: with one row's worth of cache one goes on, the other waits; then both run again.
    for budget, running_count, preempted_count in ((0, 2, 0), (1, 1, 1), (0, 2, 1)):
        worker.limit(kv_budget_bytes=budget)
        async with asyncio.timeout(WAIT_SECONDS):
            while (usage := await worker.usage()).running_count != running_count:
                await asyncio.sleep(0.01)
        assert usage.preempted_count == preempted_count and usage.waiting_count == 2 - running_count
    worker.limit(max_waiting_rows=0)
    with pytest.raises(QueueFullError):
        worker.submit([FRANCE], ENDLESS, 1, 0)

    # Death: whoever waits hears of it, and of its cause; nothing can be sent any more.
    waiting = asyncio.create_task(asyncio.wait_for(asyncio.shield(_last(running[1])), WAIT_SECONDS))
    await asyncio.sleep(0)
    worker.kill()
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        await waiting
    await asyncio.wait_for(worker.exited.wait(), WAIT_SECONDS)
    assert not worker.is_alive and worker.death is not None and worker.death.kind == "stopped"
    with pytest.raises(EngineDeadError):
        worker.submit([FRANCE], frames.Sampling(), 1, 0)
    with pytest.raises(EngineDeadError):
        await worker.usage()


async def _last(call: Call) -> None:
    while True:
        await call.take()


async def test_a_worker_ends_when_its_socket_closes_whatever_it_does(tmp_path: Path) -> None:
    """Even in the middle of its imports."""
    worker = await WorkerProcess.spawn(WorkerConfig(tmp_path), os.environ)
    await asyncio.wait_for(worker.stop(), WAIT_SECONDS)
    assert worker.exited.is_set() and not worker.is_alive
    with pytest.raises(ModelServerError):
        await asyncio.wait_for(worker.ready(), WAIT_SECONDS)


RECORDER = """
import sys
import mlx.core as mx

def record(limit):
    open({marker!r}, "a").write(f"{{limit}}\\n")
    return 0

mx.set_wired_limit = record
from mlxgui_grpc.engine import worker
sys.argv = ["worker", "--fd", {fd!r}]
worker.main()
"""


async def test_the_wired_limit_is_never_set(tmp_path: Path) -> None:
    """Not while loading, warming or decoding: mlx-lm's generators would, in their constructors."""
    marker = tmp_path / "limits.txt"
    ours, theirs = socket.socketpair()
    with theirs:
        script = RECORDER.format(marker=str(marker), fd=str(theirs.fileno()))
        child = subprocess.Popen([sys.executable, "-c", script], pass_fds=[theirs.fileno()])
    reader, writer = await asyncio.open_connection(sock=ours)
    buffer = frames.FrameBuffer()
    writer.write(frames.encode(frames.Load(str(DEMO))))
    writer.write(frames.encode(frames.Submit((1,), FRANCE, frames.Sampling(max_tokens=8))))
    async with asyncio.timeout(WAIT_SECONDS):
        events = _events(reader, buffer)
        finished = False
        async for event in events:
            assert not isinstance(event, frames.Failed), event
            if isinstance(event, frames.Step) and event.pieces[-1].finish:
                finished = True
                break
    writer.close()
    await writer.wait_closed()
    assert finished and await asyncio.to_thread(child.wait, WAIT_SECONDS) == 0
    assert not marker.exists()


async def _events(reader: asyncio.StreamReader, buffer: frames.FrameBuffer) -> AsyncIterator[frames.Event]:
    while data := await reader.read(1 << 16):
        for body in buffer.feed(data):
            yield frames.decode_event(body)


def test_a_worker_s_environment_has_no_secrets_and_no_network(tmp_path: Path) -> None:
    given = {"HF_TOKEN": "a", "HUGGINGFACE_HUB_TOKEN": "b", "MLX_GUI_API_KEY": "c", "PATH": "/bin"}
    environment = worker_environment(given, tmp_path)
    assert not {"a", "b", "c"} & set(environment.values())
    assert environment["TMPDIR"] == str(tmp_path) and environment["PATH"] == "/bin"
    assert environment["HF_HUB_OFFLINE"] == environment["TRANSFORMERS_OFFLINE"] == "1"


def test_grammars_of_who_has_gone_are_not_compiled_and_few_wait() -> None:
    """And what a library of Rust's throws is an answer, not the end of a thread."""

    class Panic(BaseException):
        pass

    def panic() -> bool:
        raise Panic("a bug")

    ours, theirs = socket.socketpair()
    with ours, theirs:
        worker = runtime.Worker(theirs)
        at_work, may_end, compiled = threading.Semaphore(0), threading.Event(), []

        def work() -> bool:
            at_work.release()
            return may_end.wait(WAIT_SECONDS)

        def note(key: int) -> bool:
            compiled.append(key)
            return True

        for key in range(runtime.GRAMMAR_THREADS):
            worker._compile((key,), work)
            assert at_work.acquire(timeout=WAIT_SECONDS)
        for key in range(runtime.GRAMMAR_THREADS, runtime.MAX_GRAMMARS - 1):
            worker._compile((key,), partial(note, key))
        worker._compile((1000,), panic)
        with pytest.raises(QueueFullError, match="grammars of 64 requests"):
            worker._compile((1001,), work)
        worker._cancelled |= set(range(2, 60))
        may_end.set()
        worker._compilers.shutdown()
        assert sorted(compiled) == [60, 61, 62] and worker._compiling_count == 0 and not worker._cancelled
        (body,) = frames.FrameBuffer().feed(ours.recv(1 << 16))
        failed = frames.decode_event(body)
        assert failed == frames.Failed((1000,), "GENERATION_FAILED", "compiling the grammar failed: a bug")
