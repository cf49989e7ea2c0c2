"""Replies split into reasoning, text and tool calls: any cut of the same reply reads the same."""

import json
from dataclasses import dataclass, field, replace
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import mlx_lm.tool_parsers
import pytest

from mlxgui_grpc.engine.reading import Reader
from mlxgui_grpc.engine.reply import ReplyReader
from mlxgui_grpc.engine.reply_format import ReplyFormat
from mlxgui_grpc.engine.tool_parsers import MAX_CALL_CHARACTERS

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}
ARGUMENTS = {"city": "Zürich, 東京 🗼", "days": 3}
CALL_OF: dict[str, str] = {
    "function_gemma": "call:get_weather{city:<escape>Zürich, 東京 🗼<escape>,days:3}",
    "gemma4": 'call:get_weather{city:<|"|>Zürich, 東京 🗼<|"|>,days:3}',
    "glm47": "get_weather\n<arg_key>city</arg_key>\n<arg_value>Zürich, 東京 🗼</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n",
    "json_tools": '\n{"name": "get_weather", "arguments": {"city": "Zürich, 東京 🗼", "days": 3}}\n',
    "kimi_k2": "<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Zürich, 東京 🗼", "days": 3}<|tool_call_end|>',
    "kimi_k3": '<|open|>call tool="get_weather" index="1"<|sep|>'
    '<|open|>argument key="city" type="string"<|sep|>Zürich, 東京 🗼<|close|>argument<|sep|>'
    '<|open|>argument key="days" type="number"<|sep|>3<|close|>argument<|sep|><|close|>call<|sep|>',
    "longcat": "get_weather\n<longcat_arg_key>city</longcat_arg_key>\n"
    "<longcat_arg_value>Zürich, 東京 🗼</longcat_arg_value>\n"
    "<longcat_arg_key>days</longcat_arg_key>\n<longcat_arg_value>3</longcat_arg_value>\n",
    "minicpm5": '"get_weather"><param name="city">Zürich, 東京 🗼</param><param name="days">3</param>',
    "minimax_m2": '\n<invoke name="get_weather">\n<parameter name="city">Zürich, 東京 🗼</parameter>\n'
    '<parameter name="days">3</parameter>\n</invoke>\n',
    "mistral": 'get_weather[ARGS]{"city": "Zürich, 東京 🗼", "days": 3}',
    "muse_spark": '\n<atem:invoke name="get_weather">\n<atem:parameter name="city">Zürich, 東京 🗼'
    '</atem:parameter>\n<atem:parameter name="days">3</atem:parameter>\n</atem:invoke>\n',
    "pythonic": '[get_weather(city="Zürich, 東京 🗼", days=3)]',
    "qwen3_coder": "\n<function=get_weather>\n<parameter=city>\nZürich, 東京 🗼\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n",
}
CALL_OF["laguna"] = CALL_OF["glm47"]
FORMATS = sorted(module.name for module in iter_modules(mlx_lm.tool_parsers.__path__))


def format_of(name: str, think: tuple[str, str] = ("<think>", "</think>")) -> ReplyFormat:
    """The format of a model whose calls mlx-lm's parser `name` reads."""
    parser = import_module(f"mlx_lm.tool_parsers.{name}")
    return ReplyFormat(
        think_start=think[0],
        think_end=think[1],
        tool_format=name,
        tool_call_start=parser.tool_call_start,
        tool_call_end=parser.tool_call_end,
        parse_calls=parser.parse_tool_call,
    )


@dataclass
class Reply:
    """What a reader made of a whole reply."""

    reasoning: str = ""
    text: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    stop_match: str = ""
    is_done: bool = False


