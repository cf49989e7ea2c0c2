"""How the end of a worker is judged, and what is read of control groups and token counts."""

import os
import signal
from pathlib import Path

import pytest

from mlxgui_grpc.engine.control_group import GroupLimit, MemoryGroup
from mlxgui_grpc.engine.death import EXIT_MEMORY, EXIT_TEMPLATE, Death, judge, judge_stall
from mlxgui_grpc.engine.memory_watch import MemoryWatch
from mlxgui_grpc.engine.token_rate import TokenRate

NEAR = "it was using 90 MiB of the 100 MiB of its control group"
METAL = (
    "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command buffer execution "
    "failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
)


def judged(
    status: int,
    words: str = "",
    evidence: str = "",
    *,
    platform: str = "linux",
    ended_by_us: bool = False,
    said_memory: bool = False,
) -> Death:
    return judge(
        "demo",
        status,
        ended_by_us=ended_by_us,
        last_words=words,
        memory_evidence=evidence,
        said_memory=said_memory,
        platform=platform,
    )


@pytest.mark.parametrize(
    "death",
    [
        judged(EXIT_MEMORY),
        judged(0, said_memory=True),
        judged(1, "Traceback ...\nMemoryError"),
        judged(127, "cannot allocate memory for thread-local data: ABORT"),
        judged(-signal.SIGABRT, METAL, platform="darwin"),
        judged(-signal.SIGKILL, platform="darwin"),
        judged(1, "RuntimeError: Resource temporarily unavailable", NEAR),
        *(
            judged(-number, evidence=NEAR)
            for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
        ),
        judge_stall("demo", "did nothing", NEAR),
    ],
)
def test_signs_of_memory(death: Death) -> None:
    assert (death.kind, death.error("demo").reason) == ("memory", "OUT_OF_MEMORY")
    assert "'demo'" in death.message and "memory" in death.message


@pytest.mark.parametrize(
    ("death", "kind", "reason"),
    [
        (judged(-signal.SIGKILL), "crash", "ENGINE_DEAD"),
        (judged(-signal.SIGSEGV, platform="darwin"), "crash", "ENGINE_DEAD"),
        (judged(1, "RuntimeError: Resource temporarily unavailable"), "crash", "ENGINE_DEAD"),
        (judged(1, "ValueError: no", NEAR), "crash", "ENGINE_DEAD"),
        (judged(0, "out of memory, and went on", NEAR), "stopped", "ENGINE_DEAD"),
        (judged(-signal.SIGTERM, evidence=NEAR), "crash", "ENGINE_DEAD"),
        (judged(-signal.SIGKILL, ended_by_us=True, evidence=NEAR), "stopped", "ENGINE_DEAD"),
        (judged(-signal.SIGKILL, ended_by_us=True, platform="darwin"), "stopped", "ENGINE_DEAD"),
        (judged(-signal.SIGALRM), "template", "MODEL_UNSAFE"),
        (judged(EXIT_TEMPLATE), "template", "ENGINE_DEAD"),
        (judge_stall("demo", "did nothing", ""), "stall", "ENGINE_DEAD"),
    ],
)
def test_what_is_no_sign_of_memory(death: Death, kind: str, reason: str) -> None:
    assert (death.kind, death.error("demo").reason) == (kind, reason)


def group(tmp_path: Path, line: str, files: dict[str, str]) -> MemoryGroup | None:
    """The group of process 7 on a machine whose /proc and /sys/fs/cgroup have these contents."""
    (tmp_path / "proc/7").mkdir(parents=True)
    (tmp_path / "proc/7/cgroup").write_text(line)
    (tmp_path / "cgroup").mkdir()
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return MemoryGroup.of(7, tmp_path / "proc", tmp_path / "cgroup")


def test_a_control_group_of_version_2_with_limits_on_two_levels(tmp_path: Path) -> None:
    found = group(
        tmp_path,
        "0::/user/worker\n",
        {
            "user/worker/memory.max": "1000\n",
            "user/worker/memory.current": "900\n",
            "user/worker/memory.stat": "anon 600\ninactive_file 250\n",
            "user/worker/memory.events": "low 0\noom 4\noom_kill 3\n",
            "user/memory.max": "max\n",
            "user/memory.current": "1\n",
        },
    )
    assert found is not None and found.is_version_2
    assert found.limits() == [GroupLimit("worker", 650, 1000)]
    assert found.kill_count() == 3


def test_a_control_group_of_version_1_beside_version_2_in_a_container(tmp_path: Path) -> None:
    """The path is the host's; the mount point is the group."""
    found = group(
        tmp_path,
        "4:cpu:/docker/abc\n3:memory:/docker/abc\n0::/docker/abc\n",
        {
            "memory/memory.limit_in_bytes": "5000\n",
            "memory/memory.usage_in_bytes": "4500\n",
            "memory/memory.stat": "cache 1\ninactive_file 0\n",
            "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        },
    )
    assert found is not None and not found.is_version_2
    assert [(limit.used_bytes, limit.limit_bytes) for limit in found.limits()] == [(4500, 5000)]
    assert found.kill_count() == 2


def test_no_control_group(tmp_path: Path) -> None:
    assert group(tmp_path, "0::/\n", {}) is None
    assert MemoryGroup.of(8, tmp_path / "proc", tmp_path / "cgroup") is None


def test_a_process_near_its_budget_is_told_apart_from_one_that_is_not() -> None:
    budget = 1 << 50
    watch = MemoryWatch(os.getpid(), lambda: budget)
    footprint = watch.footprint_bytes
    assert footprint > 1 << 20 and "budget" not in watch.evidence(-signal.SIGSEGV)
    watch.sample(mlx_bytes=int(0.9 * budget))
    assert "its memory budget" in watch.evidence(-signal.SIGSEGV)
    budget = 8 * footprint
    watch.expect(8 * footprint)
    assert "it needed" in watch.evidence(-signal.SIGSEGV)
    watch.expect(0)
    assert "budget" not in watch.evidence(-signal.SIGSEGV)
    assert watch.signs_of_life() and MemoryWatch(2**22 + 1, lambda: 0).footprint_bytes == 0


def test_tokens_a_second_over_a_sliding_window() -> None:
    rate = TokenRate()
    assert rate.per_second(100.0) == 0
    for tenth in range(200):  # 20 seconds at 100 a second
        rate.add(100 + tenth / 10, 10)
    assert rate.per_second(120.0) == pytest.approx(100, rel=0.1)
    assert 0 < rate.per_second(124.0) < 50
    assert rate.per_second(126.0) == 0
    rate.add(130.0, 30)
    assert rate.per_second(130.5) == 30, "at least a second is counted"
