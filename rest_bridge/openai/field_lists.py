"""Every field of a chat or a completion, in three lists: honoured, without effect and reported, refused by name.

A field in none of them is unknown: it is reported and has no effect.
"""

from typing import Literal, NamedTuple

from rest_bridge.errors import invalid
from rest_bridge.json_body import Fields

Route = Literal["chat", "completions"]
_BOTH: frozenset[Route] = frozenset({"chat", "completions"})
_CHAT: frozenset[Route] = frozenset({"chat"})
_COMPLETIONS: frozenset[Route] = frozenset({"completions"})


class Field(NamedTuple):
    """One top-level field of a request; of several names the first is OpenAI's or the usual one."""

    names: tuple[str, ...]
    about: str
    """What it does, why it has no effect, or what to do instead."""
    routes: frozenset[Route] = _BOTH


HONOURED = (
    Field(("model",), "name or hub id; absent: the setting `default_model`"),
    Field(
        ("messages",),
        "texts, images (data or http(s) URL), tool calls and results, `reasoning_content`",
        _CHAT,
    ),
    Field(("prompt",), "a text, a list of texts, token ids, or a list of those", _COMPLETIONS),
    Field(("max_completion_tokens", "max_tokens"), "thinking included"),
    Field(("temperature",), "absent: what the checkpoint recommends, else 0"),
    Field(("top_p", "top_k", "min_p"), "absent: what the checkpoint recommends, else off"),
    Field(("presence_penalty", "frequency_penalty"), "from -2 to 2"),
    Field(("repetition_penalty", "repetition_context_size"), "MLX-LM's, over the last 20 tokens unless said"),
    Field(("logit_bias",), "by token id, from -100 to 100"),
    Field(("seed",), "the same noise for the same seed, whatever else is in the batch"),
    Field(("stop",), "up to 16; also across tokens, never part of the text"),
    Field(("n",), "up to 16 choices, which share one prefill"),
    Field(("stream", "stream_options"), "`include_usage`; `include_obfuscation` has no effect"),
    Field(("logprobs", "top_logprobs"), "in the chat's form, up to 20 rivals", _CHAT),
    Field(("logprobs",), "in the completions' form, up to 20 rivals", _COMPLETIONS),
    Field(
        ("echo",),
        "also with token ids; with it `max_tokens` may be 0; with `logprobs` those of the prompt",
        _COMPLETIONS,
    ),
    Field(
        ("tools", "parallel_tool_calls"), "up to 128 functions; `strict` is enforced while decoding", _CHAT
    ),
    Field(
        ("tool_choice",),
        "`auto`, `none`, `required`, a function, `allowed_tools`; enforced while decoding",
        _CHAT,
    ),
    Field(("response_format",), "`text`, `json_object`, `json_schema`; enforced with and without `strict`"),
    Field(("structured_outputs",), "vLLM's: `json`, `regex`, `grammar` (Lark) or `choice`"),
    Field(("guided_json", "guided_regex", "guided_grammar", "guided_choice"), "the same under older names"),
    Field(
        ("reasoning_effort",),
        "for the chat template; `none` is `enable_thinking` false, the rest true",
        _CHAT,
    ),
    Field(("enable_thinking", "chat_template_kwargs"), "for the chat template; these win", _CHAT),
    Field(
        ("max_thinking_tokens", "thinking_budget"), "then the thinking is closed and the answer begins", _CHAT
    ),
    Field(("modalities",), 'only `["text"]`', _CHAT),
    Field(("priority",), "place in the model's queue, from -100 to 100"),
    Field(("keep_alive",), "how long the model stays in memory: seconds or `5m`, 0, -1"),
    Field(("adapter", "draft_model", "prompt_lookup_tokens"), "from a later version on; now 501"),
)

WITHOUT_EFFECT = (
    Field(("user",), "it only reaches the log"),
    Field(("store",), "answers are not stored"),
    Field(("metadata",), "answers are not stored"),
    Field(("service_tier",), "there is one tier; `priority` moves a request ahead"),
    Field(
        ("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
        "no prompts are cached by key",
    ),
    Field(("safety_identifier", "moderation"), "nothing is moderated"),
    Field(("verbosity",), "ask for it in a message", _CHAT),
)

REFUSED = (
    Field(("functions",), "it is deprecated; use `tools`", _CHAT),
    Field(("function_call",), "it is deprecated; use `tool_choice`", _CHAT),
    Field(("audio",), "this server answers with text; POST /v1/audio/speech speaks it", _CHAT),
    Field(("web_search_options",), "this server does not search the web", _CHAT),
    Field(("prediction",), "predicted output has no counterpart here", _CHAT),
    Field(("suffix",), "these models continue a text, they do not fill it in", _COMPLETIONS),
    Field(("best_of",), "ask for `n` choices and choose", _COMPLETIONS),
)

_REASONS = {name: field.about for field in WITHOUT_EFFECT for name in field.names}


def refuse_fields(fields: Fields, route: Route) -> None:
    """Refuses by name what would make the answer wrong. Raises ApiError (400)."""
    for field in REFUSED:
        if route in field.routes:
            for name in field.names:
                value = fields.raw(name)
                if value is not None and not _is_harmless(name, value, fields):
                    raise invalid(f"`{name}` is not supported: {field.about}.", name)


def _is_harmless(name: str, value: object, fields: Fields) -> bool:
    """Whether the answer is what it would be without this field."""
    match name:
        case "suffix":
            return value == ""
        case "best_of":
            return type(value) is int and value == (fields.integer("n") or 1)
    return False


def unread_warnings(fields: Fields) -> list[str]:
    """A sentence for each field that nothing has asked for, at any depth."""
    return [
        f"`{name}` has no effect: {_REASONS[name]}."
        if name in _REASONS
        else f"`{name[:128]}` is unknown and has no effect."
        for name in fields.unread()
    ]