def gathered(reader: Reader, pieces: list[str], *, is_cut: bool = False) -> Reply:
    """The pieces through one reader; ids and indices of calls are checked on the way."""
    reply, ids = Reply(), []
    for number in range(len(pieces) + 1):
        if number < len(pieces):
            reader.feed(pieces[number])
        else:
            reader.finish(is_cut=is_cut)
        reading = reader.take()
        reply.reasoning += reading.reasoning
        reply.text += reading.text
        reply.warnings += reading.warnings
        for part in reading.calls:
            if part.id:
                assert part.index == len(reply.calls) and part.name
                ids.append(part.id)
                reply.calls.append((part.name, ""))
            assert part.index == len(reply.calls) - 1
            name, arguments = reply.calls[-1]
            reply.calls[-1] = (name, arguments + part.arguments)
        if reader.stop_match or reader.is_done:
            break
    assert len(set(ids)) == len(reply.calls) == reader.call_count
    assert all(len(each) == len("call_") + 24 for each in ids)
    reply.stop_match, reply.is_done = reader.stop_match, reader.is_done
    return reply


JSON = format_of("json_tools")


def read(
    pieces: list[str], reply_format: ReplyFormat = JSON, *, is_cut: bool = False, **options: Any
) -> Reply:
    """The pieces through one reader of this format."""
    return gathered(ReplyReader(reply_format, **options), pieces, is_cut=is_cut)


def read_all_ways(text: str, reply_format: ReplyFormat = JSON, **options: Any) -> Reply:
    """The reply, the same however it is cut in two, and character by character."""
    whole = read([text], reply_format, **options)
    for at in range(1, len(text)):
        assert read([text[:at], text[at:]], reply_format, **options) == whole, (text[:at], text[at:])
    assert read(list(text), reply_format, **options) == whole
    return whole


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_mlx_lm_reads_the_same_at_every_cut(name: str) -> None:
    reply_format = format_of(name)
    call = reply_format.tool_call_start + CALL_OF[name] + reply_format.tool_call_end
    reply = read_all_ways(f"<think>\nWhich city?\n</think>\n\nI look.\n{call}", reply_format, tools=[WEATHER])
    assert (reply.reasoning, reply.text, reply.warnings) == ("Which city?", "I look.\n", [])
    assert [(name, json.loads(arguments)) for name, arguments in reply.calls] == [("get_weather", ARGUMENTS)]


@pytest.mark.parametrize("name", [name for name in FORMATS if format_of(name).tool_call_end])
def test_several_calls_and_text_after_them(name: str) -> None:
    reply_format = format_of(name)
    call = reply_format.tool_call_start + CALL_OF[name] + reply_format.tool_call_end
    reply = read([f"{call}\n{call}\n\nDone."], reply_format, tools=[WEATHER])
    assert [json.loads(arguments) for _, arguments in reply.calls] == [ARGUMENTS, ARGUMENTS]
    assert (reply.text, reply.warnings) == ("Done.", [])
    first = read_all_ways(call + "\n" + call, reply_format, tools=[WEATHER], is_parallel=False)
    assert len(first.calls) == 1 and first.is_done


@pytest.mark.parametrize("name", FORMATS)
def test_without_tools_a_call_is_text(name: str) -> None:
    reply_format = format_of(name)
    text = f"So: {reply_format.tool_call_start}{CALL_OF[name]}{reply_format.tool_call_end}."
    assert read_all_ways(text, reply_format) == Reply(text=text)


def test_arguments_are_streamed_as_they_are_written() -> None:
    raw = '{"city" :"Z\\u00fcrich", "days": 1.50e2, "big": 12345678901234567890,\n "x": [ ] }'
    text = f'<tool_call>\n{{"name": "get_weather", "arguments":  {raw} \n}}\n</tool_call>'
    assert read_all_ways(text, tools=[WEATHER]).calls == [("get_weather", raw)]
    reader = ReplyReader(JSON, tools=[WEATHER])
    seen = []
    for character in text:
        reader.feed(character)
        seen += reader.take().calls
    assert seen[0].name == "get_weather" and not seen[0].arguments
    assert len(seen) > len(raw) / 2 and not any(part.name or part.id for part in seen[1:])


