"""Frames between control process and worker: every message survives, wherever the stream is cut."""

import struct
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgui_grpc.engine import frames

COMMANDS: tuple[type[msgspec.Struct], ...] = get_args(frames.Command)
EVENTS: tuple[type[msgspec.Struct], ...] = get_args(frames.Event)

keys = st.integers(0, 2**62)
texts = st.text(max_size=40)
finite = st.floats(allow_nan=False, allow_infinity=False)
constraints = st.builds(
    frames.Constraint, st.sampled_from(["json_object", "json_schema", "regex", "grammar"]), texts
)
samplings = st.builds(
    frames.Sampling,
    top_logprobs=st.none() | st.integers(0, 20),
    max_thinking_tokens=st.none() | st.integers(0, 16_384),
    constraint=st.none() | constraints,
    max_tokens=st.integers(0, 16_384),
    temperature=st.none() | finite,
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(texts, max_size=3).map(tuple),
    logit_bias=st.dictionaries(st.integers(0, 2**31), finite, max_size=3),
)
images = st.builds(frames.Image, keys, keys, st.binary(max_size=50), st.sampled_from(["auto", "low", "high"]))
prompts = st.builds(
    frames.Prompt,
    images=st.lists(images, max_size=2).map(tuple),
    messages=st.binary(max_size=50),
    text=st.none() | texts,
    token_ids=st.lists(st.integers(0, 2**31), max_size=5).map(tuple),
)
spent = st.none() | st.builds(frames.Spent, finite, finite, finite)
likely = st.builds(frames.Logprob, keys, texts, st.binary(max_size=8), st.none() | finite)
logprobs = st.lists(
    st.builds(frames.Logprob, keys, texts, st.binary(), finite, st.lists(likely, max_size=2).map(tuple)),
    max_size=2,
).map(tuple)
calls = st.lists(st.builds(frames.ToolCallPart, st.integers(0, 9), texts, texts, texts), max_size=2).map(
    tuple
)
extras = st.builds(
    frames.PieceExtra, texts, keys, calls, logprobs, logprobs, st.lists(texts, max_size=2).map(tuple)
)
pieces = st.builds(
    frames.Piece,
    keys,
    st.integers(0, 999),
    texts,
    st.sampled_from(["", "stop", "length", "tool_calls"]),
    texts,
    spent,
    st.none() | extras,
)
tool_uses = st.builds(frames.ToolUse, st.booleans(), texts, st.booleans())
kinds = st.sampled_from(["text", "vision", "embedding", "reranker"])
key_tuples = st.lists(keys, max_size=4).map(tuple)
messages: dict[type[msgspec.Struct], st.SearchStrategy[Any]] = {
    frames.Load: st.builds(
        frames.Load, texts, kinds, st.booleans(), st.integers(1, 99), keys, keys, st.booleans()
    ),
    frames.Submit: st.builds(
        frames.Submit,
        key_tuples,
        prompts,
        samplings,
        st.integers(-100, 100),
        st.none() | tool_uses,
        st.booleans(),
    ),
    frames.Cancel: st.builds(frames.Cancel, key_tuples),
    frames.Pause: st.builds(frames.Pause, keys),
    frames.Resume: st.builds(frames.Resume, keys),
    frames.Count: st.builds(frames.Count, keys, prompts),
    frames.Embed: st.builds(frames.Embed, keys, st.lists(prompts, max_size=2).map(tuple), keys),
    frames.Rerank: st.builds(frames.Rerank, keys, texts, st.lists(texts, max_size=2).map(tuple)),
    frames.AskUsage: st.builds(frames.AskUsage),
    frames.Limits: st.builds(frames.Limits, st.integers(1, 99), keys),
    frames.Ready: st.builds(
        frames.Ready, texts, st.dictionaries(texts, texts, max_size=3), texts, keys, st.booleans()
    ),
    frames.Warming: st.builds(frames.Warming),
    frames.Loaded: st.builds(frames.Loaded, keys, st.booleans(), keys, finite, keys, keys),
    frames.Accepted: st.builds(frames.Accepted, key_tuples, keys),
    frames.Prefilled: st.builds(frames.Prefilled, key_tuples, keys, keys),
    frames.Step: st.builds(frames.Step, st.lists(pieces, max_size=8)),
    frames.Failed: st.builds(frames.Failed, key_tuples, texts, texts, texts),
    frames.Counted: st.builds(frames.Counted, keys, keys),
    frames.Embedded: st.builds(frames.Embedded, keys, keys, st.binary(max_size=50), keys, finite, finite),
    frames.Reranked: st.builds(
        frames.Reranked, keys, st.lists(finite, max_size=3).map(tuple), keys, finite, finite
    ),
    frames.Usage: st.builds(
        frames.Usage, *[keys] * (len(frames.Usage.__struct_fields__) - 1), is_answer=st.booleans()
    ),
}


def test_every_message_is_covered() -> None:
    assert set(messages) == {*COMMANDS, *EVENTS}


@given(
    st.one_of(*(messages[kind] for kind in COMMANDS)),
    st.one_of(*(messages[kind] for kind in EVENTS)),
)
def test_a_message_survives_the_wire(command: Any, event: Any) -> None:
    (body,) = frames.FrameBuffer().feed(frames.encode(command))
    assert frames.decode_command(body) == command
    (body,) = frames.FrameBuffer().feed(frames.encode(event))
    assert frames.decode_event(body) == event


@given(st.lists(st.one_of(*(messages[kind] for kind in EVENTS)), max_size=5), st.data())
def test_frames_come_out_whole_wherever_the_stream_is_cut(sent: list[Any], data: st.DataObject) -> None:
    stream = b"".join(frames.encode(event) for event in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    buffer = frames.FrameBuffer()
    received: list[Any] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        received += [frames.decode_event(body) for body in buffer.feed(stream[start:end])]
    assert received == sent


def test_frames_come_out_whole_byte_by_byte() -> None:
    sent: list[frames.Event] = [
        frames.Step([frames.Piece(1, 2, "Größe 🙂", "stop", "x", frames.Spent(1.0, 2.0, 3.0))]),
        frames.Counted(7, 9),
    ]
    buffer = frames.FrameBuffer()
    stream = b"".join(frames.encode(event) for event in sent)
    bodies = [body for i in range(len(stream)) for body in buffer.feed(stream[i : i + 1])]
    assert [frames.decode_event(body) for body in bodies] == sent


def test_a_length_that_no_frame_of_ours_has_is_refused() -> None:
    with pytest.raises(ValueError, match="not one of ours"):
        list(frames.FrameBuffer().feed(struct.pack("<I", frames.MAX_FRAME_BYTES + 1)))


@given(st.binary(max_size=60))
def test_a_body_of_random_bytes_is_refused_by_type(body: bytes) -> None:
    try:
        frames.decode_event(body)
    except (msgspec.DecodeError, msgspec.ValidationError):
        return
