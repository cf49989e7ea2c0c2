"""The loop of the MLX thread in a worker for embedding or reranking: forward passes over what waits, by length.

- Jobs stand in line by `submit_time - priority` seconds, as rows do in `scheduler.py`, plus the seconds that were spent
  on them: one with thousands of texts lets those pass that came while it was computed, and yet gets on.
- The next pass is built around the longest text of the first job: texts of it and of the jobs behind it join, longest
  first, as long as they are at least half as long and the pass stays within its tokens. So the first job always gets
  on, small jobs share passes, and little is computed for what only fills rows up.
- Between two passes cancelled jobs leave and new ones take their places.
"""

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.backends.embedding import EncoderModel
from mlxgui_grpc.engine.embedding_tokens import Sequence
from mlxgui_grpc.engine.loop import Loop
from mlxgui_grpc.errors import QueueFullError
from mlxgui_grpc.memory import ENCODER_BATCH_TOKENS

BATCH_TOKENS = ENCODER_BATCH_TOKENS
"""Most tokens of one pass, those that fill rows up included; a longer text has a pass of its own."""
HELD_BYTES = 256 * 1024 * 1024
"""Of all jobs of a worker; beyond it no more come."""
SHORT_TOKENS = 32
"""Texts up to this length share a pass whatever their lengths: a pass costs more than what fills them up."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class Job:
    """One request: its texts, and what has come out for those that are done."""

    key: int
    kind: Literal["embed", "rerank"]
    sequences: list[Sequence]
    dimensions: int = 0
    """Leading numbers of a vector to keep; 0: all."""
    priority: int = 0
    submit_time: float = field(default_factory=time.monotonic)
    begin_time: float = 0.0
    spent_seconds: float = 0.0
    """Its share of the passes so far."""
    pending: list[int] = field(default_factory=list)
    """Texts to do, the longest last."""
    values: npt.NDArray[np.float32] | None = None
    """One row for each text; None before the first pass."""

    def __post_init__(self) -> None:
        self.pending = sorted(range(len(self.sequences)), key=lambda index: len(self.sequences[index].ids))

    @property
    def place(self) -> tuple[float, int]:
        """Where it stands in line: the smallest is next."""
        return (self.submit_time - self.priority * frames.PRIORITY_SECONDS + self.spent_seconds, self.key)

    @property
    def token_count(self) -> int:
        """Of all its texts, as the model sees them."""
        return sum(len(sequence.ids) for sequence in self.sequences)

    @property
    def nbytes(self) -> int:
        """Bytes held, about."""
        values = self.values.nbytes if self.values is not None else 0
        return values + sum(sequence.nbytes for sequence in self.sequences)


class EmbeddingQueue(Loop):
    """Owns the jobs. What `Worker` asks of a `Scheduler`, it answers."""

    def __init__(
        self,
        model: EncoderModel,
        *,
        send: Callable[[frames.Event], None],
        report: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        limit_bytes: int = HELD_BYTES,
    ) -> None:
        super().__init__(report, clock)
        self._model = model
        self._send = send
        self._limit_bytes = limit_bytes
        self._held: weakref.WeakSet[Job] = weakref.WeakSet()
        self._jobs: list[Job] = []
        self.work_count = 0
        """Tokens computed."""
        self.kv_bytes = 0
        self.preempted_count = 0

    # From the helper thread.

    def refuse_when_full(self) -> None:
        """Raise QueueFullError while the jobs that are held take too much memory."""
        if sum(job.nbytes for job in list(self._held)) >= self._limit_bytes:
            raise QueueFullError(
                f"the texts of other requests to this model take {self._limit_bytes >> 20} MiB already; try again "
                "when some are answered"
            )

    def hold(self, job: Job) -> None:
        """Count a job as long as it is there, be it queued or about to be."""
        self._held.add(job)

    # On the MLX thread.

    def submit(self, job: Job) -> None:
        """Queue a job at its place."""
        self._jobs.append(job)
        self._jobs.sort(key=lambda job: job.place)

    def cancel(self, keys: frozenset[int]) -> None:
        """Forget jobs; unknown keys are ignored."""
        self._jobs = [job for job in self._jobs if job.key not in keys]

    def pause(self, key: int) -> None:
        """Nothing: a job has one answer."""

    def resume(self, key: int) -> None:
        """Nothing: a job has one answer."""

    def limit(self, max_rows: int, kv_budget_bytes: int) -> None:
        """Nothing: passes are bounded by their tokens and keep no cache."""

    def keys(self) -> tuple[int, ...]:
        """The jobs that are here."""
        return tuple(job.key for job in self._jobs)

    def fail_all(self, reason: str, message: str) -> None:
        """End every job with an error, after a pass that raised."""
        keys = self.keys()
        self._jobs = []
        if keys:
            self._send(frames.Failed(keys, reason, message))

    @property
    def running_count(self) -> int:
        """Jobs of which something is computed."""
        return sum(job.begin_time > 0 for job in self._jobs)

    @property
    def waiting_count(self) -> int:
        """Jobs of which nothing is computed yet."""
        return len(self._jobs) - self.running_count

    def turn(self) -> bool:
        """Compute one pass and answer what is complete; False when there is nothing to do."""
        if not self._jobs:
            return False
        batch = self._next_batch()
        now = self._clock()
        for job in {job.key: job for job, _ in batch}.values():
            if job.begin_time == 0:
                job.begin_time = now
                self._send(frames.Prefilled((job.key,), 0, job.token_count))
        values = self._compute([job.sequences[index] for job, index in batch])
        seconds_per_token = (self._clock() - now) / sum(len(job.sequences[index].ids) for job, index in batch)
        for (job, index), row in zip(batch, values, strict=True):
            if job.values is None:
                job.values = np.empty((len(job.sequences), len(row)), np.float32)
            job.values[index] = row
            job.pending.remove(index)
            job.spent_seconds += seconds_per_token * len(job.sequences[index].ids)
        self._jobs.sort(key=lambda job: job.place)
        for job in [job for job in self._jobs if not job.pending]:
            self._jobs.remove(job)
            self._send(self._answer(job))
        return True

    def _next_batch(self) -> list[tuple[Job, int]]:
        first = self._jobs[0]
        length = len(first.sequences[first.pending[-1]].ids)
        row_count = max(1, BATCH_TOKENS // length)
        least = 0 if length <= SHORT_TOKENS else length / 2
        batch: list[tuple[Job, int]] = []
        for job in self._jobs:
            # Never more than a pass holds of each: with 2,048 texts that is a short walk.
            for index in reversed(job.pending):
                size = len(job.sequences[index].ids)
                if len(batch) == row_count or size < least:
                    break
                if size <= length:
                    batch.append((job, index))
        return batch

    def _compute(self, sequences: list[Sequence]) -> npt.NDArray[np.float32]:
        length = max(len(sequence.ids) for sequence in sequences)
        ids = np.full((len(sequences), length), self._model.padding_token, np.int32)
        mask = np.zeros((len(sequences), length), np.float32)
        segments = np.zeros((len(sequences), length), np.int32)
        for row, sequence in enumerate(sequences):
            size = len(sequence.ids)
            ids[row, :size] = sequence.ids
            mask[row, :size] = 1
            if sequence.segments is not None:
                segments[row, :size] = sequence.segments
        values = self._model.run(mx.array(ids), mx.array(mask), mx.array(segments))
        mx.eval(values)
        result: npt.NDArray[np.float32] = np.array(values)
        self.work_count += sum(len(sequence.ids) for sequence in sequences)
        return result

    def _answer(self, job: Job) -> frames.Embedded | frames.Reranked | frames.Failed:
        assert job.values is not None
        values, now = job.values, self._clock()
        queue_seconds, compute_seconds = job.begin_time - job.submit_time, now - job.begin_time
        if not np.isfinite(values).all():
            return frames.Failed((job.key,), "GENERATION_FAILED", "the model computed numbers that are none")
        if job.kind == "rerank":
            scores = tuple(values[:, 0].tolist())
            return frames.Reranked(job.key, scores, job.token_count, queue_seconds, compute_seconds)
        if job.dimensions > values.shape[1]:
            return frames.Failed(
                (job.key,),
                "INVALID_PARAMETER",
                f"dimensions must be at most {values.shape[1]}, what the model makes",
                "dimensions",
            )
        if job.dimensions:
            values = values[:, : job.dimensions]
            values = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
        vectors = np.ascontiguousarray(values, "<f4").tobytes()
        return frames.Embedded(
            job.key, values.shape[1], vectors, job.token_count, queue_seconds, compute_seconds
        )
