"""The bodies of /v1/messages and /v1/messages/count_tokens as requests of the contract."""

from dataclasses import dataclass, field

from mlxgui.v1 import inference_pb2
from rest_bridge.errors import ApiError, JsonObject, invalid
from rest_bridge.json_body import Fields, json_text, text_value
from rest_bridge.messages.content import read_messages, read_system
from rest_bridge.openai import read_sampling, read_scheduling
from rest_bridge.openai.reasoning import effort_arguments
from rest_bridge.translated import TranslatedOptions, unread_warnings

# What would make the answer wrong, and the way out.
_REFUSED = {
    "mcp_servers": "this server calls no tools; call them and send `tool_result` blocks.",
    "container": "this server runs no code.",
}
_WITHOUT_EFFECT = {
    "metadata": "it would only reach the log",
    "service_tier": "there is one tier; `priority` moves a request ahead",
    "speed": "there is one speed",
    "inference_geo": "the model runs here",
    "user_profile_id": "the model runs here",
    "workspace_id": "the model runs here",
    "billing_policy": "nothing is billed",
    "fallback_credit_token": "nothing is billed",
    "fallbacks": "no other model answers than the one asked",
    "cache_control": "prompts are matched by content",
    "diagnostics": "prompts are matched by content",
    "context_management": "a conversation that does not fit is refused, never shortened",
    "citations": "this server cites nothing",
    "eager_input_streaming": "the input of a tool is sent when it is whole",
    "defer_loading": "a model is told of every tool",
    "input_examples": "say them in `description`",
    "allowed_callers": "this server runs no code",
    "display": "the thinking is always in the answer",
    "transformations": "images are only made smaller where the model needs it",
}

_PARAM_NAMES = {
    "stop": "stop_sequences",
    "max_thinking_tokens": "thinking.budget_tokens",
    "json_schema": "output_config.format",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "template_arguments": "chat_template_kwargs",
}
_MODES = {
    "auto": inference_pb2.ToolChoice.MODE_AUTO,
    "any": inference_pb2.ToolChoice.MODE_REQUIRED,
    "none": inference_pb2.ToolChoice.MODE_NONE,
}


@dataclass
class MessageOptions(TranslatedOptions):
    """What a request for a message says besides the chat."""

    max_tokens: int = 0
    schema_key: str = "input_schema"
    param_names: dict[str, str] = field(default_factory=lambda: dict(_PARAM_NAMES))


def message_request(body: JsonObject) -> tuple[inference_pb2.ChatRequest, MessageOptions]:
    """The chat that a body of /v1/messages asks for. Raises ApiError (400, 413)."""
    fields = Fields(body)
    options = MessageOptions(model=fields.text("model") or "")
    request = inference_pb2.ChatRequest(model=options.model)
    sampling = request.sampling
    read_sampling(fields, sampling)
    if not sampling.HasField("max_tokens"):
        fields.missing("max_tokens")
    options.max_tokens = sampling.max_tokens
    for index, stop in enumerate(fields.array("stop_sequences") or []):
        sampling.stop.append(text_value(stop, f"stop_sequences[{index}]"))
    read_scheduling(fields, request)
    options.stream = fields.boolean("stream") or False
    fields.refuse("compaction", "this server shortens no conversation; ask for a summary in a message.")
    _read_prompt(fields, request, options)
    options.warnings.extend(unread_warnings(fields, _WITHOUT_EFFECT))
    return request, options


def token_count_request(body: JsonObject) -> tuple[inference_pb2.CountTokensRequest, MessageOptions]:
    """The count that a body of /v1/messages/count_tokens asks for. Raises ApiError (400, 413)."""
    fields = Fields(body)
    options = MessageOptions(model=fields.text("model") or "")
    request = inference_pb2.CountTokensRequest(model=options.model)
    # Clients send the body of the message that they mean to ask for.
    for key in ("max_tokens", "stop_sequences", "stream", "temperature", "top_k", "top_p", "compaction"):
        fields.raw(key)
    _read_prompt(fields, request.chat, options)
    options.warnings.extend(unread_warnings(fields, _WITHOUT_EFFECT))
    return request, options