@pytest.mark.parametrize(
    ("inner", "calls", "text"),
    [
        ('{"arguments": {"a": 1}, "name": "get_weather"}', [("get_weather", '{"a": 1}')], ""),
        ('{"name": "get_weather"}', [("get_weather", "{}")], ""),
        ('{"name": "get_weather", "arguments": "{\\"a\\": 1}"}', [("get_weather", '{"a": 1}')], ""),
        ('{"name": "get_weather", "arguments": {"a": "</tool_call>"}}', [("get_weather", '{"a": "</tool_call>"}')], ""),
        ('{"name": "get_weather", "arguments": {"a": 1}', [("get_weather", '{"a": 1}')], ""),
        ('[{"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}]', [("a", "{}"), ("b", "{}")], ""),
        ('{"name": "get_weather", "arguments": {"a": 1}}}', [("get_weather", '{"a": 1}')], "}"),
        ('{"name": 7, "arguments": {}}', [], '{"name": 7, "arguments": {}}'),
        ("get_weather(city)", [], "get_weather(city)"),
        ('{"name": "x" "arguments"}', [], '{"name": "x" "arguments"}'),
        ("", [], ""),
        ('{"name": "get_weather", "parameters": {"a": 1}}', [("get_weather", '{"a": 1}')], ""),
        ('{"parameters": {"a": 1}, "name": "get_weather", "type": "function"}', [("get_weather", '{"a": 1}')], ""),
        ('{"name": "get_weather", "parameters": {}, "arguments": {"a": 1}}', [("get_weather", '{"a": 1}')], ""),
        ('{"type": "function", "id": "7", "name": "get_weather"}', [("get_weather", "{}")], ""),
        ('{"name": "get_weather", "args": {"a": 1}}', [], '{"name": "get_weather", "args": {"a": 1}}'),
        ('[{"name": "a", "parameters": {"b": 1}}]', [("a", '{"b": 1}')], ""),
        ('[{"name": "a", "args": {"b": 1}}]', [], '[{"name": "a", "args": {"b": 1}}]'),
    ],
)  # fmt: skip
def test_json_calls(inner: str, calls: list[tuple[str, str]], text: str) -> None:
    reply = read_all_ways(f"<tool_call>{inner}</tool_call>", tools=[WEATHER])
    assert (reply.calls, reply.text) == (calls, text)
    assert any("could not be read" in warning for warning in reply.warnings) == bool(text)


def test_a_call_of_an_unknown_tool_is_passed_on_with_a_warning() -> None:
    call = '<tool_call>{"name": "launch", "arguments": {}}</tool_call>'
    reply = read_all_ways(call + call, tools=[WEATHER])
    assert reply.calls == [("launch", "{}")] * 2
    assert reply.warnings == ["the model calls 'launch', which is none of the request's tools"]


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_call_that_never_ends(is_cut: bool) -> None:
    begun = '<tool_call>{"name": "get_weather", "arguments": {"city": "Pa'
    reply = read_all_ways(begun, tools=[WEATHER], is_cut=is_cut)
    assert reply.calls == [("get_weather", '{"city": "Pa')]
    expected = [] if is_cut else ["the arguments of the call of 'get_weather' are not complete"]
    assert reply.warnings == expected
    unnamed = '<tool_call>\n{"na'
    reply = read_all_ways(unnamed, tools=[WEATHER], is_cut=is_cut)
    assert (reply.calls, reply.text) == ([], "" if is_cut else '{"na') and len(reply.warnings) == 1
    whole = '<tool_call>{"name": "get_weather", "arguments": {}}</tool_c'
    reply = read_all_ways(whole, tools=[WEATHER], is_cut=is_cut)
    assert (reply.calls, reply.warnings) == ([("get_weather", "{}")], [])
    glm = format_of("glm47")
    half = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>da"
    reply = read_all_ways(half, glm, tools=[WEATHER], is_cut=is_cut)
    assert reply.calls == ([] if is_cut else [("get_weather", '{"city": "Paris"}')])


