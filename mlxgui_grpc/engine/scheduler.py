"""The loop of the MLX thread: admit waiting rows, prefill a chunk, decode a step, deliver what came out.

Policy, with the figures that chose it in the design notes (`worker-process.md`, section 2):
- Rows with short prompts (up to 256 tokens) are prefilled together and join in one call: at once when nothing
  decodes, else every `ADMIT_EVERY_STEPS` steps, or sooner when a quarter of the batch waits.
- Longer prompts, and those with pictures, are prefilled one at a time in chunks, between two steps of the others: 512
  tokens while others decode, 2048 when alone, fewer where they are scored; before that one picture at a time where
  the architecture tells them apart. A cancelled one is dropped between two chunks.
- The queue is ordered by `submit_time - priority` seconds: larger priorities go first, and yet nobody starves.
- Rows reserve KV cache before they start and as they grow. When that is more than the budget, the row with the last
  place in that order makes room: it is queued again, and recomputed when its turn comes. It is never failed.
"""

import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.batch import DecodeBatch, Prefill
from mlxgui_grpc.engine.death import is_memory_error
from mlxgui_grpc.engine.kv_budget import STEP_TOKENS, UNKNOWN_COST, KvBudget, KvCost, rounded_up
from mlxgui_grpc.engine.logprobs import TokenTexts, logprob_bytes, split_piece
from mlxgui_grpc.engine.loop import Loop
from mlxgui_grpc.engine.row import EngineRow
from mlxgui_grpc.errors import ModelServerError

SHORT_PROMPT_TOKENS = 256
ADMIT_EVERY_STEPS = 8
"""8 and not the 4 of the lab's sweep: behind the whole server, 16 and 32 SSE clients get 5 to 15 % more tokens a second
(micro model, two runs in turn), and the time to first token stays under a third of mlx_lm.server's."""
ADMIT_ROW_BUDGET = 16
"""Short prompts prefilled together: bounds the pause of the rows that decode, and the memory of the prefill."""
CHUNK_TOKENS_BUSY = 512
CHUNK_TOKENS_ALONE = 2048
CHUNK_TOKENS_SCORED = 128
"""Of a prompt whose tokens are scored, while others decode: each token costs the output layer and a sort."""
STEP_LOGPROB_BYTES = 8 * 1024 * 1024
"""Log-probabilities in one frame, about; those of a prompt that are more come in several pieces."""


@dataclass(eq=False, slots=True)
class _Parked:
    """A paused row outside the batch. Without its cache it is recomputed when its reader has caught up."""

    row: EngineRow
    cache: list[Any] | None


