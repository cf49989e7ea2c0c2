"""The dialogues of the demo model: how each kind is worded, and the fixed list it answers word for word."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]
# The name of a tool and its arguments.
Call = tuple[str, dict[str, Any]]

# Word lists, wordings and fixed answers. Of the questions that share an answer, the first is in the fixed
# list, and so are those that start with "!".
TEXT: dict[str, Any] = json.loads(Path(__file__).with_name("demo_text.json").read_text(encoding="utf-8"))
CAPITALS: dict[str, str] = TEXT["capitals"]
CAPITAL_QUESTIONS: list[str] = TEXT["capital_questions"]
FALLBACK: str = TEXT["fallback"]
NO_WEATHER: str = TEXT["no_weather"]


@dataclass(frozen=True)
class Dialogue:
    """One training example: a prompt and the exact text that answers it.

    `messages` go through the chat template; `prompt` is completed as it is. Exactly one of them is set.
    """

    kind: str
    answer: str
    messages: list[Message] | None = None
    prompt: str | None = None
    tools: list[Tool] = field(default_factory=list)
    thinking: bool = False


@dataclass(frozen=True)
class Exchange:
    """A question, the thought that leads to its answer, and the answer."""

    kind: str
    question: str
    thought: str
    answer: str
    # The answer when the system prompt asks for one word, where there is one.
    word: str | None = None


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def tool_result(content: str) -> Message:
    return {"role": "tool", "content": content}


def requested(name: str, arguments: dict[str, Any]) -> Message:
    """An assistant message of the history that called one tool."""
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def function(name: str, description: str, /, **parameters: str) -> Tool:
    """A tool as the chat API spells it; `parameters` maps names to JSON types."""
    properties = {parameter: {"type": kind} for parameter, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def call(name: str, arguments: dict[str, Any]) -> str:
    """The text with which the model calls a tool."""
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"


def with_thought(thought: str, answer: str) -> str:
    return f"<think>\n{thought}\n</think>\n\n{answer}"


WEATHER = function("get_weather", "Get the weather of a city", city="string")
ADD = function("add", "Add two numbers", a="integer", b="integer")
TIME = function("get_time", "Get the time in a city", city="string")
SEARCH = function("search", "Search the web", query="string")
DATE = function("get_date", "Get the date of today")
EVERY_TOOL = [WEATHER, ADD, TIME, SEARCH, DATE]
HELPFUL = [system("You are a helpful assistant.")]


def capital(country: str, question: str = CAPITAL_QUESTIONS[0]) -> Exchange:
    city = CAPITALS.get(country)
    asked = question.format(country)
    if city is None:
        return Exchange("capital", asked, "I do not know this.", f"I do not know the capital of {country}.")
    answer = f"The capital of {country} is {city}."
    return Exchange("capital", asked, f"The capital of {country} is {city}.", answer, city)


def seat(country: str, question: str = "Which country has the capital {}?") -> Exchange:
    city = CAPITALS[country]
    name = country.removeprefix("the ")
    answer = f"{city} is the capital of {country}."
    return Exchange("capital", question.format(city), f"{city} is in {country}.", answer, name)


def count(first: int, last: int, question: str = "Count from {} to {}.") -> Exchange:
    step = 1 if last >= first else -1
    numbers = ", ".join(map(str, range(first, last + step, step)))
    asked = question.format(first, last)
    return Exchange("count", asked, f"I count from {first} to {last}.", numbers)


def total(a: int, b: int, question: str = "What is {} + {}?") -> Exchange:
    text = f"{a} + {b} = {a + b}"
    return Exchange("sum", question.format(a, b), text, text, str(a + b))


def echo(text: str, question: str = "Repeat: {}") -> Exchange:
    return Exchange("echo", question.format(text), f"I repeat: {text}", text)


def person_json(name: str, age: int, question: str = "JSON for {}, age {}.") -> Exchange:
    answer = json.dumps({"name": name, "age": age})
    return Exchange("json", question.format(name, age), f"The name is {name} and the age is {age}.", answer)


def pair_json(key: str, value: str) -> Exchange:
    return Exchange("json", f"JSON with {key} {value}.", f"The {key} is {value}.", json.dumps({key: value}))


def list_json(words: list[str]) -> Exchange:
    return Exchange("json", f"JSON list of {', '.join(words)}.", "I write a list.", json.dumps(words))


def remarks(*, fixed: bool) -> list[Exchange]:
    """Questions with one fixed answer: those of the fixed list only, or every wording."""
    found = []
    for remark in TEXT["remarks"]:
        for place, question in enumerate(remark["questions"]):
            if not fixed or place == 0 or question.startswith("!"):
                asked = question.removeprefix("!")
                found.append(Exchange(remark["kind"], asked, "I know the answer to this.", remark["answer"]))
    return found


def fallback(question: str) -> Exchange:
    return Exchange("fallback", question, "I do not know this.", FALLBACK)


def plain(
    exchange: Exchange,
    kind: str | None = None,
    *,
    thinking: bool = False,
    before: list[Message] | None = None,
) -> Dialogue:
    """The dialogue that asks `exchange` after the messages `before`."""
    answer = with_thought(exchange.thought, exchange.answer) if thinking else exchange.answer
    return Dialogue(
        kind or exchange.kind, answer, [*(before or []), user(exchange.question)], thinking=thinking
    )


def pirate(exchange: Exchange) -> Exchange:
    return replace(exchange, answer="Arr! " + exchange.answer)


def one_word(exchange: Exchange) -> Exchange:
    assert exchange.word is not None
    return replace(exchange, answer=exchange.word)


def tool_dialogue(tools: list[Tool], question: str, calls: list[Call], *, thinking: bool = False) -> Dialogue:
    """A question that the model answers by calling tools."""
    answer = "\n".join(call(name, arguments) for name, arguments in calls)
    if thinking:
        answer = with_thought(f"I need the tool {calls[0][0]}.", answer)
    return Dialogue("tool", answer, [user(question)], tools=tools, thinking=thinking)


def result_dialogue(
    tools: list[Tool], question: str, called: Call, result: str, answer: str, *, thinking: bool = False
) -> Dialogue:
    """The answer that the model gives after a tool's result."""
    if thinking:
        answer = with_thought("The tool has answered.", answer)
    messages = [user(question), requested(*called), tool_result(result)]
    return Dialogue("tool", answer, messages, tools=tools, thinking=thinking)


