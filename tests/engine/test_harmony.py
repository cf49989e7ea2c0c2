"""gpt-oss's replies: split the same however they are cut, on a byte-level tokenizer with its special tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.backends.text import load_tokens
from mlxgui_grpc.engine.harmony import HarmonyReader
from mlxgui_grpc.engine.reply import make_reader
from mlxgui_grpc.engine.reply_format import HARMONY_TAGS, Opening, reply_format_of
from mlxgui_grpc.reply_facts import has_thinking, takes_tools, tool_format_of
from tests.engine.test_reply import WEATHER, Reply, gathered
from tests.engine.test_row import deliver, joined, row_of

# With the fields that gpt-oss's own template reads and the places where it raises.
TEMPLATE = """\
{{- "<|start|>system<|message|>Reasoning: " + (reasoning_effort or "medium") + "<|end|>" -}}
{%- set rest = messages -%}
{%- if messages[0].role in ("system", "developer") -%}
  {{- "<|start|>developer<|message|>" + messages[0].content + "<|end|>" -}}{%- set rest = messages[1:] -%}
{%- endif -%}
{%- set last = namespace(name=none) -%}
{%- for message in rest -%}
  {%- if message.role == "assistant" and "tool_calls" in message -%}
    {%- if message.content and message.thinking -%}{{- raise_exception("both content and thinking") -}}{%- endif -%}
    {%- if message.content or message.thinking -%}
      {{- "<|start|>assistant<|channel|>analysis<|message|>" + (message.content or message.thinking) + "<|end|>" -}}
    {%- endif -%}
    {%- set call = message.tool_calls[0].function -%}
    {{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary json<|message|>" -}}
    {{- call.arguments|tojson + "<|call|>" -}}{%- set last.name = call.name -%}
  {%- elif message.role == "assistant" -%}
    {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" -}}
  {%- elif message.role == "tool" -%}
    {%- if last.name is none -%}{{- raise_exception("no call before it") -}}{%- endif -%}
    {{- "<|start|>functions." + last.name + " to=assistant<|channel|>commentary<|message|>" -}}
    {{- message.content|tojson + "<|end|>" -}}
  {%- elif message.role == "user" -%}{{- "<|start|>user<|message|>" + message.content + "<|end|>" -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""
ENDOFTEXT = "<|endoftext|>"


def make_wrapper() -> TokenizerWrapper:
    """A byte-level tokenizer; its checkpoint lists <|return|> alone as an end token."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(name, special=True) for name in (*HARMONY_TAGS, ENDOFTEXT, "<|odd|>")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|return|>")
    tokenizer.chat_template = TEMPLATE
    return TokenizerWrapper(tokenizer)


WRAPPER = make_wrapper()
TOKENIZER = WRAPPER._tokenizer
BACKEND = TOKENIZER.backend_tokenizer
FORMAT = reply_format_of(WRAPPER)
OPENING = Opening(may_think=True, markup="<|start|>assistant")
CALL_TOKEN, RETURN_TOKEN = (BACKEND.token_to_id(tag) for tag in ("<|call|>", "<|return|>"))
ENDS = frozenset(WRAPPER.eos_token_ids) | FORMAT.end_tokens

ANALYSIS = "<|channel|>analysis<|message|>Which city?<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
CALL = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
ARGUMENTS = '{"city": "Zürich 東京 🗼", "days": 1.50e2}'


def read(
    pieces: list[str],
    *,
    opening: Opening = OPENING,
    is_cut: bool = False,
    tools: Any = (WEATHER,),
    **options: Any,
) -> Reply:
    """The pieces through one reader of the format."""
    reader = HarmonyReader(FORMAT, opening, tools=tools and list(tools), **options)
    return gathered(reader, pieces, is_cut=is_cut)


def read_all_ways(text: str, **options: Any) -> Reply:
    """The reply, the same however it is cut in two, and character by character."""
    whole = read([text], **options)
    for at in range(1, len(text)):
        assert read([text[:at], text[at:]], **options) == whole, (text[:at], text[at:])
    assert read(list(text), **options) == whole
    return whole


W = [("get_weather", ARGUMENTS)]
CASES = [
    (ANALYSIS + FINAL + " It rains.\n", "Which city?", " It rains.\n", []),
    (FINAL + "Hi", "", "Hi", []),
    (ANALYSIS + CALL + ARGUMENTS, "Which city?", "", W),
    (ANALYSIS + CALL + f"\n{ARGUMENTS} \n<|call|>", "Which city?", "", W),
    (CALL.replace(" <|constrain|>json", "") + ARGUMENTS, "", "", W),
    (CALL.replace("<|constrain|>", "") + ARGUMENTS, "", "", W),
    (CALL.replace(" <|constrain|>json", "<|constrain|>json") + ARGUMENTS, "", "", W),
    (" to=functions.get_weather<|channel|>commentary json<|message|>" + ARGUMENTS, "", "", W),
    (ANALYSIS + " to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>" + ARGUMENTS,
     "Which city?", "", W),
    ("<|channel|>analysis to=functions.get_weather code<|message|>" + ARGUMENTS, "", "", W),
    ("<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + CALL + ARGUMENTS, "", "I look.", W),
    ("<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + FINAL + "Rain.", "", "I look.\n\nRain.", []),
    (ANALYSIS + ANALYSIS + FINAL + "a", "Which city?\n\nWhich city?", "a", []),
    (CALL + "<|call|>", "", "", [("get_weather", "{}")]),
    ("<|channel|>commentary to=functions.get_weather", "", "", [("get_weather", "{}")]),
    (CALL + ARGUMENTS + "<|end|><|start|>assistant" + CALL + "{}<|call|>", "", "", [*W, ("get_weather", "{}")]),
    ("<|message|>No channel", "", "No channel", []),
    ("<|channel|>analysis<|message|>a<|end|><|channel|>final<|message|>b", "a", "b", []),  # No <|start|>.
    ("<|channel|>analysis<|message|>a<|channel|>final<|message|>b", "a", "b", []),  # Nor <|end|>.
    ("<|channel|>analysis<|message|>a<|end|>\n<|start|>assistant<|channel|>final<|message|>b", "a", "b", []),
    ("<|channel|>commentary to=assistant<|channel|>final<|message|>a", "", "a", []),  # Repeated.
    ("<|channel|>final <|constrain|>json<|message|>{}", "", "{}", []),
    ("<|channel|>analysis<|message|>a<|end|><|start|>assistantHello", "a", "Hello", []),
    ("Hello, no header at all. ", "", "Hello, no header at all. ", []),
    ("to be or not", "", "to be or not", []),
    ("t", "", "t", []),
    ("<|channel|>final<|message|>", "", "", []),
    ("", "", "", []),
    (FINAL + "a < b <| c <|en", "", "a < b <| c <|en", []),
    (ANALYSIS + FINAL + "a<|end|>b <|start|>assistant<|channel|>final<|message|>c", "Which city?", "a\n\nb \n\nc", []),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reasoning", "visible", "calls"), CASES)
def test_a_reply_is_split_by_its_channels(
    text: str, reasoning: str, visible: str, calls: list[tuple[str, str]]
) -> None:
    assert read_all_ways(text) == Reply(reasoning=reasoning, text=visible, calls=calls)


@pytest.mark.parametrize(
    ("text", "reasoning", "visible", "says"),
    [
        ("<|channel|>poem<|message|>a", "", "a", "'poem'"),
        ("<|channel|>??<|end|><|start|>assistant" + FINAL + "a", "", "a", "left out: ??"),
        ("<|channel|>I think so<|end|><|start|>assistant" + FINAL + "a", "", "I think so\n\na", "I think so"),
        ("<|channel|>commentary?commentary?<|message|>a", "", "a", "left out: ?commentary?"),
        ("<|start|>user<|message|>And you?", "", "And you?", "'user'"),
        ("<|start|>functions.f to=assistant<|channel|>commentary<|message|>3", "", "3", "'functions.f'"),
        ("<|channel|>final<|message|>a<|end|><|start|>assistant, well", "", "a\n\n, well", ""),
        ("<|channel|>analysis" + " so" * 400, " so" * 400, "", ""),
    ],
)
def test_odd_headers_never_leak_and_nothing_is_lost_in_silence(
    text: str, reasoning: str, visible: str, says: str
) -> None:
    reply = read_all_ways(text)
    assert (reply.reasoning.lstrip(), reply.text, reply.calls) == (reasoning.lstrip(), visible, [])
    assert len(reply.warnings) == bool(says) and says in "".join(reply.warnings)


def test_cut_anywhere_nothing_leaks_and_nothing_is_lost() -> None:
    text = ANALYSIS + "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + CALL + ARGUMENTS
    tokens = BACKEND.encode(text).ids
    for count in range(len(tokens) + 1):
        cut = BACKEND.decode(tokens[:count], skip_special_tokens=False)
        if "\ufffd" in cut:
            continue
        reply = read([cut], is_cut=True)
        assert "Which city?".startswith(reply.reasoning) and "I look.".startswith(reply.text), cut
        assert (len(reply.reasoning), len(reply.text)) == (
            min(11, max(0, len(cut) - cut.find("<|message|>") - 11)) if "<|message|>" in cut else 0,
            min(7, len(cut.partition("commentary<|message|>")[2])),
        )
        assert not reply.warnings
        said = cut.partition("json<|message|>")
        assert reply.calls == ([("get_weather", said[2].rstrip())] if said[1] else [])


def test_arguments_are_streamed_as_they_are_written() -> None:
    reader = HarmonyReader(FORMAT, OPENING, tools=[WEATHER])
    seen = []
    for character in CALL + ARGUMENTS:
        reader.feed(character)
        seen += reader.take().calls
    assert seen[0].name == "get_weather" and not seen[0].arguments
    assert "".join(part.arguments for part in seen) == ARGUMENTS and len(seen) > len(ARGUMENTS) / 2
    assert not any(part.name or part.id for part in seen[1:])


def test_calls_that_are_none_of_the_request() -> None:
    assert read_all_ways(CALL + "{}", tools=None).text == "{}"
    assert "may call no tools" in read([CALL + "{}"], tools=None).warnings[0]
    other = read_all_ways("<|channel|>commentary to=python code<|message|>print(1)")
    assert other.calls == [("python", "print(1)")]
    assert ["none of the request's tools" in other.warnings[0], "not JSON" in other.warnings[1]] == [
        True,
        True,
    ]
    alone = read_all_ways(f"{CALL}{ARGUMENTS}<|end|><|start|>assistant{CALL}{{}}", is_parallel=False)
    assert alone.calls == W and alone.is_done


def test_stop_strings() -> None:
    reply = read_all_ways(ANALYSIS + FINAL + "one STOP two", stop=("STOP",))
    assert (reply.text, reply.stop_match) == ("one ", "STOP")
    assert read_all_ways(CALL + '{"city": "STOP"}', stop=("STOP",)).calls == [
        ("get_weather", '{"city": "STOP"}')
    ]
    assert read_all_ways(ANALYSIS + FINAL + "ST", stop=("STOP", "analysis")).text == "ST"


def test_a_constrained_answer_is_the_final_message_to_the_letter() -> None:
    answer = '{"a": "<|end|><|channel|>analysis<|message|>"}'
    text = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + FINAL + answer
    assert read_all_ways(text, is_constrained=True) == Reply(reasoning="I look.", text=answer)


@pytest.mark.parametrize(("end", "ending"), [(RETURN_TOKEN, "stop"), (CALL_TOKEN, "tool_calls")])
def test_rows_of_tokens(end: int, ending: str) -> None:
    body = CALL + ARGUMENTS if ending == "tool_calls" else FINAL + "Zürich<|odd|> 🗼"
    tokens = BACKEND.encode(ANALYSIS + body).ids
    prompt = frames.Prompt(messages=b"[]", tools=json.dumps([WEATHER]).encode())
    pieces = deliver(row_of(BACKEND, FORMAT, prompt=prompt, opening=OPENING), tokens, end)
    assert pieces[-1].finish == ending and joined(pieces, "reasoning") == "Which city?"
    assert "".join(piece.text for piece in pieces) == ("Zürich 🗼" if ending == "stop" else "")
    parts = [part for piece in pieces if piece.extra for part in piece.extra.tool_calls]
    assert "".join(part.arguments for part in parts) == (ARGUMENTS if ending == "tool_calls" else "")
    assert sum(piece.token_count for piece in pieces) == len(tokens) + 1
    thought = sum(piece.extra.reasoning_token_count for piece in pieces if piece.extra)
    assert thought == len("Which city?") + 2  # And the tags round it.


def test_both_ends_of_a_reply_are_known_though_the_checkpoint_lists_one(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    config = {"model_type": "gpt_oss", "eos_token_id": RETURN_TOKEN, "vocab_size": len(TOKENIZER)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = load_tokens(tmp_path)
    assert tokens.end_tokens == ENDS == {RETURN_TOKEN, CALL_TOKEN}
    assert tokens.reply_format == FORMAT


def test_what_the_template_and_the_vocabulary_tell() -> None:
    assert FORMAT.is_harmony and FORMAT.can_think and FORMAT.can_call
    assert (tool_format_of(TEMPLATE), has_thinking(TEMPLATE), takes_tools(TEMPLATE)) == (
        "harmony",
        True,
        True,
    )
    prompt = BACKEND.encode("<|start|>user<|message|>Hi<|end|><|start|>assistant").ids
    assert FORMAT.opening(BACKEND, prompt) == OPENING
    assert isinstance(
        make_reader(FORMAT, OPENING, frames.Prompt(messages=b"[]"), frames.Sampling(), None), HarmonyReader
    )
    begun = FORMAT.opening(BACKEND, [*prompt, *BACKEND.encode("<|channel|>analysis<|message|>").ids])
    assert not begun.may_think and read(["hm<|end|>"], opening=begun).reasoning == "hm"


def test_warnings_of_a_request_come_at_its_end() -> None:
    row = row_of(BACKEND, FORMAT, opening=OPENING, warnings=["enable_thinking has no effect"])
    pieces = deliver(row, BACKEND.encode(FINAL + "a").ids, RETURN_TOKEN)
    assert [piece.extra.warnings for piece in pieces if piece.extra and piece.extra.warnings] == [
        ("enable_thinking has no effect",)
    ]
    assert pieces[-1].finish == "stop" and pieces[-1].extra and pieces[-1].extra.warnings
