"""The loop of the MLX thread: admit waiting rows, prefill a chunk, decode a step, deliver what came out.

Policy, with the figures that chose it in the design notes (`worker-process.md`, section 2):
- Rows with short prompts (up to 256 tokens) are prefilled together and join in one call: at once when nothing
  decodes, else every `ADMIT_EVERY_STEPS` steps, or sooner when a quarter of the batch waits.
- Longer prompts are prefilled one at a time in chunks, between two steps of the others: 512 tokens while others
  decode, 2048 when alone. A cancelled one is dropped between two chunks.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.batch import DecodeBatch, Prefill
from mlxgui_grpc.engine.detokenizer import Detokenizer, StopMatcher
from mlxgui_grpc.engine.sampling import RowSampling

SHORT_PROMPT_TOKENS = 256
ADMIT_EVERY_STEPS = 8
"""8 and not the 4 of the lab's sweep: behind the whole server, 16 and 32 SSE clients get 5 to 15 % more tokens a second
(micro model, two runs in turn), and the time to first token stays under a third of mlx_lm.server's."""
ADMIT_ROW_BUDGET = 16
"""Short prompts prefilled together: bounds the pause of the rows that decode, and the memory of the prefill."""
CHUNK_TOKENS_BUSY = 512
CHUNK_TOKENS_ALONE = 2048


@dataclass(eq=False, slots=True)
class EngineRow:
    """One sequence from its admission to its last token."""

    key: int
    prompt: list[int]
    sampling: RowSampling
    detokenizer: Detokenizer
    stop: StopMatcher
    token_limit: int
    priority: int = 0
    submit_time: float = field(default_factory=time.monotonic)
    prefill_time: float = 0.0
    decode_time: float = 0.0
    token_count: int = 0
    unreported_count: int = 0
    """Tokens decoded whose text is still held back: they are counted with the next text."""


@dataclass(eq=False, slots=True)
class _Parked:
    """A paused row outside the batch."""

    row: EngineRow
    token: int
    cache: list[Any]


