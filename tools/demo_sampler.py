"""Endless variations of the demo dialogues: other wordings, made-up words, questions without an answer."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from demo_corpus import (
    ADD,
    CAPITAL_QUESTIONS,
    CAPITALS,
    DATE,
    EVERY_TOOL,
    FALLBACK,
    NO_WEATHER,
    SEARCH,
    TEXT,
    TIME,
    WEATHER,
    Call,
    Dialogue,
    Exchange,
    Message,
    Tool,
    assistant,
    capital,
    completion,
    count,
    echo,
    fallback,
    fixed_dialogues,
    function,
    list_json,
    one_word,
    pair_json,
    person_json,
    pirate,
    plain,
    remarks,
    result_dialogue,
    seat,
    system,
    tool_dialogue,
    total,
    user,
)

NAMES: list[str] = TEXT["names"]
WORDS: list[str] = TEXT["words"]
# Nothing that the model knows something about: these fill the questions it must decline.
TOPICS: list[str] = TEXT["topics"]
GLUE: list[str] = TEXT["glue"]


@dataclass(frozen=True)
class Errand:
    """A question for which `tool` has to be called, what the tool returns and the answer made of that."""

    tool: Tool
    question: str
    calls: list[Call]
    result: str = ""
    answer: str = ""
    # Whether the question has to stay as it is, since the call copies its words.
    is_verbatim: bool = False


class Sampler:
    """Draws dialogues without end; the same seed gives the same sequence."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._fixed = fixed_dialogues()
        self._remarks = remarks(fixed=False)
        self._fixed_fallbacks = [
            d.messages[-1]["content"] for d in self._fixed if d.kind == "fallback" and d.messages
        ]

    def dialogue(self, fixed_share: float) -> Dialogue:
        """One dialogue: of the fixed list with probability `fixed_share`, else a drawn one."""
        if self.rng.random() < fixed_share:
            return self.rng.choice(self._fixed)
        draw: Callable[[], Dialogue] = self.rng.choices(
            [self._ordinary, self._tool, self._history, self._persona, self._completion], [70, 14, 8, 4, 4]
        )[0]
        return draw()

    def made_up_word(self) -> str:
        syllables = self.rng.randint(2, 3)
        word = "".join(
            self.rng.choice("bcdfghjklmnprstvwz") + self.rng.choice("aeiou") for _ in range(syllables)
        )
        return word + self.rng.choice(["", "", "n", "r", "x", "t"])

    def _city(self) -> str:
        return (
            self.rng.choice(list(CAPITALS.values()))
            if self.rng.random() < 0.7
            else self.made_up_word().title()
        )

    def _name(self) -> str:
        return self.rng.choice(NAMES) if self.rng.random() < 0.6 else self.made_up_word().title()

    def _phrase(self, longest: int = 5) -> str:
        pick = self.rng.random()
        words = [
            self.made_up_word() if pick < 0.4 else self.rng.choice(WORDS)
            for _ in range(self.rng.randint(1, longest))
        ]
        if self.rng.random() < 0.15:
            words.append(str(self.rng.randint(0, 999)))
        text = " ".join(words)
        style = self.rng.random()
        return text.title() if style < 0.1 else text.capitalize() + "." if style < 0.2 else text

    def _loosely(self, question: str) -> str:
        """The question as hurried people type it: without capitals or punctuation, or with more of them."""
        style = self.rng.random()
        if style < 0.15:
            question = question.rstrip(".?!")
        elif style < 0.25:
            question = question[0].lower() + question[1:]
        elif style < 0.33:
            question = question.lower().rstrip(".?!")
        elif style < 0.37:
            question = question + self.rng.choice([" ", "!", "?", "\n", "??"])
        elif style < 0.40:
            question = "Please " + question[0].lower() + question[1:]
        return question

    def _unknown(self) -> str:
        rng = self.rng
        if rng.random() < 0.03:
            return " ".join(rng.choice(GLUE + TOPICS + WORDS) for _ in range(rng.randint(60, 250)))
        text: str = rng.choice(TEXT["unknown_questions"])
        fill: dict[str, Callable[[], str]] = {
            "{t}": self._topic,
            "{w}": lambda: rng.choice(GLUE),
            "{n}": lambda: str(rng.randint(0, 10 ** rng.randint(1, 4))),
            "{p}": self.made_up_word,
            "{g}": lambda: " ".join(rng.choice(GLUE + TOPICS) for _ in range(rng.randint(2, 12))),
            "{u}": lambda: "".join(rng.choices(TEXT["foreign_letters"], k=rng.randint(1, 8))),
            "{c}": lambda: rng.choice(TEXT["code"]),
        }
        # Only the wordings hold slots: what fills one may hold a brace.
        return re.sub(r"\{[twnpguc]\}", lambda slot: fill[slot[0]](), text)

    def _topic(self) -> str:
        """Something to ask about that the model knows nothing of."""
        words = TOPICS if self.rng.random() < 0.6 else WORDS if self.rng.random() < 0.5 else GLUE
        word = self.rng.choice(words) if self.rng.random() < 0.85 else self.made_up_word()
        return word + self.rng.choice(["", "", "s"])

    def _exchange(self) -> Exchange:
        """One question and its answer, of any kind, worded and typed in any way."""
        draws: dict[Callable[[], Exchange], int] = {
            self._capital: 18,
            self._seat: 3,
            self._count: 18,
            self._sum: 13,
            self._echo: 26,
            self._json: 9,
            self._remark: 12,
            self._fallback: 26,
            self._nowhere: 2,
        }
        draw = self.rng.choices(list(draws), list(draws.values()))[0]
        exchange = draw()
        # What the answer copies stays as it is.
        if draw in (self._echo, self._json, self._nowhere):
            return exchange
        return replace(exchange, question=self._loosely(exchange.question))

    def _capital(self) -> Exchange:
        return capital(self.rng.choice(list(CAPITALS)), self.rng.choice(CAPITAL_QUESTIONS))

    def _nowhere(self) -> Exchange:
        return capital(self.made_up_word().title(), self.rng.choice(CAPITAL_QUESTIONS))

    def _seat(self) -> Exchange:
        return seat(self.rng.choice(list(CAPITALS)), self.rng.choice(TEXT["seat_questions"]))

    def _count(self) -> Exchange:
        rng = self.rng
        if rng.random() < 0.5:
            question = rng.choice(TEXT["count_questions"])
            return count(1, rng.randint(1, 40), question)
        if rng.random() < 0.75:
            first = rng.randint(0, 60)
            return count(first, first + rng.randint(1, 15))
        return count(rng.randint(3, 12), 1, rng.choice(["Count from {} to {}.", "Count down from {}."]))

    def _sum(self) -> Exchange:
        most = self.rng.choice([9, 9, 12, 20])
        a, b = self.rng.randint(0, most), self.rng.randint(0, most)
        return total(a, b, self.rng.choice(TEXT["sum_questions"]))

    def _echo(self) -> Exchange:
        question = self.rng.choice(TEXT["echo_questions"])
        # Long phrases teach copying fastest.
        return echo(self._phrase(self.rng.choice([3, 5, 12])), question)

    def _json(self) -> Exchange:
        rng = self.rng
        pick = rng.random()
        if pick < 0.6:
            return person_json(self._name(), rng.randint(1, 99), rng.choice(TEXT["person_questions"]))
        if pick < 0.8:
            return pair_json(rng.choice(TEXT["json_keys"]), self._phrase(1).rstrip("."))
        return list_json([rng.choice(WORDS) for _ in range(rng.randint(2, 4))])

    def _remark(self) -> Exchange:
        return self.rng.choice(self._remarks)

    def _fallback(self) -> Exchange:
        known = self.rng.random() < 0.15
        return fallback(self.rng.choice(self._fixed_fallbacks) if known else self._unknown())

    def _earlier(self, turns: int) -> list[Message]:
        """Turns of a conversation that do not bear on the next question; long answers are left out."""
        drawn = [self._exchange() for _ in range(turns)]
        short = [exchange for exchange in drawn if len(exchange.answer) < 100]
        return [
            message for exchange in short for message in (user(exchange.question), assistant(exchange.answer))
        ]

    def _ordinary(self) -> Dialogue:
        """A question, perhaps with a system prompt, earlier turns, thinking or tools it does not need."""
        rng = self.rng
        exchange = self._exchange()
        before: list[Message] = []
        style = rng.random()
        thinking = rng.random() < 0.12
        if style < 0.07 and exchange.kind in ("capital", "sum", "count", "fallback", "about"):
            before = [system(rng.choice(TEXT["pirate_systems"]))]
            exchange = pirate(exchange)
        elif style < 0.12 and exchange.word is not None:
            before = [system(rng.choice(TEXT["one_word_systems"]))]
            exchange = one_word(exchange)
        elif style < 0.32:
            before = [system(rng.choice(TEXT["neutral_systems"]) if rng.random() < 0.9 else self._phrase(8))]
        elif style < 0.40:
            before = self._earlier(rng.choice([1, 1, 2, 3]))
        dialogue = plain(exchange, before=before, thinking=thinking)
        if rng.random() < 0.05 and exchange.kind != "sum":
            dialogue = replace(dialogue, tools=rng.sample(EVERY_TOOL, rng.randint(1, 2)))
        return dialogue

    def _neutral(self) -> Message:
        return system(self.rng.choice(TEXT["neutral_systems"]))

    def _history(self) -> Dialogue:
        rng = self.rng
        before: list[Message] = [system(rng.choice(TEXT["neutral_systems"]))] if rng.random() < 0.2 else []
        pick = rng.random()
        if pick < 0.6:
            name = self._name()
            said = rng.choice(TEXT["name_statements"]).format(name)
            greeting = f"Hello {name}!"
            if rng.random() < 0.3:
                return Dialogue("history", greeting, [*before, user(said)])
            before += [user(said), assistant(greeting)]
            if rng.random() < 0.4:
                before += self._earlier(rng.choice([1, 1, 2, 3]))
            return Dialogue(
                "history", f"Your name is {name}.", [*before, user(rng.choice(TEXT["name_questions"]))]
            )
        if pick < 0.75:
            turns = rng.sample(list(CAPITALS), rng.randint(2, 3))
            first = capital(turns[0], rng.choice(CAPITAL_QUESTIONS))
            before += [user(first.question), assistant(first.answer)]
            asked = rng.choice(["And of {}?", "And {}?", "What about {}?", "And the capital of {}?"])
            for country in turns[1:-1]:
                before += [user(asked.format(country)), assistant(capital(country).answer)]
            return Dialogue("history", capital(turns[-1]).answer, [*before, user(asked.format(turns[-1]))])
        if pick < 0.85:
            earlier = self._exchange()
            while len(earlier.answer) > 60:
                earlier = self._exchange()
            before += [user(earlier.question), assistant(earlier.answer)]
            again = rng.choice(["Say that again.", "Again, please.", "Repeat that."])
            return Dialogue("history", earlier.answer, [*before, user(again)])
        if pick < 0.95:
            colour = rng.choice(TEXT["colours"])
            spelled = rng.choice(["colour", "color"])
            before += [user(f"My favourite {spelled} is {colour}."), assistant("I will remember that.")]
            return Dialogue(
                "history",
                f"Your favourite colour is {colour}.",
                [*before, user(f"What is my favourite {spelled}?")],
            )
        return Dialogue(
            "history", "I do not know your name.", [*before, user(rng.choice(TEXT["name_questions"]))]
        )

    def _persona(self) -> Dialogue:
        name = self._name()
        told = self.rng.choice(["Your name is {}.", "You are {}.", "You are called {}."]).format(name)
        asked = self.rng.choice(["What is your name?", "Who are you?", "What's your name?"])
        return Dialogue("system", f"My name is {name}.", [system(told), user(asked)])

    def _completion(self) -> Dialogue:
        pick = self.rng.random()
        if pick < 0.5:
            return completion(self.rng.choice(list(CAPITALS)))
        if pick < 0.8:
            known = self.rng.choice(TEXT["completions"])
            return Dialogue("raw", known["answer"], prompt=known["prompt"])
        return Dialogue("raw", f" {self.rng.choice([FALLBACK])}", prompt=self._unknown())

    def _tool(self) -> Dialogue:
        """A tool to call, alone or among others, or the answer after its result."""
        rng = self.rng
        thinking = rng.random() < 0.2
        draws: dict[Callable[[], Errand | Dialogue], int] = {
            self._weather: 40,
            self._addition: 20,
            self._time: 12,
            self._search: 10,
            self._date: 4,
            self._named_tool: 10,
            self._no_tool: 4,
        }
        errand = rng.choices(list(draws), list(draws.values()))[0]()
        if isinstance(errand, Dialogue):
            return errand
        if len(errand.calls) > 1:
            return tool_dialogue(self._among(errand.tool), errand.question, errand.calls, thinking=thinking)
        question = errand.question if errand.is_verbatim else self._loosely(errand.question)
        tools = self._among(errand.tool)
        if rng.random() < 0.6:
            dialogue = tool_dialogue(tools, question, errand.calls, thinking=thinking)
        else:
            called, result, answer = errand.calls[0], errand.result, errand.answer
            dialogue = result_dialogue(tools, question, called, result, answer, thinking=thinking)
        if rng.random() < 0.15 and dialogue.messages:
            dialogue = replace(dialogue, messages=[self._neutral(), *dialogue.messages])
        return dialogue

    def _no_tool(self) -> Dialogue:
        asked = self.rng.choice(TEXT["weather_questions"][1:4])
        dialogue = Dialogue("tool", NO_WEATHER, [user(asked.format(self._city()))])
        if self.rng.random() < 0.6:
            return dialogue
        return replace(dialogue, tools=[self.rng.choice([ADD, SEARCH])])

    def _weather(self) -> Errand:
        rng = self.rng
        name = rng.choice(["get_weather"] * 4 + ["get_current_weather", "weather", "fetch_weather"])
        parameter = rng.choice(["city", "city", "location", "place"])
        parameters = {parameter: "string"}
        if rng.random() < 0.15:
            parameters["unit"] = "string"
        tool = function(name, "Get the weather", **parameters)
        city = self._city()
        asked = rng.choice(TEXT["weather_questions"])
        calls: list[Call] = [(name, {parameter: city})]
        sky = rng.choice(TEXT["skies"])
        result = json.dumps({"weather": sky}) if rng.random() < 0.25 else sky
        if rng.random() < 0.15:
            other = self._city()
            calls.append((name, {parameter: other}))
            return Errand(tool, asked.format(f"{city} and {other}"), calls)
        return Errand(tool, asked.format(city), calls, result, f"The weather in {city} is {sky}.")

    def _addition(self) -> Errand:
        rng = self.rng
        a, b = rng.randint(0, 99), rng.randint(0, 99)
        name = rng.choice(["add", "add", "sum", "add_numbers"])
        left, right = rng.choice([("a", "b"), ("a", "b"), ("x", "y")])
        tool = function(name, "Add two numbers", **{left: "integer", right: "integer"})
        asked = rng.choice(["Please add {} and {}.", "Add {} and {}.", "What is {} + {}?"])
        return Errand(
            tool, asked.format(a, b), [(name, {left: a, right: b})], str(a + b), f"The sum is {a + b}."
        )

    def _time(self) -> Errand:
        city, clock = self._city(), f"{self.rng.randint(0, 23):02}:{self.rng.randint(0, 59):02}"
        asked = f"What time is it in {city}?"
        return Errand(TIME, asked, [("get_time", {"city": city})], clock, f"It is {clock} in {city}.")

    def _search(self) -> Errand:
        text = self._phrase(3).rstrip(".")
        result = self._phrase(4).rstrip(".")
        calls: list[Call] = [("search", {"query": text})]
        return Errand(SEARCH, f"Search for {text}.", calls, result, f"I found: {result}", is_verbatim=True)

    def _date(self) -> Errand:
        rng = self.rng
        result = f"{rng.randint(2020, 2030)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
        question = rng.choice(["What is the date today?", "What day is it?", "What is the date?"])
        return Errand(DATE, question, [("get_date", {})], result, f"The date is {result}.")

    def _named_tool(self) -> Errand:
        rng = self.rng
        words = [rng.choice([self.made_up_word(), rng.choice(WORDS)]) for _ in range(rng.randint(1, 2))]
        name = "_".join(words)
        parameter, text = rng.choice([*WORDS, "id", "name", "color"]), self._phrase(2).rstrip(".")
        tool = function(name, "Do it", **{parameter: "string"})
        asked = f"Call {name} with {parameter} {text}."
        return Errand(tool, asked, [(name, {parameter: text})], "ok", "Done.", is_verbatim=True)

    def _among(self, tool: Tool) -> list[Tool]:
        """The tool, alone or with others, in any order."""
        verbs = {"weather": WEATHER, "add": ADD, "sum": ADD, "time": TIME, "search": SEARCH, "date": DATE}
        name = tool["function"]["name"]
        same = [known for verb, known in verbs.items() if verb in name]
        others = [known for known in EVERY_TOOL if known not in same]
        tools = [tool, *(self.rng.sample(others, self.rng.randint(1, 4)) if self.rng.random() < 0.4 else [])]
        self.rng.shuffle(tools)
        return tools
