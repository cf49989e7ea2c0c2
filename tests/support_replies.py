"""Replies that no model needs to write: generated, with everything that text can hold, and cut at arbitrary places."""

import json
from random import Random

from mlxgui_grpc.deltas import Delta
from mlxgui_grpc.engine import frames
from mlxgui_grpc.generation import Ended, Event, Finished, Prefilling, Started

EDGES = [
    "The capital of France is Paris. ",
    " ",
    "\n",
    "\n\n",
    "\r",
    "\r\n",
    "\x00",
    "\x1b[0m\x7f\x85",
    "\u2028\u2029",
    "\ufeff",
    "\ufffd",
    "\uffff",
    "e\u0301\u0308",
    "\N{GRINNING FACE}\N{MUSICAL SYMBOL G CLEF}",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f1e9\U0001f1ea\U0001f44b\U0001f3fd",
    "\u202eשלום \u0645\u0631\u062d\u0628\u0627\u202c",
    "नि\u200dक्ष",
    "日本語の文",
    "data: [DONE]\n\n",
    'data: {"x": 1}\n\nevent: error\nid: 5\n: comment\n',
    '"quoted" \\ back\\slash \\u0041 \\ud83d',
    "</think><tool_call>",
    "</script>&amp;<!--",
    "\U0010ffff",
]


def text_of(choose: Random, most: int = 6) -> str:
    """Never empty."""
    return "".join(choose.choice(EDGES) for _ in range(choose.randint(1, most)))


def cut(choose: Random, text: str) -> list[str]:
    """The text in pieces, some of which end between a letter and its accent."""
    places = sorted(choose.randrange(len(text) + 1) for _ in range(choose.randrange(6)))
    pieces = [text[begin:end] for begin, end in zip([0, *places], [*places, len(text)], strict=True)]
    return [piece for piece in pieces if piece]


def arguments_of(choose: Random) -> str:
    """Mostly the text of a JSON object, as a model would write it."""
    value = {text_of(choose, 1): choose.choice([text_of(choose), 5, -0.5, None, [1, {"a": []}], True])}
    text = json.dumps(value, ensure_ascii=choose.random() < 0.5, indent=choose.choice([None, None, 2]))
    match choose.randrange(10):
        case 0:
            return text[: choose.randrange(len(text))]
        case 1:
            return choose.choice(
                ["", "[]", "5", "nonsense", '{"a": NaN}', '{"a": "\\udc00"}', '{"a":1,"a":2}']
            )
    return text


def logprob(choose: Random, text: str) -> frames.Logprob:
    rivals = tuple(
        frames.Logprob(5, rival, rival.encode(), -choose.random() * 9)
        for rival in choose.sample(EDGES, choose.randrange(3))
    )
    return frames.Logprob(7, text, text.encode(), -choose.random(), rivals)


def chat_events(choose: Random, choice_count: int, *, with_logprobs: bool) -> list[Event]:
    """A chat's events, those of its choices mixed."""
    return _framed(choose, [_chat_choice(choose, index, with_logprobs) for index in range(choice_count)])


def completion_events(choose: Random, choice_count: int, *, with_logprobs: bool) -> list[Event]:
    """A completion's events, those of its choices mixed."""
    choices: list[list[Event]] = []
    for index in range(choice_count):
        deltas = _texts(choose, index, text_of(choose), with_logprobs) if choose.random() < 0.95 else []
        if deltas and with_logprobs and choose.random() < 0.3:
            deltas[0].prompt_logprobs = (logprob(choose, "The"), logprob(choose, " end"))
        reason = choose.choice(["stop", "stop", "length"])
        choices.append([*deltas, _finished(choose, index, reason)])
    return _framed(choose, choices)


def _framed(choose: Random, choices: list[list[Event]]) -> list[Event]:
    events: list[Event] = [
        Started(
            id=f"chatcmpl-{choose.randrange(2**32):x}",
            model="demo",
            create_time=1.7e9 + choose.randrange(1000),
            prompt_token_count=choose.randint(1, 99),
            warnings=[text_of(choose, 1)] if choose.random() < 0.2 else [],
        )
    ]
    if choose.random() < 0.2:
        events.append(Prefilling(0, 1, 2))
    while any(choices):
        events.append(choose.choice([events for events in choices if events]).pop(0))
    tokens = sum(event.token_count for event in events if isinstance(event, Delta))
    events.append(
        Ended(
            prompt_token_count=choose.randint(1, 99),
            completion_token_count=tokens,
            reasoning_token_count=tokens // 3,
            queue_seconds=0.0,
            load_seconds=0.0,
            prefill_seconds=0.1,
            first_token_seconds=0.2,
            decode_seconds=1.0,
            total_seconds=choose.random() * 5,
            choice_count=len(choices),
            warnings=[text_of(choose, 1)] if choose.random() < 0.1 else [],
        )
    )
    return events


def _chat_choice(choose: Random, index: int, with_logprobs: bool) -> list[Event]:
    """Mostly reasoning, then text, then calls; now and then something comes late, or not at all."""
    kinds: list[str] = []
    if choose.random() < 0.5:
        kinds.append("reasoning")
    if choose.random() < 0.8:
        kinds.append("text")
    kinds += ["call"] * choose.choice([0, 0, 1, 1, 2, 4])
    if choose.random() < 0.15:
        kinds.insert(choose.randint(0, len(kinds)), choose.choice(["text", "reasoning"]))
    deltas: list[Event] = []
    call_count = 0
    for kind in kinds:
        if kind == "text":
            deltas += _texts(choose, index, text_of(choose), with_logprobs)
        elif kind == "reasoning":
            deltas += [
                Delta(index=index, token_count=1, reasoning=piece) for piece in cut(choose, text_of(choose))
            ]
        else:
            deltas += _call(choose, index, call_count)
            call_count += 1
        if with_logprobs and choose.random() < 0.3:
            # A token that ends or begins something and is not to be seen.
            token = (logprob(choose, "<|im_end|>"),)
            deltas.append(Delta(index=index, token_count=1, logprobs=token))
    reason = choose.choice(["stop", "length"]) if call_count == 0 else choose.choice(["tool_calls", "length"])
    return [*deltas, _finished(choose, index, reason)]


def _texts(choose: Random, index: int, text: str, with_logprobs: bool) -> list[Delta]:
    return [
        Delta(
            index=index,
            token_count=1,
            text=piece,
            logprobs=(logprob(choose, piece),) if with_logprobs else (),
        )
        for piece in cut(choose, text)
    ]


def _call(choose: Random, index: int, number: int) -> list[Delta]:
    """The name alone first, or with the first of the arguments."""
    arguments = arguments_of(choose)
    pieces = cut(choose, arguments) if arguments else []
    first = pieces.pop(0) if pieces and choose.random() < 0.5 else ""
    name = choose.choice(["get_weather", "f", "add-2_x"])
    parts = [frames.ToolCallPart(number, f"call_{choose.randrange(2**32):x}", name, first)]
    parts += [frames.ToolCallPart(number, arguments=piece) for piece in pieces]
    return [Delta(index=index, token_count=1, tool_call=part) for part in parts]


def _finished(choose: Random, index: int, reason: str) -> Finished:
    stop = text_of(choose, 2) if reason == "stop" and choose.random() < 0.3 else ""
    return Finished(index, reason, stop)