class Scheduler:
    """Owns the rows. All methods but `call` run on the MLX thread."""

    def __init__(
        self,
        model: Any,
        *,
        end_tokens: frozenset[int],
        max_rows: int,
        send: Callable[[frames.Event], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._end_tokens = end_tokens
        self._max_rows = max_rows
        self._send = send
        self._clock = clock
        self._waiting: deque[EngineRow] = deque()
        self._prefill: Prefill[EngineRow] | None = None
        self._batch: DecodeBatch[EngineRow] = DecodeBatch(model, lambda row: row.sampling)
        self._joining: list[EngineRow] = []
        """Rows between two places: a step that raises must not lose them."""
        self._parked: dict[int, _Parked] = {}
        self._pause_when_decoding: set[int] = set()
        self._resumable: deque[_Parked] = deque()
        self._steps_since_admission = ADMIT_EVERY_STEPS
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self.turn_count = 0
        """Turns that went well."""

    # From other threads.

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` on the MLX thread between two steps."""
        with self._wake:
            self._calls.append(function)
            self._wake.notify()

    # On the MLX thread.

    def run(self) -> NoReturn:
        """Work for ever. Sleeps on a condition when there is nothing to do."""
        while True:
            while self._calls:
                self._calls.popleft()()
            if self.turn():
                self.turn_count += 1
            else:
                with self._wake:
                    while not self._calls:
                        self._wake.wait()

    def submit(self, rows: list[EngineRow]) -> None:
        """Queue rows, larger priorities first, equal ones in order of arrival."""
        for row in rows:
            at = len(self._waiting)
            while at and self._waiting[at - 1].priority < row.priority:
                at -= 1
            self._waiting.insert(at, row)

    def cancel(self, keys: frozenset[int]) -> None:
        """Forget rows wherever they are; their memory is free after this step or prefill chunk."""
        self._pause_when_decoding -= keys
        self._waiting = deque(row for row in self._waiting if row.key not in keys)
        if self._prefill and all(row.key in keys for row in self._prefill.rows):
            self._prefill = None
        for key in keys & self._parked.keys():
            del self._parked[key]
        self._resumable = deque(parked for parked in self._resumable if parked.row.key not in keys)
        self._leave({i for i, row in enumerate(self._batch.rows) if row.key in keys})

    def pause(self, key: int) -> None:
        """Take a decoding row out of the batch until `resume`; a row at another stage goes on until it decodes."""
        index = next((i for i, row in enumerate(self._batch.rows) if row.key == key), None)
        if index is None:
            if any(
                row.key == key for row in (*self._waiting, *(self._prefill.rows if self._prefill else ()))
            ):
                self._pause_when_decoding.add(key)
            return
        row = self._batch.rows[index]
        token, cache = self._batch.take(index)
        if (piece := self._advance(row, token)) is not None:
            self._send(frames.Step([piece]))
            if piece.finish:
                return
        self._parked[key] = _Parked(row, token, cache)

    def resume(self, key: int) -> None:
        """Let a paused row decode on."""
        self._pause_when_decoding.discard(key)
        if parked := self._parked.pop(key, None):
            self._resumable.append(parked)

    def fail_all(self, reason: str, message: str) -> None:
        """End every row with an error: the batch cannot be trusted after a step that raised."""
        rows = [*self._waiting, *(self._prefill.rows if self._prefill else []), *self._batch.rows]
        rows += self._joining
        rows += [parked.row for parked in (*self._parked.values(), *self._resumable)]
        self._joining = []
        self._pause_when_decoding.clear()
        self._waiting.clear()
        self._parked.clear()
        self._resumable.clear()
        self._prefill = None
        self._batch = DecodeBatch(self._model, lambda row: row.sampling)
        if rows:
            self._send(frames.Failed(tuple({row.key for row in rows}), reason, message))

    @property
    def running_count(self) -> int:
        """Rows that decode or are being prefilled."""
        return len(self._batch.rows) + (len(self._prefill.rows) if self._prefill else 0)

    @property
    def waiting_count(self) -> int:
        """Rows that wait for their prefill."""
        return len(self._waiting)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all caches of rows."""
        parked = [layer for park in (*self._parked.values(), *self._resumable) for layer in park.cache]
        prefill = self._prefill.cache if self._prefill else []
        return self._batch.kv_bytes + sum(int(layer.nbytes) for layer in (*parked, *prefill))

    def turn(self) -> bool:
        """Admit, prefill a chunk, decode a step; False when there is nothing to do."""
        self._rejoin()
        self._admit()
        if self._prefill:
            self._prefill_chunk(self._prefill)
        if not self._batch.rows:
            return self._prefill is not None or bool(self._waiting)
        self._decode()
        return True

    def _free_rows(self) -> int:
        in_prefill = len(self._prefill.rows) if self._prefill else 0
        return self._max_rows - len(self._batch.rows) - in_prefill

    def _rejoin(self) -> None:
        while self._resumable and self._free_rows() > 0:
            parked = self._resumable.popleft()
            self._joining = [parked.row]
            self._batch.rejoin(parked.row, parked.token, parked.cache)
            self._joining = []

    def _admit(self) -> None:
        """Let waiting rows in, when it is time and there is room."""
        if not self._waiting or not self._is_admission_due():
            return
        self._steps_since_admission = 0
        now = self._clock()
        group: list[EngineRow] = []
        passed_over: deque[EngineRow] = deque()
        while self._waiting and len(group) < self._free_rows():
            row = self._waiting.popleft()
            if len(row.prompt) > SHORT_PROMPT_TOKENS:
                if self._prefill is None:
                    row.prefill_time = now
                    self._joining = [row, *group, *passed_over]
                    self._prefill = Prefill(self._model, [row], [row.prompt])
                    self._joining = []
                else:  # One long prompt at a time; short ones behind it need not wait.
                    passed_over.append(row)
            elif len(group) >= ADMIT_ROW_BUDGET and self._batch.rows:
                passed_over.append(row)
                break
            else:
                row.prefill_time = now
                group.append(row)
        self._waiting = passed_over + self._waiting
        if group:
            self._joining = group
            prefill = Prefill(self._model, group, [row.prompt for row in group])
            if not prefill.is_done:
                prefill.advance(SHORT_PROMPT_TOKENS)
            self._join(prefill)

    def _is_admission_due(self) -> bool:
        decoding = len(self._batch.rows)
        return (
            decoding == 0
            or self._steps_since_admission >= ADMIT_EVERY_STEPS
            or 4 * len(self._waiting) >= decoding
        )

    def _prefill_chunk(self, prefill: Prefill[EngineRow]) -> None:
        prefill.advance(CHUNK_TOKENS_BUSY if self._batch.rows else CHUNK_TOKENS_ALONE)
        if prefill.is_done:
            self._joining = prefill.rows
            self._prefill = None
            self._join(prefill)
        else:
            keys = tuple(row.key for row in prefill.rows)
            self._send(frames.Prefilled(keys, prefill.done_token_count, len(prefill.rows[0].prompt)))

    def _join(self, prefill: Prefill[EngineRow]) -> None:
        self._batch.join(prefill.rows, prefill.last_tokens, prefill.cache)
        self._joining = []
        for key in self._pause_when_decoding & {row.key for row in prefill.rows}:
            self._pause_when_decoding.discard(key)
            self.pause(key)

    def _decode(self) -> None:
        rows = self._batch.rows
        tokens = self._batch.step()
        self._steps_since_admission += 1
        pieces: list[frames.Piece] = []
        finished: set[int] = set()
        for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            piece = self._advance(row, token)
            if piece is not None:
                pieces.append(piece)
                if piece.finish:
                    finished.add(index)
        if pieces:
            self._send(frames.Step(pieces))
        self._leave(finished)

    def _leave(self, indices: set[int]) -> None:
        if indices:
            self._batch.remove(indices)

    def _advance(self, row: EngineRow, token: int) -> frames.Piece | None:
        """Account for one token of a row; the piece to deliver, if there is one."""
        if row.token_count == 0:
            row.decode_time = self._clock()
        row.token_count += 1
        row.unreported_count += 1
        finish: Literal["", "stop", "length"] = ""
        if token in self._end_tokens:
            new, finish = row.detokenizer.flush(), "stop"
        else:
            new = row.detokenizer.add(token)
            if row.token_count >= row.token_limit:
                new, finish = new + row.detokenizer.flush(), "length"
        text, match = row.stop.add(new)
        if match:
            finish = "stop"
        elif finish:
            text += row.stop.flush()
        if not text and not finish:
            return None
        count, row.unreported_count = row.unreported_count, 0
        return frames.Piece(row.key, count, text, finish, match, self._spent(row) if finish else None)

    def _spent(self, row: EngineRow) -> frames.Spent:
        now = self._clock()
        return frames.Spent(
            queue=row.prefill_time - row.submit_time,
            prefill=row.decode_time - row.prefill_time,
            decode=now - row.decode_time,
        )
