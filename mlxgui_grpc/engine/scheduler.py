"""The loop of the MLX thread: admit waiting rows, prefill a chunk, decode a step, deliver what came out.

Policy, with the figures that chose it in the design notes (`worker-process.md`, section 2):
- Rows with short prompts (up to 256 tokens) are prefilled together and join in one call: at once when nothing
  decodes, else every `ADMIT_EVERY_STEPS` steps, or sooner when a quarter of the batch waits.
- Longer prompts are prefilled one at a time in chunks, between two steps of the others: 512 tokens while others
  decode, 2048 when alone. A cancelled one is dropped between two chunks.
- The queue is ordered by `submit_time - priority` seconds: larger priorities go first, and yet nobody starves.
- Rows reserve KV cache before they start and as they grow. When that is more than the budget, the row with the last
  place in that order makes room: it is queued again, and recomputed when its turn comes. It is never failed.
"""

import math
import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.batch import DecodeBatch, Prefill
from mlxgui_grpc.engine.kv_budget import STEP_TOKENS, KvBudget, rounded_up
from mlxgui_grpc.engine.row import EngineRow

SHORT_PROMPT_TOKENS = 256
ADMIT_EVERY_STEPS = 8
"""8 and not the 4 of the lab's sweep: behind the whole server, 16 and 32 SSE clients get 5 to 15 % more tokens a second
(micro model, two runs in turn), and the time to first token stays under a third of mlx_lm.server's."""
ADMIT_ROW_BUDGET = 16
"""Short prompts prefilled together: bounds the pause of the rows that decode, and the memory of the prefill."""
CHUNK_TOKENS_BUSY = 512
CHUNK_TOKENS_ALONE = 2048
REPORT_SECONDS = 1.0
IDLE_REPORT_SECONDS = 0.1
"""So long nothing came after the last row has ended: a report says that the worker is idle."""


@dataclass(eq=False, slots=True)
class _Parked:
    """A paused row outside the batch. Without its cache it is recomputed when its reader has caught up."""

    row: EngineRow
    cache: list[Any] | None


