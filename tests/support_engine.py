"""A scheduler on a real model with a clock that stands still, and what comes out of it, row by row."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.backends.text import TextModel
from mlxgui_grpc.engine.constraints import Grammars
from mlxgui_grpc.engine.detokenizer import Detokenizer, StopMatcher
from mlxgui_grpc.engine.guide import Guide
from mlxgui_grpc.engine.logprobs import TokenTexts
from mlxgui_grpc.engine.reply_format import Opening
from mlxgui_grpc.engine.row import EngineRow
from mlxgui_grpc.engine.row_guides import GuideMaker
from mlxgui_grpc.engine.sampling import RowSampling, key_word
from mlxgui_grpc.engine.scheduler import Scheduler

MAX_TURNS = 20_000


@dataclass
class Reply:
    """What came for one row."""

    text: str = ""
    token_count: int = 0
    finish: str = ""
    stop_match: str = ""
    logprobs: list[frames.Logprob] = field(default_factory=list)
    prompt_logprobs: list[frames.Logprob] = field(default_factory=list)


@dataclass
class Engine:
    """A scheduler with a clock that stands still until it is told."""

    model: TextModel
    max_rows: int = 8
    kv_budget_bytes: int = 0
    now: float = 0.0
    replies: dict[int, Reply] = field(default_factory=dict)
    began: list[int] = field(default_factory=list)
    """Keys in the order of their first pieces."""
    prefilled: list[frames.Prefilled] = field(default_factory=list)
    failed: dict[int, frames.Failed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokens = self.model.tokens
        self.scheduler = Scheduler(
            self.model.model,
            end_tokens=tokens.end_tokens,
            max_rows=self.max_rows,
            send=self._receive,
            kv_cost=self.model.kv_cost,
            kv_budget_bytes=self.kv_budget_bytes,
            token_texts=TokenTexts(tokens.backend),
            clock=lambda: self.now,
        )
        grammars = Grammars(tokens.backend, tokens.vocabulary_size, tokens.end_tokens)
        self.guides = GuideMaker(grammars, tokens.reply_format, tokens.end_tokens)

    def _receive(self, event: frames.Event) -> None:
        if isinstance(event, frames.Prefilled):
            self.prefilled.append(event)
            return
        if isinstance(event, frames.Failed):
            for key in event.keys:
                assert key not in self.failed and not self.replies.get(key, Reply()).finish
                self.failed[key] = event
            return
        assert isinstance(event, frames.Step), event
        for piece in event.pieces:
            if piece.key not in self.replies:
                self.began.append(piece.key)
            reply = self.replies.setdefault(piece.key, Reply())
            assert not reply.finish and piece.key not in self.failed, "nothing comes after the end"
            reply.text += piece.text
            reply.token_count += piece.token_count
            reply.finish, reply.stop_match = piece.finish, piece.stop_match
            if piece.extra is not None:
                reply.logprobs += piece.extra.logprobs
                reply.prompt_logprobs += piece.extra.prompt_logprobs

    def row(
        self,
        key: int,
        prompt: list[int] | str,
        sampling: frames.Sampling,
        *,
        priority: int = 0,
        guide: Guide | None = None,
        echo: bool = False,
    ) -> EngineRow:
        """A row of raw text. Rows of one list share its prefill."""
        tokens = self.model.tokens
        ids = tokens.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return EngineRow(
            key=key,
            prompt=ids,
            sampling=RowSampling(
                sampling,
                self.model.defaults,
                key_word(sampling.seed, key),
                ids,
                tokens.vocabulary_size,
                guide,
            ),
            detokenizer=Detokenizer(tokens.backend, ids[-8:]),
            stop=StopMatcher(sampling.stop),
            token_limit=sampling.max_tokens,
            wants_prompt_logprobs=echo and sampling.top_logprobs is not None,
            priority=priority,
            submit_time=self.now,
        )

    def guided(
        self,
        key: int,
        prompt: list[int] | str,
        sampling: frames.Sampling,
        *,
        opening: Opening | None = None,
        tools: bytes = b"",
        tool_use: frames.ToolUse | None = None,
    ) -> EngineRow:
        """A row with the guide that a request of it gets; with an `opening` it is a chat's."""
        submit = frames.Submit(
            (key,),
            frames.Prompt(messages=b"[]" if opening else b"", tools=tools),
            sampling,
            tool_use=tool_use,
        )
        (guide,) = self.guides.make(submit, opening or Opening())
        return self.row(key, prompt, sampling, guide=guide)

    def run(self, keys: Iterable[int], each_turn: Callable[[int], None] = lambda turn: None) -> None:
        """Take turns until these rows have ended."""
        open_keys = set(keys)
        for turn in range(MAX_TURNS):
            each_turn(turn)
            assert self.scheduler.turn(), "it has nothing to do, and rows are open"
            open_keys -= {
                key for key in open_keys if self.replies.get(key, Reply()).finish or key in self.failed
            }
            if not open_keys:
                return
        raise AssertionError(f"rows {open_keys} did not end")


def tokens_of(count: int, seed: int) -> list[int]:
    """A prompt of so many tokens."""
    return [3 + (seed * 7919 + index * 104_729) % 1000 for index in range(count)]
