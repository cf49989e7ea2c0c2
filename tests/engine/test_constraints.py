"""Replies of a given form: what a random model says follows it, others are not touched, and bad forms are refused."""

import json
import re
import time
from typing import Any

import jsonschema_rs
import pytest

from mlxgui_grpc.engine import frames
from mlxgui_grpc.engine.backends.text import TextModel, load_text_model
from mlxgui_grpc.engine.constraints import MAX_TEXT_BYTES, Grammars
from mlxgui_grpc.engine.reply_format import Opening
from mlxgui_grpc.errors import InvalidRequestError
from tests.conftest import TinyModels
from tests.support_engine import Engine

PROMPTS = [f"Tell me {'more ' * n}about the {n} cats" for n in range(7)]
THINK, END_THINK, LINE_BREAK = 1018, 1019, 201


@pytest.fixture(scope="module")
def tiny(tiny_models: TinyModels) -> TextModel:
    return load_text_model(tiny_models.long)


def closed(properties: dict[str, Any], **keywords: Any) -> dict[str, Any]:
    """An object with all of these and nothing else."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        **keywords,
    }


WORD = {"type": "string", "maxLength": 6}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
LIST = {"$defs": {"n": closed({"v": DIGIT, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]}})}}
SCHEMAS: list[Any] = [
    closed({"a": DIGIT}),
    closed({"a": DIGIT, "b": WORD}),
    closed({"a": {"type": "boolean"}, "b": {"type": "null"}}),
    closed({"a": {"enum": ["x", "y", 3, None, [1]]}}),
    closed({"a": {"const": {"deep": [1, 2]}}}),
    closed({"a": {"type": "array", "items": DIGIT, "minItems": 2, "maxItems": 4}}),
    closed({"a": {"type": "array", "prefixItems": [DIGIT, WORD], "items": False, "minItems": 2}}),
    closed({"a": closed({"b": closed({"c": DIGIT})})}),
    closed({"a": {"anyOf": [DIGIT, WORD]}}),
    closed({"a": {"type": ["integer", "null"], "minimum": 100, "maximum": 120}}),
    closed({"a": {"type": "string", "pattern": "^[a-f]{2,4}-[0-9]{3}$"}}),
    closed({"a": {"type": "string", "format": "date"}}),
    closed({"a": {"type": "string", "format": "uuid"}}),
    closed({"a": {"type": "string", "format": "ipv4"}}),
    closed({"a": {"type": "string", "minLength": 3, "maxLength": 5}}),
    closed({"a": {"type": "number", "minimum": 0.5, "maximum": 1.5, "multipleOf": 0.25}}),
    closed({"a": {"type": "integer", "exclusiveMinimum": 5, "exclusiveMaximum": 8}}),
    closed({"a": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 6}]}}),
    closed({"a": {"$ref": "#/$defs/n"}}, **LIST),
    closed({"größe": DIGIT, "名前": WORD, 'quote"': DIGIT}),
    {"type": "array", "items": WORD, "maxItems": 3},
    {"type": "string", "maxLength": 8},
    {"type": "boolean"},
    {"enum": ["only"]},
    {"type": "object", "properties": {"a": DIGIT, "b": WORD}, "additionalProperties": False},
    {"type": "object", "additionalProperties": DIGIT, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "patternProperties": {"^k[0-9]$": DIGIT}, "additionalProperties": False},
]
REGEXES = [
    "[a-z]{3,10}",
    "(yes|no|perhaps)",
    r"\d{3}-\d{4}",
    "(?i:hello),? world[.!]{1,3}",
    "[あ-ん]{2,5}",
    "([a-zé]{1,20} ){2}end",
    "a*b+c?",
    r"[^\x00-\x7F]{2}",
]
GRAMMARS = {
    'start: "(" item ("," item)* ")"\nitem: /[a-z]{1,4}/': r"\([a-z]{1,4}(,[a-z]{1,4})*\)",
    'start: a\na: "x" a "y" | "z"': r"x*zy*",
    'start: "<b>" /[0-9]{2}/ "</b>"': r"<b>\d\d</b>",
    "start: WORD\nWORD: /[a-c]+/ & /.{4}/": r"[a-c]{4}",
    'start: "{" %json {"type": "boolean"} "}"': r"\{(true|false)\}",
}


def fits(kind: str, text: str, reply: str) -> bool:
    if kind == "regex":
        return re.fullmatch(text, reply) is not None
    if kind == "grammar":
        return re.fullmatch(GRAMMARS[text], reply) is not None
    if kind == "json_object":
        return isinstance(json.loads(reply), dict)
    return bool(
        jsonschema_rs.validator_for(json.loads(text), validate_formats=True).is_valid(json.loads(reply))
    )


FORMS = [
    *(frames.Constraint("json_schema", json.dumps(schema)) for schema in SCHEMAS),
    *(frames.Constraint("regex", text) for text in REGEXES),
    *(frames.Constraint("grammar", text) for text in GRAMMARS),
    frames.Constraint("json_object"),
]


def sampling(constraint: frames.Constraint | None, seed: int, **params: Any) -> frames.Sampling:
    return frames.Sampling(
        **{"max_tokens": 300, "temperature": 1.0, "seed": seed, "constraint": constraint, **params}
    )


def test_a_random_model_says_what_it_may_and_the_others_what_they_would_have_said(tiny: TextModel) -> None:
    """Every form, four rows without one between them, joins and leaves all the way."""
    forms = [(form, 1) for form in FORMS]
    free = {1000 + i: sampling(None, i, max_tokens=60, top_p=0.9) for i in range(4)}
    engine = Engine(tiny, max_rows=12)
    rows = [
        engine.guided(key, PROMPTS[key % 7], sampling(form, seed)) for key, (form, seed) in enumerate(forms)
    ]
    rows[10:10] = [engine.row(key, PROMPTS[key % 7], given) for key, given in free.items()]
    engine.scheduler.submit(rows)
    engine.run([row.key for row in rows])
    assert not engine.failed
    ended = 0
    for key, (form, _) in enumerate(forms):
        reply = engine.replies[key]
        if reply.finish == "stop":
            ended += 1
            assert fits(form.kind, form.text, reply.text), (form, reply.text)
        else:  # An object without a form of its own goes on for ever when nobody means to end it.
            assert form.kind == "json_object" or '"additionalProperties": {' in form.text, (form, reply.text)
    assert ended > len(forms) * 0.9
    alone = Engine(tiny)
    alone.scheduler.submit([alone.row(key, PROMPTS[key % 7], given) for key, given in free.items()])
    alone.run(free)
    assert alone.replies == {key: engine.replies[key] for key in free}


def test_rows_of_a_given_form_survive_pauses_and_preemption(tiny: TextModel) -> None:
    """The same texts, token for token, whatever happens between two tokens."""
    form = frames.Constraint("regex", "([a-z]{1,8} ){40}end")

    def converse(disturb: bool) -> Engine:
        engine = Engine(tiny)
        engine.scheduler.submit(
            [engine.guided(key, PROMPTS[key], sampling(form, key, top_logprobs=1)) for key in range(4)]
        )

        def each(turn: int) -> None:
            if not disturb:
                return
            if turn % 9 == 3:
                engine.scheduler.pause(turn % 4)
            if turn % 9 == 6:
                for key in range(4):
                    engine.scheduler.resume(key)
            if turn % 20 == 10:
                engine.scheduler.limit(8, 1)
            if turn % 20 == 12:
                engine.scheduler.limit(8, 0)

        engine.run(range(4), each)
        return engine

    quiet, disturbed = converse(False), converse(True)
    assert disturbed.scheduler.preempted_count > 2
    for key, reply in quiet.replies.items():
        assert fits("regex", form.text, reply.text)
        other = disturbed.replies[key]
        assert (other.text, other.token_count, other.finish) == (reply.text, reply.token_count, "stop")
        assert [entry.token for entry in other.logprobs] == [entry.token for entry in reply.logprobs]
        assert len(reply.logprobs) == reply.token_count


def test_penalties_and_bias_cannot_leave_the_form(tiny: TextModel) -> None:
    engine = Engine(tiny)
    form = frames.Constraint("regex", "[ab]{6}")
    given = sampling(form, 3, logit_bias={500: 100.0}, frequency_penalty=2.0, top_k=5, min_p=0.05)
    engine.scheduler.submit([engine.guided(0, PROMPTS[1], given)])
    engine.run([0])
    assert fits("regex", form.text, engine.replies[0].text)


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("json_schema", "{", "is not a JSON Schema"),
        ("json_schema", '{"type": "strin"}', "strin"),
        ("json_schema", '{"not": {"type": "string"}}', "'not'"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "'uniqueItems'"),
        ("json_schema", '{"if": {}, "then": {}, "x-guidance": {"lenient": true}}', "'if'"),
        ("json_schema", '{"oneOf": [{"type": "object"}, {"required": ["a"]}]}', "'oneOf'"),
        ("json_schema", '{"$ref": "https://elsewhere/schema"}', "elsewhere"),
        (
            "json_schema",
            '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}',
            "nothing can satisfy it",
        ),
        ("json_schema", '{"items": ' * 1000 + "{}" + "}" * 1000, "127 levels"),
        ("json_schema", '{"allOf": [{"type": "string"}, {"type": "null"}]}', "nothing can satisfy it"),
        ("json_schema", json.dumps({"enum": ["x" * 100] * 2000}), str(MAX_TEXT_BYTES)),
        ("regex", "[a", "unclosed"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "(" * 3000 + "a" + ")" * 3000, "nested parentheses"),
        ("grammar", "start: nowhere", "nowhere"),
        ("grammar", "start: start", "nothing can satisfy it"),
        ("grammar", 'start: x{100000}\nx: "a"{1000}', "too complex"),
        ("grammar", "start: A\nA: /(.*a.{20})/ & /(.*b.{21})/ & /(.*c.{22})/ & ~/(.*d.{18})/", "too complex"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_form_is_refused_by_name(tiny: TextModel, kind: Any, text: str, says: str) -> None:
    tokens = tiny.tokens
    grammars = Grammars(tokens.backend, tokens.vocabulary_size, tokens.end_tokens)
    started = time.monotonic()
    with pytest.raises(InvalidRequestError) as caught:
        grammars.matcher(frames.Constraint(kind, text))
    assert caught.value.field == f"sampling.{kind}" and says in caught.value.message
    assert len(caught.value.message) < 1024 and "non-verbose" not in caught.value.message
    assert time.monotonic() - started < 30


def test_a_form_that_gets_too_complex_on_the_way_ends_its_row_alone(tiny: TextModel) -> None:
    """Harmless for a hundred characters, then with more ways on than are looked at in a step."""
    form = frames.Constraint("grammar", 'start: /[ab]{100}/ x{60000} "c"\nx: "b"{1000}')
    engine = Engine(tiny)
    engine.scheduler.submit(
        [
            engine.guided(0, PROMPTS[1], sampling(form, 1)),
            engine.row(1, PROMPTS[2], sampling(None, 2, max_tokens=150)),
            engine.guided(2, PROMPTS[3], sampling(frames.Constraint("regex", "[a-z]{150}"), 2)),
        ]
    )
    engine.run(range(3))
    assert engine.failed[0].field == "sampling.grammar" and "too complex" in engine.failed[0].message
    assert engine.failed[0].reason == "INVALID_PARAMETER"
    assert engine.replies[1].finish == "length" and len(engine.replies[2].text) == 150


def test_whitespace_cannot_fill_a_reply(tiny: TextModel) -> None:
    """A model that wants nothing but line breaks and spaces gets one of them between two parts."""
    engine = Engine(tiny)
    spaces = [t for t in range(1000) if tiny.tokens.tokenizer.decode([t]).isspace()]
    given = frames.Sampling(
        max_tokens=300,
        constraint=frames.Constraint(
            "json_schema", json.dumps(closed({"a": DIGIT, "b": {"type": "boolean"}}))
        ),
        logit_bias=dict.fromkeys(spaces, 100.0),
    )
    engine.scheduler.submit([engine.guided(0, PROMPTS[1], given)])
    engine.run([0])
    assert engine.replies[0].finish == "stop" and json.loads(engine.replies[0].text).keys() == {"a", "b"}


JSON = frames.Constraint("json_schema", json.dumps(closed({"a": DIGIT})))


@pytest.mark.parametrize("budget", [0, 1, 7])
@pytest.mark.parametrize("constraint", [None, JSON], ids=["free", "form"])
@pytest.mark.parametrize("is_open", [True, False], ids=["opened", "may-think"])
def test_no_more_is_thought_than_allowed_and_the_form_comes_after_it(
    tiny: TextModel, budget: int, constraint: frames.Constraint | None, is_open: bool
) -> None:
    """A model that never ends a thought by itself and, where the prompt did not, begins with one."""
    engine = Engine(tiny)
    given = sampling(
        constraint,
        budget,
        max_tokens=60,
        max_thinking_tokens=budget,
        top_logprobs=0,
        logit_bias={END_THINK: -100.0},
    )
    opening = Opening(starts_in_thinking=is_open, may_think=True)
    row = engine.guided(0, PROMPTS[1], given, opening=opening)
    engine.scheduler.submit([row])
    if not is_open:  # It wants to begin with a thought: nothing else is so likely, wherever it may come.
        row.sampling.temperature = 0.0
        given.logit_bias[THINK] = 100.0
        row.sampling = engine.guided(0, row.prompt, given, opening=opening).sampling
    engine.run([0])
    tokens = [entry.token for entry in engine.replies[0].logprobs]
    if not is_open and budget == 0:
        assert THINK not in tokens and END_THINK not in tokens
        answer = engine.replies[0].text
    else:
        begin = 0 if is_open else 1
        assert is_open or tokens[0] == THINK
        assert tokens.index(END_THINK) == begin + budget
        answer = engine.replies[0].text.partition("</think>")[2]
    if constraint:
        assert engine.replies[0].finish == "stop" and fits("json_schema", constraint.text, answer)


def test_a_thought_without_a_limit_cannot_end_the_reply(tiny: TextModel) -> None:
    """With a form to come, an end token inside the thinking is not drawn; the end of the thinking is."""
    engine = Engine(tiny)
    given = sampling(JSON, 1, logit_bias={2: 100.0, END_THINK: 50.0})
    row = engine.guided(0, PROMPTS[1], given, opening=Opening(starts_in_thinking=True, may_think=True))
    engine.scheduler.submit([row])
    engine.run([0])
    text = engine.replies[0].text.removeprefix("</think>")
    assert engine.replies[0].text.startswith("</think>") and fits("json_schema", JSON.text, text)


def test_a_reply_may_answer_at_once_where_it_may_think(tiny: TextModel) -> None:
    engine = Engine(tiny)
    given = sampling(JSON, 1, logit_bias={THINK: -100.0})
    engine.scheduler.submit([engine.guided(0, PROMPTS[1], given, opening=Opening(may_think=True))])
    engine.run([0])
    assert fits("json_schema", JSON.text, engine.replies[0].text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("start: a b\na[capture]: /[a-z]{3}/\nb[max_tokens=3]: /.*/", "(?s)[a-z]{3}.*"),
        ('start: a\na[stop="x"]: /[a-w]*/', "[a-w]*x?"),
        ('start: a\na[suffix="x"]: /[a-w]{0,5}/', "[a-w]*x?"),
    ],
)
def test_a_grammar_that_cannot_go_back_is_followed_all_the_same(
    tiny: TextModel, text: str, says: str
) -> None:
    """Twice, for the second row's matcher is a copy of what was kept."""
    engine = Engine(tiny)
    form = frames.Constraint("grammar", text)
    engine.scheduler.submit([engine.guided(key, PROMPTS[key], sampling(form, key)) for key in range(2)])
    engine.run(range(2))
    assert not engine.failed
    assert all(re.fullmatch(says, engine.replies[key].text) for key in range(2)), engine.replies
