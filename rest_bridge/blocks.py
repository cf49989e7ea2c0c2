"""A chat's events as blocks that open, grow and close one after the other: what Responses and Messages are made of.

Both dialects answer with a list of items of one kind each, in the order in which the model wrote them. ChatResponse
has no such order, and no log-probabilities of the text alone; therefore their whole answers are made of the events too,
and are what their streams add up to.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from mlxgui.v1 import common_pb2, inference_pb2
from rest_bridge.errors import ApiError


@dataclass
class Block:
    """A run of reasoning, a run of text, or one tool call, of which it holds the arguments."""

    index: int
    kind: Literal["reasoning", "text", "call"]
    call_index: int = 0
    call_id: str = ""
    name: str = ""
    parts: list[str] = field(default_factory=list)
    logprobs: list[common_pb2.TokenLogprob] = field(default_factory=list)
    """Of a text only."""
    is_whole: bool = False
    """Closed, and not because the answer had to end."""

    @property
    def content(self) -> str:
        return "".join(self.parts)


class Begun(NamedTuple):
    """The request was accepted."""

    start: inference_pb2.StreamStart


class Opened(NamedTuple):
    """A block begins, still empty; the one before has closed."""

    block: Block


class Grown(NamedTuple):
    """The open block has more; the piece is empty when there are only log-probabilities."""

    block: Block
    piece: str
    logprobs: list[common_pb2.TokenLogprob]


class Closed(NamedTuple):
    """The block is as it stays."""

    block: Block


class Over(NamedTuple):
    """The last step."""

    end: inference_pb2.StreamEnd


Step = Begun | Opened | Grown | Closed | Over


class Reply:
    """What a chat of one choice has brought so far."""

    def __init__(self) -> None:
        self.start = inference_pb2.StreamStart()
        self.finish = inference_pb2.StreamFinish()
        self.end = inference_pb2.StreamEnd()
        self.blocks: list[Block] = []
        self._open: Block | None = None
        # Log-probabilities that came with no content, before it is known to what they belong.
        self._unclaimed: list[common_pb2.TokenLogprob] = []

    @property
    def warnings(self) -> list[str]:
        """What the server said besides the answer."""
        return [*self.start.warnings, *self.end.warnings]

    @property
    def was_cut(self) -> bool:
        """Whether it ended for want of tokens."""
        return self.finish.finish_reason == common_pb2.FINISH_REASON_LENGTH

    def read_all(self, events: Iterable[inference_pb2.ChatStreamResponse]) -> "Reply":
        for _ in self.read(events):
            pass
        return self

    def read(self, events: Iterable[inference_pb2.ChatStreamResponse]) -> Iterator[Step]:
        """The steps of the events, as they come. A reply of nothing is one empty text."""
        for event in events:
            match event.WhichOneof("event"):
                case "delta":
                    yield from self._read_delta(event.delta)
                case "start":
                    self.start = event.start
                    yield Begun(event.start)
                case "finish":
                    self.finish = event.finish
                    if not self.blocks:
                        yield self._opening(Block(0, "text"))
                    yield from self._closing(is_whole=not self.was_cut)
                case "end":
                    self.end = event.end
                    yield Over(event.end)

    def _read_delta(self, delta: inference_pb2.ChatDelta) -> Iterator[Step]:
        if delta.reasoning:
            yield from self._growing("reasoning", delta.reasoning)
        if delta.text:
            logprobs, self._unclaimed = [*self._unclaimed, *delta.logprobs], []
            yield from self._growing("text", delta.text, logprobs)
        for call in delta.tool_calls:
            yield from self._read_call(call)
        if delta.logprobs and not delta.text:
            if delta.reasoning or delta.tool_calls:
                self._unclaimed = []
            elif self._open is not None and self._open.kind == "text":
                yield from self._growing("text", "", [*delta.logprobs])
            else:
                self._unclaimed += delta.logprobs

    def _growing(
        self,
        kind: Literal["reasoning", "text"],
        piece: str,
        logprobs: Iterable[common_pb2.TokenLogprob] = (),
    ) -> Iterator[Step]:
        block = self._open
        if block is None or block.kind != kind:
            yield from self._closing()
            block = Block(len(self.blocks), kind)
            yield self._opening(block)
        entries = list(logprobs)
        block.parts.append(piece)
        block.logprobs += entries
        yield Grown(block, piece, entries)

    def _read_call(self, part: inference_pb2.ToolCallDelta) -> Iterator[Step]:
        block = self._open
        if block is None or block.kind != "call" or block.call_index != part.index:
            if not part.name:
                raise ApiError("INTERNAL", f"A part of tool call {part.index} came after another block.")
            yield from self._closing()
            block = Block(len(self.blocks), "call", part.index, part.id, part.name)
            yield self._opening(block)
        if part.arguments:
            block.parts.append(part.arguments)
            yield Grown(block, part.arguments, [])

    def _opening(self, block: Block) -> Step:
        self.blocks.append(block)
        self._open = block
        return Opened(block)

    def _closing(self, *, is_whole: bool = True) -> Iterator[Step]:
        if self._open is not None:
            block, self._open = self._open, None
            block.is_whole = is_whole
            yield Closed(block)