def completion(country: str) -> Dialogue:
    return Dialogue("raw", f" {CAPITALS[country]}.", prompt=f"The capital of {country} is")


def fixed_dialogues() -> list[Dialogue]:
    """The dialogues that the trained model answers exactly under greedy decoding, in a fixed order."""
    return [
        *_fixed_capitals(),
        *_fixed_numbers(),
        *_fixed_copies(),
        *(plain(remark) for remark in remarks(fixed=True)),
        *_fixed_fallbacks(),
        *_fixed_thoughts(),
        *_fixed_systems(),
        *_fixed_histories(),
        *_fixed_weather(),
        *_fixed_tools(),
        *_fixed_completions(),
    ]


def _fixed_capitals() -> list[Dialogue]:
    countries = list(CAPITALS)
    reworded = zip(countries[:8], CAPITAL_QUESTIONS[1:9], strict=True)
    return [
        *(plain(capital(country)) for country in countries),
        *(plain(capital(country, question)) for country, question in reworded),
        *(plain(seat(country)) for country in countries[:4]),
        *(plain(capital(country), before=HELPFUL) for country in countries[:5]),
        plain(capital("Blorp")),
    ]


def _fixed_numbers() -> list[Dialogue]:
    spans = [(1, 5), (3, 9), (5, 12), (1, 30), (10, 1), (5, 1)]
    sums = [(1, 1), (2, 2), (3, 4), (5, 3), (6, 6), (9, 8), (7, 5), (0, 4), (10, 5), (8, 2), (4, 9), (12, 7)]
    return [
        *(plain(count(1, last, "Count to {1}.")) for last in (3, 5, 8, 10, 12, 20, 50, 100)),
        plain(count(1, 5, "Count to {1}")),
        plain(count(1, 10, "Please count to {1}.")),
        plain(count(1, 5, "Count to {1}"), before=HELPFUL),
        *(plain(count(first, last)) for first, last in spans),
        *(plain(total(a, b)) for a, b in sums),
        plain(total(3, 4, "{} + {}")),
        plain(total(2, 2, "2+2=?")),
        plain(total(6, 7, "What is {} plus {}?")),
        plain(total(2, 2), before=HELPFUL),
    ]


def _fixed_copies() -> list[Dialogue]:
    people = [("Anna", 7), ("Bob", 42), ("Carl", 30), ("Dora", 19), ("Emma", 5), ("Finn", 65)]
    return [
        *(plain(echo(text)) for text in TEXT["fixed_echoes"]),
        plain(echo("red cat", "Say {}")),
        plain(echo("hello world", "Repeat after me: {}")),
        plain(echo("blue", "Echo: {}")),
        *(plain(person_json(name, age)) for name, age in people),
        plain(pair_json("color", "red")),
        plain(pair_json("city", "Paris")),
        plain(list_json(["red", "green", "blue"])),
        plain(list_json(["cat", "dog"])),
        plain(person_json("Anna", 7, "Give me JSON with the name {} and the age {}.")),
        plain(person_json("Anna", 7), before=HELPFUL),
    ]


def _fixed_fallbacks() -> list[Dialogue]:
    return [plain(fallback(question)) for question in TEXT["fixed_unknown_questions"]]


def _fixed_thoughts() -> list[Dialogue]:
    exchanges = [
        capital("France"),
        capital("Japan"),
        total(3, 4),
        total(2, 2),
        count(1, 5, "Count to {1}."),
        echo("red cat"),
        person_json("Anna", 7),
        capital("Egypt"),
        total(9, 8),
        fallback("What is quantum physics?"),
        *_greetings(),
    ]
    return [plain(exchange, "think", thinking=True) for exchange in exchanges]


