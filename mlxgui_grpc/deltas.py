"""What is new of one choice: the engine's pieces, each as deltas of one kind, which join with their like."""

from dataclasses import dataclass

import msgspec

from mlxgui_grpc.engine import frames


@dataclass(slots=True)
class Delta:
    """What is new of one choice: text, or reasoning, or a part of one tool call."""

    index: int
    token_count: int
    text: str = ""
    reasoning: str = ""
    tool_call: frames.ToolCallPart | None = None
    logprobs: tuple[frames.Logprob, ...] = ()
    """Of those tokens."""
    prompt_logprobs: tuple[frames.Logprob, ...] = ()

    def join(self, later: "Delta") -> bool:
        """Take in what follows, if it is of the same kind."""
        if later.prompt_logprobs:
            return False
        if self.tool_call is not None and later.tool_call is not None:
            if later.tool_call.id or later.tool_call.index != self.tool_call.index:
                return False
            arguments = self.tool_call.arguments + later.tool_call.arguments
            self.tool_call = msgspec.structs.replace(self.tool_call, arguments=arguments)
        elif (
            self.tool_call is not None
            or later.tool_call is not None
            or (bool(self.text) and bool(later.reasoning))
            or (bool(self.reasoning) and bool(later.text))
        ):
            return False
        self.text += later.text
        self.reasoning += later.reasoning
        self.token_count += later.token_count
        self.logprobs += later.logprobs
        return True


def deltas_of(index: int, piece: frames.Piece) -> list[Delta]:
    """A piece as deltas of one kind each, in its order; the first counts its tokens."""
    extra = piece.extra
    if extra is None:
        return [Delta(index, piece.token_count, piece.text)] if piece.text or piece.token_count else []
    deltas = []
    if extra.reasoning:
        deltas.append(Delta(index, 0, reasoning=extra.reasoning))
    if piece.text:
        deltas.append(Delta(index, 0, piece.text))
    deltas += [Delta(index, 0, tool_call=part) for part in extra.tool_calls]
    if not deltas and (piece.token_count or extra.prompt_logprobs):
        deltas.append(Delta(index, 0))
    for first in deltas[:1]:
        first.token_count = piece.token_count
        first.logprobs, first.prompt_logprobs = extra.logprobs, extra.prompt_logprobs
    return deltas