@pytest.mark.parametrize("name", FORMATS)
def test_the_markup_of_a_call_that_the_limit_cuts_is_not_text(name: str) -> None:
    reply_format = format_of(name)
    begun = f"So.\n{reply_format.tool_call_start}{CALL_OF[name][:-30]}"
    reply = read_all_ways(begun, reply_format, tools=[WEATHER], is_cut=True)
    assert reply.text == "So.\n"
    if not reply.calls:
        (warning,) = reply.warnings
        assert f"{len(CALL_OF[name]) - 30} characters" in warning and "limit" in warning


@pytest.mark.parametrize(
    "arguments", ['{"a": "say "hi""}', '{"a": "line\nbreak"}', '{"a": [1, 2}', "{'a': 1}"]
)
def test_arguments_that_are_no_json_are_said_to_be_none(arguments: str) -> None:
    text = f'<tool_call>{{"name": "get_weather", "arguments": {arguments}}}</tool_call>'
    reply = read_all_ways(text, tools=[WEATHER])
    assert reply.warnings and all("get_weather" in warning for warning in reply.warnings)


def test_a_parser_is_given_nothing_that_takes_it_long() -> None:
    """mlx-lm's for Gemma 4 takes time with the square of what is not balanced; no parser gets all too much."""
    gemma = format_of("gemma4")
    calls: list[str] = []

    def parse(text: str, tools: Any) -> Any:
        calls.append(text)
        assert gemma.parse_calls is not None
        return gemma.parse_calls(text, tools)

    watched = replace(gemma, parse_calls=parse)
    quote = '<|"|>'
    evil = [
        "call:f{" * 9000, f"call:f{{a:{quote}" * 4000, "call:f" + "{" * 9000, "}" + "call:f{" * 9000 + "}" * 9000,
        quote + "call:f{" * 9000 + quote, f"{{{quote}" + "call:f{" * 9000 + quote + "}", "call:f{}" * 9000,
    ]  # fmt: skip
    for inner in evil:
        reply = read([f"<|tool_call>{inner}<tool_call|>"], watched, tools=[WEATHER])
        assert (reply.calls, reply.text) == ([], inner) and len(reply.warnings) == 1
    assert not calls
    nested = f"call:get_weather{{city:{quote}}}{{{quote},days:{{a:{{b:1}}}}}} call:get_weather{{}}"
    reply = read([f"<|tool_call>{nested}<tool_call|>"], watched, tools=[WEATHER])
    assert [json.loads(arguments) for _, arguments in reply.calls] == [
        {"city": "}{", "days": {"a": {"b": 1}}},
        {},
    ]
    small = format_of("function_gemma")
    begun = "call:f{" * 9000  # Takes seconds when each is looked for an end.
    text = f"{small.tool_call_start}{CALL_OF['function_gemma']}{begun}{small.tool_call_end}"
    assert len(read([text], small, tools=[WEATHER]).calls) == 1
    long = CALL_OF["qwen3_coder"].replace("Zürich", "Z" * MAX_CALL_CHARACTERS)
    reply = read([f"<tool_call>{long}</tool_call>"], format_of("qwen3_coder"), tools=[WEATHER])
    assert not reply.calls and len(reply.warnings) == 1


@pytest.mark.parametrize(
    ("text", "starts_in_thinking", "reasoning", "visible"),
    [
        ("<think>\na\n\nb\n</think>\n\nc\n\nd", False, "a\n\nb", "c\n\nd"),
        ("a\n</think>\n\nb", True, "a", "b"),
        ("</think>\nb", True, "", "b"),
        ("a, and never an end \n", True, "a, and never an end", ""),
        ("<think>\n\n</think>\n\nb", False, "", "b"),
        ("  b  ", False, "", "  b  "),
        (" \n", False, "", " \n"),
        ("\n<think>a</think>b", False, "a", "b"),
        ("<think>a</think>b<think>c</think>d", False, "ac", "bd"),
        ("a < b, <th and </think", False, "", "a < b, <th and </think"),
        ("é<think>日本🙂</think>\u2028x", False, "日本🙂", "éx"),
    ],
)
def test_thinking(text: str, starts_in_thinking: bool, reasoning: str, visible: str) -> None:
    reply = read_all_ways(text, starts_in_thinking=starts_in_thinking)
    assert (reply.reasoning, reply.text, reply.warnings) == (reasoning, visible, [])


