"""Text of tokens as they come: whole characters, all of them, and no stop string nor a part of one."""

from itertools import groupby
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from mlxgui_grpc.engine.detokenizer import Detokenizer, StopMatcher

relaxed = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

TEXTS = st.text(max_size=40) | st.text(st.sampled_from("aäß漢🙂👨‍👩‍👧é \n"), max_size=30)


@relaxed
@given(TEXTS)
def test_pieces_join_to_the_text_that_was_encoded(demo_tokenizer: Any, text: str) -> None:
    """Every text survives, though its characters are spread over tokens; no piece shows half a character."""
    ids = demo_tokenizer.encode(text, add_special_tokens=False).ids
    detokenizer = Detokenizer(demo_tokenizer)
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) + detokenizer.flush() == demo_tokenizer.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@relaxed
@given(st.lists(st.integers(3, 1023), max_size=60))
def test_pieces_of_random_tokens_join_to_their_decoding(demo_tokenizer: Any, ids: list[int]) -> None:
    """Also where the bytes are no characters at all: the model may write anything."""
    detokenizer = Detokenizer(demo_tokenizer)
    pieces = "".join(detokenizer.add(token) for token in ids) + detokenizer.flush()
    assert pieces == demo_tokenizer.decode(ids, skip_special_tokens=True)


def test_a_prompt_that_ends_inside_a_character_is_not_told_again(demo_tokenizer: Any) -> None:
    """The reply has the character if it completes it, and nothing of the prompt's text in any case."""
    prompt = demo_tokenizer.encode("I know é", add_special_tokens=False).ids
    hello = demo_tokenizer.encode("Hello", add_special_tokens=False).ids
    completing = Detokenizer(demo_tokenizer, prompt[:-1])
    assert "".join(completing.add(token) for token in [prompt[-1], *hello]) == "éHello"
    breaking = Detokenizer(demo_tokenizer, prompt[:-1])
    assert "".join(breaking.add(token) for token in hello) == "Hello"


@relaxed
@given(st.lists(st.integers(3, 1023), min_size=1, max_size=8), st.lists(st.integers(3, 1023), max_size=20))
def test_the_text_after_a_prompt_is_what_decoding_both_adds(
    demo_tokenizer: Any, prompt: list[int], ids: list[int]
) -> None:
    detokenizer = Detokenizer(demo_tokenizer, prompt)
    pieces = "".join(detokenizer.add(token) for token in ids) + detokenizer.flush()
    before = demo_tokenizer.decode(prompt, skip_special_tokens=True)
    both = demo_tokenizer.decode(prompt + ids, skip_special_tokens=True)
    if not before.endswith("\ufffd"):
        assert before + pieces == both


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁a", "b", "c", "▁the", ".", ",", "é", "你", "▁▁", "\n"]
UNKNOWN, SPECIAL = 0, 1 + len(BYTES) + len(WORDS)
FALLBACK_IDS = st.lists(
    st.integers(0, SPECIAL)
    | st.sampled_from([1 + byte for byte in "P é你🙂".encode()])
    | st.sampled_from([SPECIAL, *range(257, SPECIAL)]),
    max_size=30,
)


