"""Text of tokens as they come: whole characters, all of them, and no stop string nor a part of one."""

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
