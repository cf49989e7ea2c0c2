"""The body of /v1/responses as a chat of the contract."""

from dataclasses import dataclass, field

from mlxgui.v1 import inference_pb2
from rest_bridge.errors import JsonObject, invalid
from rest_bridge.json_body import Fields, json_text
from rest_bridge.openai import read_sampling, read_scheduling, read_user
from rest_bridge.openai.formats import read_json_schema
from rest_bridge.openai.reasoning import effort_arguments
from rest_bridge.responses.items import read_input
from rest_bridge.responses.tools import read_tools
from rest_bridge.translated import TranslatedOptions, unread_warnings

_LOGPROBS = "message.output_text.logprobs"

# What would make the answer wrong, and the way out.
_REFUSED = {
    "previous_response_id": "no answer is stored; send the whole conversation as `input`.",
    "conversation": "no conversation is stored; send it as `input`.",
    "background": "an answer comes with its request; stream it.",
    "prompt": "no prompt templates are stored; send `instructions` and `input`.",
}
_WITHOUT_EFFECT = {
    "store": "answers are not stored",
    "truncation": "a conversation that does not fit is refused, never shortened",
    "metadata": "answers are not stored",
    "service_tier": "there is one tier; `priority` moves a request ahead",
    "prompt_cache_key": "prompts are matched by content",
    "prompt_cache_retention": "prompts are matched by content",
    "prompt_cache_options": "prompts are matched by content",
    "prompt_cache_breakpoint": "prompts are matched by content",
    "safety_identifier": "nothing is moderated",
    "moderation": "nothing is moderated",
    "verbosity": "ask for it in a message",
    "summary": "the reasoning itself is in the answer",
    "generate_summary": "the reasoning itself is in the answer",
    "max_tool_calls": "it is for tools that a server calls, and this one calls none",
    "context_management": "a conversation that does not fit is refused, never shortened",
    "include_obfuscation": "nothing is padded",
    "access_programs": "there are none here",
    "background_options": "an answer comes with its request",
    "image": "images are only made smaller where the model needs it",
    "encrypted_content": "the reasoning itself is in the answer",
}

_PARAM_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "json_object": "text.format",
    "json_schema": "text.format",
    "template_arguments": "chat_template_kwargs",
}


@dataclass
class ResponseOptions(TranslatedOptions):
    """What the answer repeats of its request."""

    echo: JsonObject = field(default_factory=dict)
    param_names: dict[str, str] = field(default_factory=lambda: dict(_PARAM_NAMES))


def response_request(body: JsonObject) -> tuple[inference_pb2.ChatRequest, ResponseOptions]:
    """The chat that a body of /v1/responses asks for. Raises ApiError (400, 413)."""
    fields = Fields(body)
    options = ResponseOptions(model=fields.text("model") or "")
    request = inference_pb2.ChatRequest(model=options.model)
    for name, way_out in _REFUSED.items():
        if fields.raw(name) is not False:
            fields.refuse(name, way_out)
    if fields.raw("truncation") not in (None, "auto", "disabled"):
        raise invalid("`truncation` must be auto or disabled.", "truncation")

    sampling = request.sampling
    read_sampling(fields, sampling)
    max_output_tokens = fields.integer("max_output_tokens")
    if max_output_tokens is not None:
        if sampling.HasField("max_tokens") and sampling.max_tokens != max_output_tokens:
            raise invalid("Send `max_output_tokens` or `max_tokens`, not both.", "max_tokens")
        sampling.max_tokens = max_output_tokens
    read_scheduling(fields, request)
    read_user(fields, request, options)
    options.stream = fields.boolean("stream") or False
    stream_options = fields.members("stream_options")
    if stream_options is not None and not options.stream:
        raise invalid("`stream_options` needs `stream` to be true.", "stream_options")
    _read_include(fields, request, options)

    text = fields.members("text")
    text_format = _read_format(None if text is None else text.members("format"), request)
    reasoning = fields.members("reasoning")
    effort = None if reasoning is None else reasoning.text("effort")
    arguments = {} if effort is None else effort_arguments(effort, "reasoning.effort")
    arguments.update(fields.free_object("chat_template_kwargs") or {})
    if arguments:
        request.template_arguments = json_text(arguments, "chat_template_kwargs")

    tools, tool_choice = read_tools(fields, request, options)
    instructions = fields.text("instructions")
    if instructions:
        message = options.add_message(request, inference_pb2.ROLE_SYSTEM, "instructions")
        options.add_part(message, inference_pb2.ContentPart(text=instructions), "instructions")
    read_input(fields, request, options)
    metadata = fields.free_object("metadata") or {}
    json_text(metadata, "metadata")
    options.echo = {
        "background": False,
        "instructions": instructions,
        "max_output_tokens": max_output_tokens,
        "metadata": metadata,
        "parallel_tool_calls": fields.boolean("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "reasoning": {"effort": effort, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": body.get("temperature"),
        "text": {"format": text_format},
        "tool_choice": tool_choice,
        "tools": tools,
        "top_logprobs": sampling.top_logprobs,
        "top_p": body.get("top_p"),
        "truncation": "disabled",
        "user": request.user or None,
    }
    options.warnings.extend(_warnings(fields, body))
    return request, options


def _warnings(fields: Fields, body: JsonObject) -> list[str]:
    told = [
        f"`{name}` has no effect: {_WITHOUT_EFFECT[name]}."
        for name, default in (("metadata", {}), ("truncation", "disabled"))
        if body.get(name) not in (None, default)
    ]
    # What every client sends, and what the answer would be without it.
    if body.get("store") is False:
        fields.raw("store")
    return [*told, *unread_warnings(fields, _WITHOUT_EFFECT)]


def _read_include(fields: Fields, request: inference_pb2.ChatRequest, options: ResponseOptions) -> None:
    included = [str(name) for name in fields.array("include") or []]
    top_logprobs = fields.integer("top_logprobs")
    if _LOGPROBS in included or top_logprobs:
        request.sampling.top_logprobs = top_logprobs or 0
        options.logprobs = True
    options.warnings.extend(
        f"`include` of {name[:64]!r} has no effect: this server has none."
        for name in included
        if name != _LOGPROBS
    )


def _read_format(fields: Fields | None, request: inference_pb2.ChatRequest) -> JsonObject:
    """Reads what the text has to be; the same as the answer repeats it."""
    kind = "text" if fields is None else fields.required_text("type")
    if fields is not None and kind == "json_schema":
        read_json_schema(fields, request.sampling)
        return {"type": kind, **{key: fields.raw(key) for key in ("name", "description", "schema", "strict")}}
    if fields is not None and kind not in ("text", "json_object"):
        name = fields.name("type")
        raise invalid(f"`{name}` is {kind[:32]!r}; it must be text, json_object or json_schema.", name)
    if kind == "json_object":
        request.sampling.json_object = True
    return {"type": kind}