def fallback_tokenizer(*, strips: bool) -> Any:
    """A tokenizer that writes the characters it lacks as bytes: with `strips` as Llama 2's, else as Gemma's."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", *BYTES, *WORDS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strips else [])])
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


LLAMA, GEMMA = fallback_tokenizer(strips=True), fallback_tokenizer(strips=False)


def one_by_one(raw: bytes) -> str:
    """Each byte that is part of no character on its own, as SentencePiece has it."""
    text = ""
    while raw:
        size = next((n for n in (1, 2, 3, 4) if _is_character(raw[:n])), 0)
        text += raw[:size].decode() if size else "\ufffd"
        raw = raw[size or 1 :]
    return text


def _is_character(raw: bytes) -> bool:
    try:
        return len(raw.decode()) == 1
    except UnicodeDecodeError:
        return False


def fallback_text(ids: list[int], *, strips: bool, skips: bool) -> str:
    """What tokens say, by the plain definition."""
    kept = [token for token in ids if not (skips and token == SPECIAL)]
    text = ""
    for is_byte, run in groupby(kept, lambda token: 0 < token <= 256):
        if is_byte:
            text += one_by_one(bytes(token - 1 for token in run))
        else:
            names = ["<unk>", *BYTES, *WORDS, "<s>"]
            text += "".join(names[token] for token in run).replace("▁", " ")
    return text.removeprefix(" ") if strips else text


@pytest.mark.parametrize("strips", [True, False])
@relaxed
@given(FALLBACK_IDS, st.booleans())
def test_a_tokenizer_that_falls_back_to_bytes_takes_any_of_them(
    strips: bool, ids: list[int], skips: bool
) -> None:
    """A byte that is no part of a character takes none of its neighbours with it, and nothing is raised."""
    tokenizer = LLAMA if strips else GEMMA
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skips)
    pieces = [detokenizer.add(token) for token in ids]
    text = "".join(pieces) + detokenizer.flush()
    assert text == fallback_text(ids, strips=strips, skips=skips)
    decoded = tokenizer.decode(ids, skip_special_tokens=skips)
    if "\ufffd" not in decoded:
        assert text == decoded and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("strips", [True, False])
@relaxed
@given(FALLBACK_IDS.filter(bool), FALLBACK_IDS, st.booleans())
def test_what_follows_a_prompt_where_characters_fall_back_to_bytes(
    strips: bool, prompt: list[int], ids: list[int], skips: bool
) -> None:
    tokenizer = LLAMA if strips else GEMMA
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skips)
    pieces = "".join(detokenizer.add(token) for token in ids) + detokenizer.flush()
    before = fallback_text(prompt, strips=strips, skips=skips)
    if not before.endswith("\ufffd"):
        assert before + pieces == fallback_text(prompt + ids, strips=strips, skips=skips)


def test_a_character_of_bytes_that_the_prompt_began_is_told_once() -> None:
    first, *rest = (1 + byte for byte in "你".encode())
    completing = Detokenizer(LLAMA, [260, first])
    assert [completing.add(token) for token in rest] == ["", "你"]
    breaking = Detokenizer(LLAMA, [260, first])
    assert breaking.add(259) + breaking.flush() == "b"
    ending = Detokenizer(LLAMA, [260, first])
    assert ending.flush() == ""


def first_stop(text: str, stops: tuple[str, ...]) -> int:
    """Where the text has to end, by the plain definition."""
    return min(((at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0), default=(0, -1))[1]


small = st.text("ab", max_size=4)


@settings(max_examples=2000, deadline=None)
@given(st.lists(small, max_size=12), st.lists(small.filter(bool), max_size=3).map(tuple))
def test_the_text_ends_before_the_stop_string_that_is_complete_first(
    pieces: list[str], stops: tuple[str, ...]
) -> None:
    """Whatever the pieces: nothing of the stop string is delivered, and nothing before it is lost."""
    matcher = StopMatcher(stops)
    given_so_far = delivered = ""
    for piece in pieces:
        given_so_far += piece
        text, match = matcher.add(piece)
        delivered += text
        at = first_stop(given_so_far, stops)
        if match:
            assert delivered == given_so_far[:at] and given_so_far.startswith(match, at)
            return
        assert at < 0, "a stop string was missed"
        assert given_so_far.startswith(delivered)
        held = given_so_far[len(delivered) :]
        # Held back is exactly what may begin a stop string.
        assert not held or any(stop.startswith(held) for stop in stops)
    assert delivered + matcher.flush() == given_so_far


@settings(max_examples=500, deadline=None)
@given(
    st.text("ab🙂", max_size=30), st.lists(st.text("ab🙂", min_size=1, max_size=4), min_size=1, max_size=3)
)
def test_cutting_the_text_elsewhere_changes_nothing(text: str, stops: list[str]) -> None:
    def run(pieces: list[str]) -> tuple[str, str]:
        matcher, out = StopMatcher(tuple(stops)), ""
        for piece in pieces:
            final, match = matcher.add(piece)
            out += final
            if match:
                return out, match
        return out + matcher.flush(), ""

    one_by_one, at_once = run(list(text)), run([text])
    # Of two stop strings that overlap, the one that is complete first may win when the text comes in pieces.
    assert bool(one_by_one[1]) == bool(at_once[1])
    if not at_once[1]:
        assert one_by_one == at_once == (text, "")
