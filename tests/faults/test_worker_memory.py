"""A worker whose memory really runs out, by limits set from outside: callers hear why, and so does the supervisor."""

import asyncio
import json
import os
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import psutil
import pytest

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.calls import Call
from mlxgui_grpc.engine.control_group import MemoryGroup
from mlxgui_grpc.engine.supervisor import MEMORY_SAMPLE_SECONDS, WorkerConfig, WorkerProcess
from mlxgui_grpc.errors import EngineDeadError, ModelLoadFailedError, OutOfMemoryError
from tests.conftest import TinyModels
from tests.support_models import build_tiny

WAIT_SECONDS = 120.0
MIB = 1 << 20
WIDE = 1 << 17
LONG_PROMPT = frames.Prompt(token_ids=tuple(range(3, 903)) * 34)
"""Its attention alone takes hundreds of MiB."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of another process: Linux only")

Spawn = Callable[..., Awaitable[WorkerProcess]]


@pytest.fixture
async def spawn(tmp_path: Path) -> AsyncIterator[Spawn]:
    """Starts workers that have done their imports; ends them after the test."""
    started: list[WorkerProcess] = []

    async def start(stall_seconds: float = WAIT_SECONDS) -> WorkerProcess:
        config = WorkerConfig(tmp_path, stall_seconds=stall_seconds)
        worker = await WorkerProcess.spawn(config, os.environ)
        started.append(worker)
        await asyncio.wait_for(worker.ready(), WAIT_SECONDS)
        return worker

    yield start
    for worker in started:
        await worker.stop()


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 100 MB whose layers are wide for no reason."""
    folder = build_tiny(tmp_path_factory.mktemp("heavy") / "heavy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": WIDE}))
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    for name in weights:
        if ".mlp." in name:
            shape = (64, WIDE) if "down_proj" in name else (WIDE, 64)
            weights[name] = mx.full(shape, 0.01)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def leave(worker: WorkerProcess, kind: int, spare_bytes: int) -> None:
    """Let the process have so much more than it has now."""
    memory = psutil.Process(worker.pid).memory_info()
    limit = (memory.vms if kind == resource.RLIMIT_AS else memory.data) + spare_bytes
    resource.prlimit(worker.pid, kind, (limit, limit))


@contextmanager
def control_group(worker: WorkerProcess, spare_bytes: int) -> Iterator[None]:
    """Put the process into a control group that lets it have so much more than it has now."""
    parent = MemoryGroup.of(os.getpid())
    if parent is None:
        pytest.skip("this machine has no memory control groups")
    folder = parent.folder / f"mlxgui-test-{worker.pid}"
    limit = psutil.Process(worker.pid).memory_info().rss + spare_bytes
    try:
        folder.mkdir()
        (folder / ("memory.max" if parent.is_version_2 else "memory.limit_in_bytes")).write_text(str(limit))
        (folder / "cgroup.procs").write_text(str(worker.pid))
    except OSError as error:
        if folder.exists():
            folder.rmdir()
        pytest.skip(f"this machine lets us make no memory control group: {error}")
    try:
        yield
    finally:
        worker.kill()
        while (folder / "cgroup.procs").read_text():
            time.sleep(0.01)
        folder.rmdir()


async def end_of(call: Call) -> None:
    """Read until the call fails."""
    with call:
        while True:
            await asyncio.wait_for(call.take(), WAIT_SECONDS)


async def expect_memory_death(worker: WorkerProcess) -> None:
    await asyncio.wait_for(worker.exited.wait(), WAIT_SECONDS)
    assert worker.death is not None and worker.death.kind == "memory", worker.death


async def test_a_load_that_the_limit_does_not_let_end_is_out_of_memory(spawn: Spawn, heavy: Path) -> None:
    """However it shows: an exception of the loader, a signal, or a load that waits for ever (all three were seen)."""
    worker = await spawn(stall_seconds=3.0)
    leave(worker, resource.RLIMIT_DATA, 40 * MIB)
    with pytest.raises(OutOfMemoryError, match=r"emory ran out|out of memory"):
        await asyncio.wait_for(worker.load("heavy", heavy), WAIT_SECONDS)
    await expect_memory_death(worker)


async def test_a_prompt_that_fills_its_control_group_is_out_of_memory(
    spawn: Spawn, tiny_models: TinyModels
) -> None:
    """The kernel kills it without a word; the request behind it hears the same."""
    worker = await spawn()
    await asyncio.wait_for(worker.load("long", tiny_models.long), WAIT_SECONDS)
    with control_group(worker, 40 * MIB):
        for call in [worker.submit([LONG_PROMPT], frames.Sampling(), 1, 0) for _ in range(2)]:
            with pytest.raises(OutOfMemoryError, match=r"'long'.*killer struck"):
                await end_of(call)
        await expect_memory_death(worker)


async def test_a_prompt_beyond_the_limits_is_out_of_memory(spawn: Spawn, tiny_models: TinyModels) -> None:
    """MLX does not check what malloc returns: the process dies by a signal, next to its limit."""
    worker = await spawn()
    await asyncio.wait_for(worker.load("long", tiny_models.long), WAIT_SECONDS)
    leave(worker, resource.RLIMIT_DATA, 60 * MIB)
    await asyncio.sleep(
        2 * MEMORY_SAMPLE_SECONDS
    )  # The samples of the load are over: the next one sees the limit.
    with pytest.raises(OutOfMemoryError, match="limit"):
        await end_of(worker.submit([LONG_PROMPT], frames.Sampling(), 1, 0))
    await expect_memory_death(worker)
    assert not worker.is_alive and worker.footprint_bytes == 0


async def test_a_worker_that_lives_to_notice_says_so_and_ends_itself(
    spawn: Spawn, tiny_models: TinyModels
) -> None:
    """A request too large for what is left: Python raises MemoryError, and the process goes with it."""
    worker = await spawn()
    await asyncio.wait_for(worker.load("long", tiny_models.long), WAIT_SECONDS)
    leave(worker, resource.RLIMIT_AS, 8 * MIB)
    with pytest.raises(OutOfMemoryError, match="it said so"):
        await end_of(worker.submit([frames.Prompt(text="a" * 40 * MIB)], frames.Sampling(), 1, 0))
    await expect_memory_death(worker)


async def test_other_deaths_are_not_taken_for_memory(
    spawn: Spawn, tiny_models: TinyModels, heavy: Path
) -> None:
    """SIGSEGV with memory to spare, and a stop in the middle of a load."""
    worker = await spawn()
    await asyncio.wait_for(worker.load("long", tiny_models.long), WAIT_SECONDS)
    call = worker.submit([LONG_PROMPT], frames.Sampling(), 1, 0)
    os.kill(worker.pid, signal.SIGSEGV)
    with pytest.raises(EngineDeadError, match="SIGSEGV"):
        await end_of(call)
    await asyncio.wait_for(worker.exited.wait(), WAIT_SECONDS)
    assert worker.death is not None and worker.death.kind == "crash"
    worker = await spawn(stall_seconds=1.0)
    loading = asyncio.ensure_future(worker.load("heavy", heavy))
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(ModelLoadFailedError, match="delivered nothing"):
        await asyncio.wait_for(loading, WAIT_SECONDS)
    await asyncio.wait_for(worker.exited.wait(), WAIT_SECONDS)
    assert worker.death is not None and worker.death.kind == "stall"
