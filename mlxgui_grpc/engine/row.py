"""One sequence: its tokens, its place in the queue, and what becomes of each token that is drawn for it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.detokenizer import Detokenizer, StopMatcher
from mlxgui_grpc.engine.kv_budget import first_reservation
from mlxgui_grpc.engine.reading import Reader, Reading
from mlxgui_grpc.engine.sampling import RowSampling

if TYPE_CHECKING:
    from mlxgui_grpc.engine.vision_prompts import RowImages

Finish = Literal["", "stop", "length", "tool_calls"]


@dataclass(eq=False, slots=True)
class EngineRow:
    """One sequence from its admission to its last token."""

    key: int
    prompt: list[int]
    sampling: RowSampling
    detokenizer: Detokenizer
    stop: StopMatcher
    token_limit: int
    """0: it ends with its prefill."""
    reader: Reader | None = None
    """Splits a chat's reply, and looks for stop strings instead of `stop`; None for a completion."""
    echo_text: str = ""
    """What the text begins with."""
    warnings: list[str] = field(default_factory=list)
    """What its caller has to be told of the request, at the end."""
    prompt_logprobs: tuple[frames.Logprob, ...] = ()
    """To be delivered with the first piece; set before the first token."""
    wants_prompt_logprobs: bool = False
    """Its prompt has to be scored in the prefill."""
    images: "RowImages | None" = None
    """The pictures of the prompt."""
    priority: int = 0
    submit_time: float = field(default_factory=time.monotonic)
    prefill_time: float = 0.0
    decode_time: float = 0.0
    generated: list[int] = field(default_factory=list)
    unreported_count: int = 0
    """Tokens decoded whose text is still held back: they are counted with the next text."""
    unreported_reasoning_count: int = 0
    """Of those, the ones inside the thinking with the tags round it, but for a start tag's tokens before its last."""
    unreported_logprobs: list[frames.Logprob] = field(default_factory=list)
    reserved_count: int = 0
    """Tokens that there is cache for."""

    @property
    def place(self) -> tuple[float, int]:
        """Where it stands in the queue: the smallest is next."""
        return (self.submit_time - self.priority * frames.PRIORITY_SECONDS, self.key)

    @property
    def length(self) -> int:
        """Its tokens so far."""
        return len(self.prompt) + len(self.generated)

    @property
    def tokens(self) -> list[int]:
        """What a prefill has to compute: more than the prompt when the row was decoding before."""
        return self.prompt + self.generated if self.generated else self.prompt

    def reserve(self) -> int:
        """Decide how much cache to start with."""
        self.reserved_count = first_reservation(self.length, len(self.prompt) + self.token_limit)
        return self.reserved_count

    def advance(
        self,
        token: int,
        end_tokens: frozenset[int],
        clock: Callable[[], float],
        logprob: frames.Logprob | None = None,
    ) -> frames.Piece | None:
        """Account for one token; the piece to deliver, if there is one."""
        if not self.generated:
            self.decode_time = clock()
        self.generated.append(token)
        self.unreported_count += 1
        if logprob is not None:
            self.unreported_logprobs.append(logprob)
        finish: Finish = ""
        if token in end_tokens:
            new, finish = self.detokenizer.flush(), "stop"
        else:
            new = "" if self.reader and self.reader.hides(token) else self.detokenizer.add(token)
            if len(self.generated) >= self.token_limit:
                new, finish = new + self.detokenizer.flush(), "length"
        if self.reader is None:
            reading, finish, match = self._read_raw(new, finish)
        else:
            reading, finish, match = self._read_reply(self.reader, new, finish)
        if finish:
            reading.warnings += self.warnings
        if len(self.generated) == 1:
            reading.text = self.echo_text + reading.text
        if not (finish or reading.text or reading.reasoning or reading.calls or reading.warnings):
            return None
        count, self.unreported_count = self.unreported_count, 0
        return frames.Piece(
            key=self.key,
            token_count=count,
            text=reading.text,
            finish=finish,
            stop_match=match,
            spent=self._spent(clock()) if finish else None,
            extra=self._extra(reading),
        )

    def end_scored(self, clock: Callable[[], float]) -> frames.Piece:
        """The only piece of a row that generates nothing: its prompt, which has been prefilled."""
        self.decode_time = clock()
        return frames.Piece(
            key=self.key,
            token_count=0,
            text=self.echo_text,
            finish="length",
            spent=self._spent(self.decode_time),
            extra=self._extra(Reading(warnings=self.warnings)),
        )

    def _read_raw(self, new: str, finish: Finish) -> tuple[Reading, Finish, str]:
        text, match = self.stop.add(new)
        if match:
            finish = "stop"
        elif finish:
            text += self.stop.flush()
        return Reading(text=text), finish, match

    def _read_reply(self, reader: Reader, new: str, finish: Finish) -> tuple[Reading, Finish, str]:
        was_in_reasoning = reader.is_in_reasoning
        if new:
            reader.feed(new)
        if was_in_reasoning or reader.is_in_reasoning:
            self.unreported_reasoning_count += 1
        if finish:
            reader.finish(is_cut=finish == "length")
        if reader.stop_match:
            finish = "stop"
        elif reader.is_done or (finish == "stop" and reader.call_count):
            finish = "tool_calls"
        return reader.take(), finish, reader.stop_match

    def _extra(self, reading: Reading) -> frames.PieceExtra | None:
        """What goes with the tokens reported now, besides text."""
        reasoning_count, self.unreported_reasoning_count = self.unreported_reasoning_count, 0
        logprobs, self.unreported_logprobs = self.unreported_logprobs, []
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, ()
        if not (
            reasoning_count
            or logprobs
            or prompt_logprobs
            or reading.reasoning
            or reading.calls
            or reading.warnings
        ):
            return None
        return frames.PieceExtra(
            reasoning=reading.reasoning,
            reasoning_token_count=reasoning_count,
            tool_calls=tuple(reading.calls),
            logprobs=tuple(logprobs),
            prompt_logprobs=prompt_logprobs,
            warnings=tuple(reading.warnings),
        )

    def _spent(self, now: float) -> frames.Spent:
        return frames.Spent(
            queue=self.prefill_time - self.submit_time,
            prefill=self.decode_time - self.prefill_time,
            decode=now - self.decode_time,
        )