class Scheduler(Loop):
    """Owns the rows."""

    def __init__(
        self,
        model: Any,
        *,
        end_tokens: frozenset[int],
        max_rows: int,
        send: Callable[[frames.Event], None],
        kv_cost: KvCost = UNKNOWN_COST,
        kv_budget_bytes: int = 0,
        token_texts: TokenTexts | None = None,
        report: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without `token_texts` no row may want log-probabilities."""
        super().__init__(report, clock)
        self._model = model
        self._end_tokens = end_tokens
        self._max_rows = max_rows
        self._send = send
        self._token_texts = token_texts
        self._budget = KvBudget(kv_cost, kv_budget_bytes)
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
        self.work_count = 0
        """Tokens prefilled and decoded."""
        self.preempted_count = 0
        """How often a row had to make room for others."""

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
        self._leave_prefill({row for row in self._prefilling() if row.key in keys})
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
        self._steps_to_growth = 0
        if not self._deliver_last(row, token):
            self._parked[key] = _Parked(row, cache)
        self._joining = []

    def _deliver_last(self, row: EngineRow, token: int) -> bool:
        """Deliver the token that a row had drawn when it left the batch; True when it was the row's last."""
        piece, is_over = self._advance(row, token)
        if piece is not None:
            self._deliver([piece])
        return is_over

    def _advance(self, row: EngineRow, token: int) -> tuple[frames.Piece | None, bool]:
        """Account for a token that the batch has just given: what to deliver, and whether it is the row's last.

        A row whose guide knows no way on, or whose text cannot be made, is failed, and no other."""
        guide = row.sampling.guide
        if guide is not None and guide.failure:
            self._send(frames.Failed((row.key,), "INVALID_PARAMETER", guide.failure, guide.field))
            return None, True
        try:
            logprob = None
            if row.sampling.top_logprobs is not None:
                assert self._token_texts is not None, "promised to the constructor"
                logprob = self._token_texts.logprob(self._batch.scores[row])
            piece = row.advance(token, self._end_tokens, self._clock, logprob)
        except BaseException as error:  # A panic of the tokenizer's is no Exception.
            if is_memory_error(error) or isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            message = f"the reply could not be read: {type(error).__name__}: {error}"
            self._send(frames.Failed((row.key,), "GENERATION_FAILED", message))
            return None, True
        return piece, piece is not None and bool(piece.finish)

    def _deliver(self, pieces: list[frames.Piece]) -> None:
        """Send what a step brought, in several frames where log-probabilities make it long."""
        ready: list[frames.Piece] = []
        ready_bytes = 0
        for part in (part for piece in pieces for part in split_piece(piece, STEP_LOGPROB_BYTES)):
            size = logprob_bytes(part)
            if ready and ready_bytes + size > STEP_LOGPROB_BYTES:
                self._send(frames.Step(ready))
                ready, ready_bytes = [], 0
            ready.append(part)
            ready_bytes += size
        if ready:
            self._send(frames.Step(ready))

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
        aside = [rounded_up(parked.row.length) for parked in self._set_aside() if parked is not leaving]
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
            self._leave_prefill({row})
        else:
            self._joining = [row]
            token = self._batch.drop(self._batch.rows.index(row))
            is_over = self._deliver_last(row, token)
            self._joining = []
            if is_over:
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
            is_long = row.length > SHORT_PROMPT_TOKENS or row.wants_prompt_logprobs or row.images is not None
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
                rows = [row, *self._siblings(row, group, at, now)]
                self._joining = [*rows, *group]
                top_logprobs = row.sampling.top_logprobs if row.wants_prompt_logprobs else None
                tokens: list[Sequence[int]] = [row.tokens for row in rows]
                if row.images is None:
                    self._prefill = Prefill(self._model, rows, tokens, top_logprobs=top_logprobs)
                else:
                    model = self._model.with_images(row.images)
                    self._prefill = Prefill(model, rows, tokens, top_logprobs=top_logprobs, look=model.look)
                self._joining = []
            else:
                group.append(row)
        if group:
            self._joining = group
            prefill = Prefill(self._model, group, [row.tokens for row in group])
            if not prefill.is_done:
                prefill.advance(SHORT_PROMPT_TOKENS)
            self.work_count += prefill.token_count
            self._join(prefill)

    def _siblings(self, first: EngineRow, group: list[EngineRow], at: int, now: float) -> list[EngineRow]:
        """Take the rows from the queue that wait at `at` for the prefill of the same prompt, as far as there is room
        beside `group`: they share it. The others compute it again when their turn comes."""
        rows: list[EngineRow] = []
        while at < len(self._waiting) and 1 + len(rows) + len(group) < self._free_rows():
            row = self._waiting[at]
            if row.tokens is not first.tokens:
                break
            row.reserve()
            if not self._fits([*group, first, *rows, row]):
                break
            del self._waiting[at]
            row.prefill_time = row.prefill_time or now
            rows.append(row)
        return rows

    def _is_admission_due(self) -> bool:
        decoding = len(self._batch.rows)
        return (
            decoding == 0
            or self._steps_since_admission >= ADMIT_EVERY_STEPS
            or 4 * len(self._waiting) >= decoding
        )

    def _look(self, prefill: Prefill[EngineRow]) -> bool:
        """Look at one more picture of the prompt; False when there is none. The rows are failed when it cannot be."""
        try:
            token_count = prefill.look()
        except ModelServerError as error:
            keys = tuple(row.key for row in prefill.rows)
            self._pause_when_decoding.difference_update(keys)
            self._prefill = None
            self._send(frames.Failed(keys, error.reason, error.message, error.field))
            return True
        self.work_count += token_count
        return token_count > 0

    def _prefill_chunk(self, prefill: Prefill[EngineRow]) -> None:
        if self._look(prefill):
            return
        done_before = prefill.done_token_count
        if not prefill.is_done:
            busy = CHUNK_TOKENS_SCORED if prefill.is_scored else CHUNK_TOKENS_BUSY
            prefill.advance(busy if self._batch.rows else CHUNK_TOKENS_ALONE)
        self.work_count += prefill.done_token_count - done_before
        if prefill.is_scored:
            assert self._token_texts is not None, "promised to the constructor"
            prefill.prompt_logprobs += map(self._token_texts.logprob, prefill.take_scores())
        if prefill.is_done:
            self._joining = prefill.rows
            self._prefill = None
            self._join(prefill)
        elif not prefill.rows[0].generated:  # Who has had tokens already is told nothing of a recomputation.
            keys = tuple(row.key for row in prefill.rows)
            self._send(frames.Prefilled(keys, prefill.done_token_count, len(prefill.rows[0].prompt)))

    def _leave_prefill(self, rows: set[EngineRow]) -> None:
        if self._prefill is not None:
            self._prefill.discard(rows)
            if not self._prefill.rows:
                self._prefill = None

    def _join(self, prefill: Prefill[EngineRow]) -> None:
        if prefill.is_scored:
            logprobs = tuple(prefill.prompt_logprobs)
            for row in prefill.rows:
                row.prompt_logprobs, row.wants_prompt_logprobs = logprobs, False
        if not self._end_scored(prefill):
            self._joining = []
            return
        self._batch.join(prefill.rows, prefill.last_tokens, prefill.row_caches())
        self._joining = []
        self._steps_to_growth = 0
        for key in self._pause_when_decoding & {row.key for row in prefill.rows}:
            self._pause_when_decoding.discard(key)
            self.pause(key)

    def _end_scored(self, prefill: Prefill[EngineRow]) -> bool:
        """Deliver the rows that generate nothing; whether others are left."""
        scored = [row for row in prefill.rows if not row.token_limit]
        if scored:
            prefill.discard(set(scored))
            self._joining = prefill.rows
            self._pause_when_decoding.difference_update(row.key for row in scored)
            self._deliver([row.end_scored(self._clock) for row in scored])
        return bool(prefill.rows)

    def _decode(self) -> None:
        rows = self._batch.rows
        tokens = self._batch.step()
        self._steps_since_admission += 1
        self._steps_to_growth -= 1
        self.work_count += len(rows)
        pieces: list[frames.Piece] = []
        finished: set[int] = set()
        for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            piece, is_over = self._advance(row, token)
            if piece is not None:
                pieces.append(piece)
            if is_over:
                finished.add(index)
        if pieces:
            self._deliver(pieces)
        self._leave(finished)

    def _leave(self, indices: set[int]) -> None:
        if indices:
            self._batch.remove(indices)