def _read_prompt(fields: Fields, request: inference_pb2.ChatRequest, options: MessageOptions) -> None:
    """Reads what reaches the prompt, and how the answer has to look."""
    for name, way_out in _REFUSED.items():
        if fields.raw(name) != []:
            fields.refuse(name, way_out)
    if fields.raw("thread") is not None:
        raise ApiError(
            "THREAD_UNSUPPORTED_REQUEST",
            "`thread` is not supported: no conversation is stored; send the whole of it as `messages`.",
            "thread",
        )
    arguments = _read_thinking(fields, request)
    config = fields.members("output_config")
    if config is not None:
        effort = config.text("effort")
        if effort is not None:
            arguments = {**effort_arguments(effort, "output_config.effort"), **arguments}
        wanted = config.members("format")
        if wanted is not None:
            _read_format(wanted, request)
    # What the field was called before; clients of that time send it still.
    older = fields.members("output_format")
    if older is not None:
        if request.sampling.HasField("json_schema"):
            raise invalid("Send `output_config.format` or `output_format`, not both.", "output_format")
        _read_format(older, request)
        options.param_names["json_schema"] = "output_format"
    arguments.update(fields.free_object("chat_template_kwargs") or {})
    if arguments:
        request.template_arguments = json_text(arguments, "chat_template_kwargs")
    _read_tools(fields, request, options)
    read_system(fields, request, options)
    read_messages(fields, request, options)


def _read_thinking(fields: Fields, request: inference_pb2.ChatRequest) -> JsonObject:
    """Sets the budget; the variables of the chat template. Without the field the template decides."""
    thinking = fields.members("thinking")
    if thinking is None:
        return {}
    match thinking.required_text("type"):
        case "enabled":
            budget = thinking.integer("budget_tokens")
            if budget is None:
                thinking.missing("budget_tokens")
            request.sampling.max_thinking_tokens = budget
            return {"enable_thinking": True}
        case "adaptive":
            return {"enable_thinking": True}
        case "disabled":
            return {"enable_thinking": False}
        case other:
            name = thinking.name("type")
            raise invalid(f"`{name}` is {other[:32]!r}; it must be enabled, adaptive or disabled.", name)


def _read_format(fields: Fields, request: inference_pb2.ChatRequest) -> None:
    if fields.required_text("type") != "json_schema":
        raise invalid(f"`{fields.name('type')}` must be json_schema.", fields.name("type"))
    schema = fields.free_object("schema")
    if schema is None:
        fields.missing("schema")
    request.sampling.json_schema = json_text(schema, fields.name("schema"))


def _read_tools(fields: Fields, request: inference_pb2.ChatRequest, options: MessageOptions) -> None:
    for index, tool in enumerate(fields.array("tools") or []):
        member = fields.child(tool, f"tools[{index}]")
        kind = member.text("type") or "custom"
        if kind != "custom":
            name = member.name("type")
            raise invalid(
                f"`{name}` is {kind[:32]!r}: this server has no tools of its own; "
                "send the tool with its `input_schema`.",
                name,
            )
        schema = member.free_object("input_schema")
        if schema is None:
            member.missing("input_schema")
        request.tools.add(
            name=member.required_text("name"),
            description=member.text("description") or "",
            parameters_schema=json_text(schema, member.name("input_schema")),
            strict=member.boolean("strict") or False,
        )
        options.tools.append(member.path)
    choice = fields.members("tool_choice")
    if choice is None:
        return
    kind = choice.required_text("type")
    if kind == "tool":
        wanted = choice.required_text("name")
        if all(tool.name != wanted for tool in request.tools):
            name = choice.name("name")
            raise invalid(f"`{name}` is {wanted[:64]!r}, which is none of the `tools`.", name)
        request.tool_choice.function = wanted
    elif kind in _MODES:
        request.tool_choice.mode = _MODES[kind]
    else:
        name = choice.name("type")
        raise invalid(f"`{name}` is {kind[:32]!r}; it must be auto, any, tool or none.", name)
    alone = choice.boolean("disable_parallel_tool_use")
    if alone is not None:
        request.parallel_tool_calls = not alone
