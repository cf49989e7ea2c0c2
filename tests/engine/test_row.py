"""What a row delivers of its tokens: counts, log-probabilities and markup, on real tokenizers."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import mlx_lm.tool_parsers.kimi_k3 as kimi_k3
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.backends.text import Tokens, load_tokens
from mlxgui_grpc.engine.detokenizer import Detokenizer, StopMatcher
from mlxgui_grpc.engine.reply import make_reader
from mlxgui_grpc.engine.reply_format import Opening, ReplyFormat, reply_format_of
from mlxgui_grpc.engine.row import EngineRow
from mlxgui_grpc.engine.sampling import RowSampling, SamplingDefaults
from tests.support_models import DEMO

TOOLS = b'[{"type": "function", "function": {"name": "f", "parameters": {}}}]'
CHAT = frames.Prompt(messages=b"[]", tools=TOOLS)
PLAIN = frames.Sampling()
NOWHERE = Opening()
END = 0


@pytest.fixture(scope="module")
def demo() -> Tokens:
    return load_tokens(DEMO)


def row_of(
    backend: Any,
    reply_format: ReplyFormat,
    *,
    prompt: frames.Prompt = CHAT,
    opening: Opening = NOWHERE,
    sampling: frames.Sampling = PLAIN,
    **fields: Any,
) -> EngineRow:
    reader = make_reader(reply_format, opening, prompt, sampling, frames.ToolUse())
    return EngineRow(
        key=1,
        prompt=[5],
        sampling=RowSampling(sampling, SamplingDefaults(), 1, [5], 10),
        detokenizer=Detokenizer(backend, skip_special_tokens=reader is None),
        stop=StopMatcher(sampling.stop),
        reader=reader,
        **{"token_limit": 1000, **fields},
    )


def deliver(row: EngineRow, tokens: list[int], end: int = END) -> list[frames.Piece]:
    """The pieces of tokens and an end token, each with a log-probability that says its place."""
    clock: Iterator[float] = map(float, count())
    pieces = []
    for place, token in enumerate([*tokens, end]):
        logprob = frames.Logprob(token, "", b"", -float(place))
        piece = row.advance(token, frozenset({end}), lambda: next(clock), logprob)
        if piece is not None:
            pieces.append(piece)
            if piece.finish:
                break
    return pieces


def joined(pieces: list[frames.Piece], name: str) -> str:
    return "".join(getattr(piece.extra, name) for piece in pieces if piece.extra)


def test_tokens_are_counted_once_in_all_that_they_become(demo: Tokens) -> None:
    thought, answer = "<think>\nSome thought.\n</think>", "\n\nOkay.\n"
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    encode = demo.backend.encode
    parts = [encode(part, add_special_tokens=False).ids for part in (thought, answer, call)]
    tokens = [token for part in parts for token in part]
    end = min(demo.end_tokens)

    pieces = deliver(row_of(demo.backend, demo.reply_format), tokens, end)

    extras = [piece.extra for piece in pieces if piece.extra]
    assert joined(pieces, "reasoning") == "Some thought."
    assert "".join(piece.text for piece in pieces) == "Okay.\n"
    calls = [part for extra in extras for part in extra.tool_calls]
    assert (calls[0].name, "".join(part.arguments for part in calls)) == ("f", '{"a": 1}')
    assert [piece.finish for piece in pieces if piece.finish] == ["tool_calls"]
    assert sum(piece.token_count for piece in pieces) == len(tokens) + 1
    assert sum(extra.reasoning_token_count for extra in extras) == len(parts[0])
    seen = [entry.logprob for extra in extras for entry in extra.logprobs]
    assert seen == [-float(place) for place in range(len(tokens) + 1)]
    assert all(len(piece.extra.logprobs) == piece.token_count for piece in pieces if piece.extra)


def test_an_open_prompt_starts_in_the_thinking(demo: Tokens) -> None:
    def opening(prompt: str) -> Opening:
        return demo.reply_format.opening(demo.backend, demo.backend.encode(prompt).ids)

    assert opening("<|im_start|>assistant\n<think>\n") == Opening(starts_in_thinking=True, may_think=True)
    assert opening("<think>\n\n</think>\n\n") == Opening(starts_in_thinking=False, may_think=False)
    assert opening("what is <think>? <|im_start|>assistant\n") == Opening(may_think=True)
    row = row_of(demo.backend, demo.reply_format, opening=Opening(starts_in_thinking=True))
    pieces = deliver(row, demo.backend.encode("hm</think>\nyes").ids, min(demo.end_tokens))
    assert (joined(pieces, "reasoning"), "".join(piece.text for piece in pieces)) == ("hm", "yes")


def test_a_completion_stays_as_it_is_and_echoes_its_prompt(demo: Tokens) -> None:
    prompt_logprobs = (frames.Logprob(5, "x", b"x", None),)
    row = row_of(
        demo.backend,
        demo.reply_format,
        prompt=frames.Prompt(text="x"),
        echo_text="the prompt: STOP ",
        prompt_logprobs=prompt_logprobs,
        sampling=frames.Sampling(stop=("STOP",)),
    )
    pieces = deliver(row, demo.backend.encode("<tool_call>a STOP b").ids, min(demo.end_tokens))
    assert "".join(piece.text for piece in pieces) == "the prompt: STOP <tool_call>a "
    assert (pieces[-1].finish, pieces[-1].stop_match) == ("stop", "STOP")
    assert [piece.extra.prompt_logprobs for piece in pieces if piece.extra][:2] == [prompt_logprobs, ()]


def test_the_limit_within_a_call_is_a_length(demo: Tokens) -> None:
    tokens = demo.backend.encode('<tool_call>\n{"name": "f", "arguments": {"a": 1').ids
    pieces = deliver(row_of(demo.backend, demo.reply_format, token_limit=len(tokens)), tokens)
    assert pieces[-1].finish == "length"
    assert sum(piece.token_count for piece in pieces) == len(tokens)


SPECIAL = ("<|end_of_msg|>", "<|open|>", "<|close|>", "<|sep|>", "<|odd|>")


def xtml() -> tuple[Any, ReplyFormat]:
    """A byte-level tokenizer whose tags are several tokens, some of them special, as Kimi K3's."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[0])
    wrapper = TokenizerWrapper(
        tokenizer,
        tool_call_start=kimi_k3.tool_call_start,
        tool_call_end=kimi_k3.tool_call_end,
        tool_parser=kimi_k3.parse_tool_call,
    )
    return tokenizer.backend_tokenizer, reply_format_of(wrapper)


def test_special_tokens_are_hidden_but_for_markup() -> None:
    backend, reply_format = xtml()
    text = (
        "<|open|>think<|sep|>h<|odd|>é<|close|>think<|sep|><|open|>response<|sep|>日<|odd|>本<|close|>response<|sep|>"
        '<|open|>tools<|sep|><|open|>call tool="f" index="1"<|sep|><|open|>argument key="a" type="string"<|sep|>'
        "🙂<|close|>argument<|sep|><|close|>call<|sep|><|close|>tools<|sep|>"
    )
    pieces = deliver(row_of(backend, reply_format), backend.encode(text).ids, backend.token_to_id(SPECIAL[0]))
    assert joined(pieces, "reasoning") == "hé"
    assert "".join(piece.text for piece in pieces) == "日本"
    calls = [part for piece in pieces if piece.extra for part in piece.extra.tool_calls]
    assert [(part.name, part.arguments) for part in calls] == [("f", ""), ("", '{"a": "🙂"}')]
    assert pieces[-1].finish == "tool_calls"