def test_a_stray_end_of_thinking_is_left_out_and_said() -> None:
    reply = read_all_ways("a</think>b")
    assert reply.text == "ab" and len(reply.warnings) == 1


def test_tags_of_several_tokens_and_frames() -> None:
    xtml = format_of("kimi_k3", think=("<|open|>think<|sep|>", "<|close|>think<|sep|>"))
    frame = ("<|open|>response<|sep|>", "<|close|>response<|sep|>")
    reply_format = ReplyFormat(
        **{name: getattr(xtml, name) for name in ("think_start", "think_end", "tool_call_start", "tool_call_end")},
        tool_format="kimi_k3", parse_calls=xtml.parse_calls, frame_tags=frame,
    )  # fmt: skip
    calls = xtml.tool_call_start + CALL_OF["kimi_k3"] + xtml.tool_call_end
    text = f"<|open|>think<|sep|>hm<|close|>think<|sep|>{frame[0]}Hi{frame[1]}{calls}"
    reply = read_all_ways(text, reply_format, tools=[WEATHER])
    assert (reply.reasoning, reply.text, len(reply.calls)) == ("hm", "Hi", 1)


def test_a_call_while_thinking_and_a_thought_about_calls() -> None:
    call = '<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>'
    reply = read_all_ways(f"<think>now {call}", tools=[WEATHER])
    assert (reply.reasoning, reply.text, len(reply.calls)) == ("now", "", 1)
    reply = read_all_ways(f"<think>maybe {call} or not</think>Answer", tools=[WEATHER])
    assert (reply.reasoning, reply.text, len(reply.calls)) == ("maybe or not", "Answer", 1)
    reply = read_all_ways(f"<think>maybe {call}</think>\n\nAnswer", tools=[WEATHER])
    assert (reply.reasoning, reply.text, reply.warnings) == ("maybe", "Answer", [])
    reply = read_all_ways(f"<think>a <tool_call> is what I need</think>Fine.{call}", tools=[WEATHER])
    assert (reply.reasoning, reply.text, len(reply.calls)) == ("a is what I need", "Fine.", 1)
    assert len(reply.warnings) == 1


def test_constrained_text_holds_no_markup() -> None:
    text = '{"a": "<think> or <tool_call>"}'
    assert read_all_ways(text, tools=[WEATHER], is_constrained=True) == Reply(text=text)
    reply = read_all_ways(f"<think>x</think>\n{text}", tools=[WEATHER], is_constrained=True)
    assert reply == Reply(reasoning="x", text=text)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one STOP two", "STOP", Reply(text="one ", stop_match="STOP")),
        ("<think>a STOP b</think>c", "STOP", Reply(reasoning="a", stop_match="STOP")),
        ("<think>a</think>\n\nb\n\nc", "\n\n", Reply(reasoning="a", text="b", stop_match="\n\n")),
        ("\nb", "\n", Reply(stop_match="\n")),
        ("a ST<think>OP</think>b", "STOP", Reply(text="a STb", reasoning="OP")),
        ("ends in ST", "STOP", Reply(text="ends in ST")),
    ],
)
def test_stop_strings(text: str, stop: str, expected: Reply) -> None:
    assert read_all_ways(text, stop=(stop,)) == expected


def test_stop_strings_do_not_cut_arguments() -> None:
    call = '<tool_call>{"name": "get_weather", "arguments": {"city": "STOP"}}</tool_call>'
    reply = read_all_ways(call + " STOP", tools=[WEATHER], stop=("STOP",))
    assert reply.calls == [("get_weather", '{"city": "STOP"}')] and reply.stop_match == "STOP"


def test_a_format_that_is_not_known_leaves_calls_in_the_text_and_says_so() -> None:
    text = '<tool_call>{"name": "get_weather"}</tool_call>'
    reply = read_all_ways(text, ReplyFormat(), tools=[WEATHER])
    assert reply.text == text and len(reply.warnings) == 1