class Scheduler:
    """Owns the rows. All methods but `call` run on the MLX thread."""

    def __init__(
        self,
        model: Any,
        *,
        end_tokens: frozenset[int],
        max_rows: int,
        send: Callable[[frames.Event], None],
        kv_bytes_per_token: int = 0,
        kv_budget_bytes: int = 0,
        report: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`report` is called about once a second while there is work, and once when there is no more."""
        self._model = model
        self._end_tokens = end_tokens
        self._max_rows = max_rows
        self._send = send
        self._clock = clock
        self._report = report
        self._report_time = -math.inf
        self._has_news = False
        self._budget = KvBudget(kv_bytes_per_token, kv_budget_bytes)
        self._steps_to_growth = 0
        """Steps until a row has used up its reservation; 0 also when rows or the budget have changed."""
        self._waiting: list[EngineRow] = []
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
        self.work_count = 0
        """Tokens prefilled and decoded."""
        self.preempted_count = 0
        """How often a row had to make room for others."""

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
                self._has_news = True
                if self._clock() >= self._report_time:
                    self._tell()
            elif not self._wait_for_call(IDLE_REPORT_SECONDS if self._has_news else None):
                self._tell()

    def _wait_for_call(self, seconds: float | None) -> bool:
        with self._wake:
            return self._wake.wait_for(lambda: bool(self._calls), seconds)

    def _tell(self) -> None:
        self._has_news = False
        self._report_time = self._clock() + REPORT_SECONDS
        self._report()

    def submit(self, rows: list[EngineRow]) -> None:
        """Queue rows at their places."""
        for row in rows:
            insort(self._waiting, row, key=lambda row: row.place)

    def limit(self, max_rows: int, kv_budget_bytes: int) -> None:
        """Change the limits. Rows beyond `max_rows` run on; rows beyond the budget (0: none) make room."""
        self._max_rows = max_rows
        self._budget.budget_bytes = kv_budget_bytes
        self._steps_to_growth = 0

    def cancel(self, keys: frozenset[int]) -> None:
        """Forget rows wherever they are; their memory is free after this step or prefill chunk."""
        self._pause_when_decoding -= keys
        self._waiting = [row for row in self._waiting if row.key not in keys]
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
            if any(row.key == key for row in (*self._waiting, *self._prefilling())):
                self._pause_when_decoding.add(key)
            for parked in [parked for parked in self._resumable if parked.row.key == key]:
                self._resumable.remove(parked)
                self._parked[key] = parked
            return
        row = self._batch.rows[index]
        self._joining = [row]
        token, cache = self._batch.take(index)
        self._joining = []
        self._steps_to_growth = 0
        if not self._deliver_last(row, token):
            self._parked[key] = _Parked(row, cache)

    def _deliver_last(self, row: EngineRow, token: int) -> bool:
        """Deliver the token that a row had drawn when it left the batch; True when it was the row's last."""
        piece = row.advance(token, self._end_tokens, self._clock)
        if piece is not None:
            self._send(frames.Step([piece]))
        return piece is not None and bool(piece.finish)

    def resume(self, key: int) -> None:
        """Let a paused row decode on."""
        self._pause_when_decoding.discard(key)
        if parked := self._parked.pop(key, None):
            if parked.cache is None:
                self.submit([parked.row])
            else:
                self._resumable.append(parked)

    def keys(self) -> tuple[int, ...]:
        """The rows that are anywhere here."""
        rows = [*self._waiting, *self._prefilling(), *self._batch.rows, *self._joining]
        rows += [parked.row for parked in (*self._parked.values(), *self._resumable)]
        return tuple({row.key for row in rows})

    def fail_all(self, reason: str, message: str) -> None:
        """End every row with an error: the batch cannot be trusted after a step that raised."""
        keys = self.keys()
        self._joining = []
        self._pause_when_decoding.clear()
        self._waiting.clear()
        self._parked.clear()
        self._resumable.clear()
        self._prefill = None
        self._batch = DecodeBatch(self._model, lambda row: row.sampling)
        if keys:
            self._send(frames.Failed(keys, reason, message))

    @property
    def running_count(self) -> int:
        """Rows that decode or are being prefilled."""
        return len(self._batch.rows) + len(self._prefilling())

    @property
    def waiting_count(self) -> int:
        """Rows that wait for their prefill."""
        return len(self._waiting)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all caches of rows."""
        parked = [layer for park in (*self._parked.values(), *self._resumable) for layer in park.cache or ()]
        prefill = self._prefill.cache if self._prefill else []
        return self._batch.kv_bytes + sum(int(layer.nbytes) for layer in (*parked, *prefill))

    def turn(self) -> bool:
        """Admit, prefill a chunk, decode a step; False when there is nothing to do."""
        if self._steps_to_growth <= 0:
            self._keep_within_budget()
        self._rejoin()
        self._admit()
        if self._prefill:
            self._prefill_chunk(self._prefill)
        if not self._batch.rows:
            return self._prefill is not None or bool(self._waiting)
        self._decode()
        return True

    def _prefilling(self) -> list[EngineRow]:
        return self._prefill.rows if self._prefill else []

    def _free_rows(self) -> int:
        return self._max_rows - len(self._batch.rows) - len(self._prefilling())

    # Room for caches.

    def _set_aside(self) -> list[_Parked]:
        """The rows outside the batch that hold a cache."""
        parked = (*self._parked.values(), *self._resumable)
        return [park for park in parked if park.cache is not None]

    def _fits(self, newcomers: list[EngineRow], leaving: _Parked | None = None) -> bool:
        """Whether the rows that run and `newcomers` have room for their reservations, beside those set aside."""
        running = [row.reserved_count for row in (*self._batch.rows, *self._prefilling(), *newcomers)]
        aside = sum(rounded_up(parked.row.length) for parked in self._set_aside() if parked is not leaving)
        return self._budget.fits(running, aside)

    def _keep_within_budget(self) -> None:
        """Let rows grow that used up their reservations, and others make room for that."""
        for row in self._batch.rows:
            if row.length >= row.reserved_count:
                row.reserved_count = rounded_up(row.length + 1)
        preempted_before = self.preempted_count
        while (self.running_count > 1 or self._set_aside()) and not self._fits([]):
            self._preempt()
        if self.preempted_count > preempted_before:
            self._batch.release()
        if self._budget.is_bounded:
            left = (row.reserved_count - row.length for row in self._batch.rows)
            self._steps_to_growth = min(left, default=STEP_TOKENS)
        else:
            self._steps_to_growth = STEP_TOKENS

    def _preempt(self) -> None:
        """Take the cache of one row: of a paused one if there is any, else of the last in the order of the queue."""
        self.preempted_count += 1
        if aside := self._set_aside():
            parked = max(aside, key=lambda parked: parked.row.place)
            parked.cache = None
            if parked in self._resumable:
                self._resumable.remove(parked)
                self.submit([parked.row])
            return
        row = max([*self._batch.rows, *self._prefilling()], key=lambda row: row.place)
        if row in self._prefilling():
            self._prefill = None
        else:
            self._joining = [row]
            index = self._batch.rows.index(row)
            token = self._batch.drawn_token(index)
            self._batch.remove({index})
            self._joining = []
            if self._deliver_last(row, token):
                return
        self.submit([row])

    # Ways into the batch.

    def _rejoin(self) -> None:
        while self._resumable and self._free_rows() > 0:
            parked = self._resumable[0]
            row, cache = parked.row, parked.cache
            assert cache is not None, "what lost its cache was queued again"
            row.reserved_count = max(row.reserved_count, rounded_up(row.length + 1))
            if self.running_count > 0 and not self._fits([row], leaving=parked):
                return
            self._resumable.popleft()
            self._joining = [row]
            self._batch.rejoin(row, row.generated[-1], cache)
            self._joining = []
            self._steps_to_growth = 0

    def _admit(self) -> None:
        """Let waiting rows in, when it is time and there is room. Rows that were here before go first."""
        if not self._waiting or self._resumable or not self._is_admission_due():
            return
        self._steps_since_admission = 0
        now = self._clock()
        group: list[EngineRow] = []
        at = 0
        while at < len(self._waiting) and len(group) < self._free_rows():
            row = self._waiting[at]
            is_long = row.length > SHORT_PROMPT_TOKENS
            if is_long and self._prefill is not None:
                at += 1  # One long prompt at a time; short ones behind it need not wait.
                continue
            if not is_long and len(group) >= ADMIT_ROW_BUDGET and self._batch.rows:
                break
            row.reserve()
            is_alone = self.running_count + len(group) == 0
            if not is_alone and not self._fits([*group, row]):
                break  # Nobody behind it may pass: the row would never find room.
            del self._waiting[at]
            row.prefill_time = row.prefill_time or now
            if is_long:
                self._joining = [row, *group]
                self._prefill = Prefill(self._model, [row], [row.tokens])
                self._joining = []
            else:
                group.append(row)
        if group:
            self._joining = group
            prefill = Prefill(self._model, group, [row.tokens for row in group])
            if not prefill.is_done:
                prefill.advance(SHORT_PROMPT_TOKENS)
            self.work_count += sum(row.length for row in group)
            self._join(prefill)

    def _is_admission_due(self) -> bool:
        decoding = len(self._batch.rows)
        return (
            decoding == 0
            or self._steps_since_admission >= ADMIT_EVERY_STEPS
            or 4 * len(self._waiting) >= decoding
        )

    def _prefill_chunk(self, prefill: Prefill[EngineRow]) -> None:
        done_before = prefill.done_token_count
        prefill.advance(CHUNK_TOKENS_BUSY if self._batch.rows else CHUNK_TOKENS_ALONE)
        self.work_count += prefill.done_token_count - done_before
        if prefill.is_done:
            self._joining = prefill.rows
            self._prefill = None
            self._join(prefill)
        elif not prefill.rows[0].generated:  # Who has had tokens already is told nothing of a recomputation.
            keys = tuple(row.key for row in prefill.rows)
            self._send(frames.Prefilled(keys, prefill.done_token_count, len(prefill.rows[0].prompt)))

    def _join(self, prefill: Prefill[EngineRow]) -> None:
        self._batch.join(prefill.rows, prefill.last_tokens, prefill.cache)
        self._joining = []
        self._steps_to_growth = 0
        for key in self._pause_when_decoding & {row.key for row in prefill.rows}:
            self._pause_when_decoding.discard(key)
            self.pause(key)

    def _decode(self) -> None:
        rows = self._batch.rows
        tokens = self._batch.step()
        self._steps_since_admission += 1
        self._steps_to_growth -= 1
        self.work_count += len(rows)
        pieces: list[frames.Piece] = []
        finished: set[int] = set()
        for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            piece = row.advance(token, self._end_tokens, self._clock)
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