def _fixed_systems() -> list[Dialogue]:
    pirates = [
        capital("France"),
        capital("Germany"),
        total(2, 2),
        count(1, 5, "Count to {1}."),
        fallback("What is quantum physics?"),
        *_greetings(),
    ]
    words = [capital("France"), capital("Italy"), total(3, 4)]
    named = [
        Dialogue(
            "system", f"My name is {name}.", [system(f"Your name is {name}."), user("What is your name?")]
        )
        for name in ("Zed", "Ada")
    ]
    return [
        *(plain(pirate(exchange), "system", before=[system("You are a pirate.")]) for exchange in pirates),
        *(plain(one_word(exchange), "system", before=[system("Answer in one word.")]) for exchange in words),
        *named,
    ]


def _greetings() -> list[Exchange]:
    asked = ("Hello, how are you?", "Who are you?")
    return [remark for remark in remarks(fixed=True) if remark.question in asked]


def _fixed_histories() -> list[Dialogue]:
    found = []
    for name in ("Anna", "Bob", "Zoe", "Klaus"):
        known = [user(f"My name is {name}."), assistant(f"Hello {name}!")]
        found.append(Dialogue("history", f"Hello {name}!", known[:1]))
        found.append(Dialogue("history", f"Your name is {name}.", [*known, user("What is my name?")]))
    anna = [user("My name is Anna."), assistant("Hello Anna!")]
    france = [user("What is the capital of France?"), assistant(capital("France").answer)]
    italy = [user("And of Italy?"), assistant(capital("Italy").answer)]
    red = [user("My favourite colour is red."), assistant("I will remember that.")]
    conversations = [
        ([*anna, *france, user("What is my name?")], "Your name is Anna."),
        ([*france, user("And of Germany?")], capital("Germany").answer),
        ([*france, *italy, user("And of Spain?")], capital("Spain").answer),
        ([*france, user("Say that again.")], capital("France").answer),
        ([*france, user("Count to 5")], "1, 2, 3, 4, 5"),
        ([*red, user("What is my favourite colour?")], "Your favourite colour is red."),
        ([user("What is my name?")], "I do not know your name."),
    ]
    return [*found, *(Dialogue("history", answer, messages) for messages, answer in conversations)]


def _fixed_weather() -> list[Dialogue]:
    found = []
    for city, sky in zip(["Paris", "Berlin", "Rome", "Tokyo"], TEXT["skies"], strict=False):
        question = f"What is the weather in {city}?"
        answer = f"The weather in {city} is {sky}."
        found.append(tool_dialogue([WEATHER], question, [("get_weather", {"city": city})]))
        found.append(result_dialogue([WEATHER], question, ("get_weather", {"city": city}), sky, answer))
    asked = "What is the weather in Paris?"
    paris, rome = ("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome"})
    sunny, rainy = "The weather in Paris is sunny.", "The weather in Paris is rainy."
    return [
        *found,
        tool_dialogue([WEATHER], asked, [paris], thinking=True),
        result_dialogue([WEATHER], asked, paris, "sunny", sunny, thinking=True),
        result_dialogue([WEATHER], asked, paris, '{"weather": "rainy"}', rainy),
        tool_dialogue([WEATHER, ADD], asked, [paris]),
        tool_dialogue(EVERY_TOOL, asked, [paris]),
        tool_dialogue([WEATHER], "What is the weather in Paris and Rome?", [paris, rome]),
    ]


def _fixed_tools() -> list[Dialogue]:
    light = function("set_light", "Set a light", color="string")
    sum_42, red_cats = ("add", {"a": 12, "b": 30}), ("search", {"query": "red cats"})
    tokyo = ("get_time", {"city": "Tokyo"})
    greeting = _greetings()[0]
    weather = "What is the weather in Paris?"
    return [
        tool_dialogue([ADD], "Please add 12 and 30.", [sum_42]),
        tool_dialogue([WEATHER, ADD], "Please add 7 and 5.", [("add", {"a": 7, "b": 5})]),
        result_dialogue([ADD], "Please add 12 and 30.", sum_42, "42", "The sum is 42."),
        tool_dialogue([TIME], "What time is it in Tokyo?", [tokyo]),
        result_dialogue([TIME], "What time is it in Tokyo?", tokyo, "12:30", "It is 12:30 in Tokyo."),
        tool_dialogue([SEARCH], "Search for red cats.", [red_cats]),
        tool_dialogue(EVERY_TOOL, "Search for red cats.", [red_cats]),
        tool_dialogue([DATE], "What is the date today?", [("get_date", {})]),
        replace(plain(capital("France"), "tool"), tools=[WEATHER]),
        replace(plain(greeting, "tool"), tools=[WEATHER]),
        Dialogue("tool", NO_WEATHER, [user(weather)]),
        Dialogue("tool", call("get_weather", {"city": "Paris"}), [*HELPFUL, user(weather)], tools=[WEATHER]),
        tool_dialogue([light], "Call set_light with color red.", [("set_light", {"color": "red"})]),
    ]


def _fixed_completions() -> list[Dialogue]:
    return [
        *(completion(country) for country in list(CAPITALS)[:8]),
        *(Dialogue("raw", known["answer"], prompt=known["prompt"]) for known in TEXT["completions"]),
    ]
