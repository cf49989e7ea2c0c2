"""OpenAI's requests and answers as `mlxgui.v1` messages, and back. Pure: no Flask, no I/O."""

import binascii
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlxgui.v1 import common_pb2, inference_pb2
from rest_bridge import sse
from rest_bridge.errors import ApiError, JsonObject, invalid, too_large
from rest_bridge.json_body import (
    INT64_LIMIT,
    Fields,
    integer_value,
    number_value,
    text_value,
    type_name,
)
from rest_bridge.keep_alive import read_keep_alive

MIB = 1024 * 1024
IMAGE_LIMIT_BYTES = 20 * MIB
IMAGES_LIMIT_BYTES = 48 * MIB

# OpenAI's own; they change nothing in the answer here, so they are accepted and reported.
_WITHOUT_EFFECT = (
    "store",
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "metadata",
    "verbosity",
    "reasoning_effort",
)

_ROLES = {
    "system": inference_pb2.ROLE_SYSTEM,
    "developer": inference_pb2.ROLE_DEVELOPER,
    "user": inference_pb2.ROLE_USER,
    "assistant": inference_pb2.ROLE_ASSISTANT,
    "tool": inference_pb2.ROLE_TOOL,
}
_ROLE_NAMES = {number: name for name, number in _ROLES.items()}

_DETAILS = {
    "auto": inference_pb2.Image.DETAIL_AUTO,
    "low": inference_pb2.Image.DETAIL_LOW,
    "high": inference_pb2.Image.DETAIL_HIGH,
}

_TOOL_MODES = {
    "auto": inference_pb2.ToolChoice.MODE_AUTO,
    "none": inference_pb2.ToolChoice.MODE_NONE,
    "required": inference_pb2.ToolChoice.MODE_REQUIRED,
}

_FINISH_REASONS: Mapping[int, str | None] = {
    common_pb2.FINISH_REASON_UNSPECIFIED: None,
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}

# The constraint fields of SamplingParams all come from response_format.
_PARAM_NAMES = {
    "json_object": "response_format",
    "json_schema": "response_format",
    "prompts": "prompt",
    "inputs": "input",
    "encoding": "encoding_format",
    "template_arguments": "chat_template_kwargs",
}

_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII)


@dataclass
class Options:
    """What a request says about the answer's form, apart from what the model is asked."""

    model: str
    stream: bool = False
    include_usage: bool = False
    choice_count: int = 1
    logprobs: bool = False
    single_input: bool = False
    """One prompt, which the caller need not have written as a list."""
    warnings: list[str] = field(default_factory=list)
    param_names: dict[str, str] = field(default_factory=lambda: dict(_PARAM_NAMES))
    """What the caller called the fields that have another name in the contract."""

    def rename(self, error: ApiError) -> None:
        """Makes an error of the model server speak of the caller's fields, not of the contract's."""
        head = re.match(r"(?:request\.)?(?:sampling\.)?(\w+)", error.param or "")
        name = None if head is None else self.param_names.get(head[1])
        if head is not None and name is not None:
            error.message = re.sub(rf"\b{head[1]}\b", name, error.message)
        error.param = self.param(error.param)

    def param(self, path: str | None) -> str | None:
        """The caller's name for the field at `path` of the request message."""
        if path is None:
            return None
        path = path.removeprefix("request.").removeprefix("sampling.")
        head = re.match(r"\w+", path)
        if head is None:
            return path
        name = self.param_names.get(head[0])
        if name == "response_format":
            return name
        path = (name or head[0]) + path[head.end() :]
        if self.single_input:
            path = path.removesuffix("[0]")
        if path.startswith("tools["):
            path = re.sub(r"\]\.parameters_schema$", "].function.parameters", path)
            path = re.sub(r"\]\.(name|description|strict)$", r"].function.\1", path)
        return path


# --- Requests ------------------------------------------------------------------------------------


def chat_request(body: JsonObject) -> tuple[inference_pb2.ChatRequest, Options]:
    """The chat that a body of /v1/chat/completions asks for. Raises ApiError (400, 413)."""
    fields = Fields(body)
    options = Options(model=fields.text("model") or "")
    request = inference_pb2.ChatRequest(model=options.model)
    _read_common(fields, request, options)

    fields.refuse("audio", "this server answers with text; POST /v1/audio/speech speaks it.")
    fields.refuse("web_search_options", "this server does not search the web.")
    fields.refuse("functions", "it is deprecated; use `tools`.")
    fields.refuse("function_call", "it is deprecated; use `tool_choice`.")
    fields.refuse("prediction", "predicted output has no counterpart here.")
    modalities = fields.array("modalities")
    if modalities is not None and modalities != ["text"]:
        raise invalid('`modalities` can only be ["text"].', "modalities")

    if fields.boolean("logprobs"):
        request.sampling.top_logprobs = fields.integer("top_logprobs") or 0
        options.logprobs = True
    elif fields.integer("top_logprobs"):
        raise invalid("`top_logprobs` needs `logprobs` to be true.", "top_logprobs")

    _read_response_format(fields.members("response_format"), request.sampling)
    _read_tools(fields, request)
    template_arguments = fields.free_object("chat_template_kwargs")
    if template_arguments is not None:
        request.template_arguments = _json_text(template_arguments, "chat_template_kwargs")

    messages = fields.array("messages")
    if messages is None:
        fields.missing("messages")
    if not messages:
        raise invalid("`messages` is empty; send at least one message.", "messages")
    images = _ImageBudget()
    for index, message in enumerate(messages):
        request.messages.append(_message(fields.child(message, f"messages[{index}]"), images))

    _report_unread(fields, options)
    return request, options


def completion_request(body: JsonObject) -> tuple[inference_pb2.GenerateRequest, Options]:
    """The continuation that a body of /v1/completions asks for. Raises ApiError (400)."""
    fields = Fields(body)
    options = Options(model=fields.text("model") or "")
    request = inference_pb2.GenerateRequest(model=options.model)
    _read_common(fields, request, options)

    suffix = fields.text("suffix")
    if suffix:
        raise invalid(
            "`suffix` is not supported: these models continue a text, they do not fill it in.", "suffix"
        )
    best_of = fields.integer("best_of")
    if best_of is not None and (best_of != 1 or options.choice_count != 1):
        raise invalid("`best_of` is not supported: ask for `n` choices and choose.", "best_of")
    request.echo = fields.boolean("echo") or False
    logprobs = fields.integer("logprobs")
    if logprobs is not None:
        request.sampling.top_logprobs = logprobs
        options.logprobs = True
        options.param_names["top_logprobs"] = "logprobs"

    prompts = _prompts(fields, "prompt")
    options.single_input = len(prompts) == 1
    request.prompts.extend(prompts)
    _report_unread(fields, options)
    return request, options


def embedding_request(body: JsonObject) -> tuple[inference_pb2.EmbedRequest, Options]:
    """The vectors that a body of /v1/embeddings asks for. Raises ApiError (400)."""
    fields = Fields(body)
    options = Options(model=fields.text("model") or "")
    request = inference_pb2.EmbedRequest(model=options.model, user=fields.text("user") or "")
    request.inputs.extend(_prompts(fields, "input"))
    dimensions = fields.integer("dimensions")
    if dimensions is not None:
        request.dimensions = dimensions
    match fields.text("encoding_format"):
        case None | "float":
            request.encoding = inference_pb2.EMBEDDING_ENCODING_FLOATS
        case "base64":
            request.encoding = inference_pb2.EMBEDDING_ENCODING_FLOAT32_LE
        case _:
            raise invalid("`encoding_format` must be `float` or `base64`.", "encoding_format")
    read_scheduling(fields, request)
    _report_unread(fields, options)
    return request, options


def read_sampling(fields: Fields, sampling: common_pb2.SamplingParams) -> None:
    """The sampling fields that OpenAI's routes and the native one share. Ranges are the server's to check."""
    for key in (
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ):
        number = fields.number(key)
        if number is not None:
            setattr(sampling, key, number)
    for key in (
        "max_tokens",
        "top_k",
        "repetition_context_size",
        "max_thinking_tokens",
        "prompt_lookup_tokens",
    ):
        integer = fields.integer(key)
        if integer is not None:
            setattr(sampling, key, integer)
    for key in ("adapter", "draft_model"):
        text = fields.text(key)
        if text is not None:
            setattr(sampling, key, text)
    seed = fields.integer("seed", INT64_LIMIT)
    if seed is not None:
        sampling.seed = seed
    match fields.raw("stop"):
        case None:
            pass
        case str() as stop:
            sampling.stop.append(text_value(stop, "stop"))
        case list() as stops:
            sampling.stop.extend(text_value(stop, f"stop[{index}]") for index, stop in enumerate(stops))
        case other:
            raise invalid(f"`stop` must be a string or an array of strings, not {type_name(other)}.", "stop")
    bias = fields.raw("logit_bias")
    if bias is not None:
        _read_logit_bias(bias, sampling)


def read_scheduling(
    fields: Fields,
    request: inference_pb2.ChatRequest | inference_pb2.GenerateRequest | inference_pb2.EmbedRequest,
) -> None:
    """Where the request goes in the queue, and how long its model stays after it."""
    priority = fields.integer("priority")
    if priority is not None:
        request.priority = priority
    keep_alive = fields.raw("keep_alive")
    if keep_alive is not None:
        request.keep_alive.CopyFrom(read_keep_alive(keep_alive))


def _read_common(
    fields: Fields, request: inference_pb2.ChatRequest | inference_pb2.GenerateRequest, options: Options
) -> None:
    sampling = request.sampling
    read_sampling(fields, sampling)
    longer_name = fields.integer("max_completion_tokens")
    if longer_name is not None:
        if sampling.HasField("max_tokens") and sampling.max_tokens != longer_name:
            raise invalid("Send `max_completion_tokens` or `max_tokens`, not both.", "max_tokens")
        sampling.max_tokens = longer_name
        options.param_names["max_tokens"] = "max_completion_tokens"
    n = fields.integer("n")
    if n is not None:
        sampling.n = n
        options.choice_count = n
    read_scheduling(fields, request)
    user = fields.text("user")
    if user:
        request.user = user
        options.warnings.append("`user` only reaches the log.")
    options.stream = fields.boolean("stream") or False
    stream_options = fields.members("stream_options")
    if stream_options is not None:
        if not options.stream:
            raise invalid("`stream_options` needs `stream` to be true.", "stream_options")
        options.include_usage = stream_options.boolean("include_usage") or False
        stream_options.boolean("include_obfuscation")


def _report_unread(fields: Fields, options: Options) -> None:
    for name in fields.unread():
        known = "" if name in _WITHOUT_EFFECT else " is unknown and"
        options.warnings.append(f"`{name[:128]}`{known} has no effect.")


def _read_logit_bias(bias: object, sampling: common_pb2.SamplingParams) -> None:
    if not isinstance(bias, dict):
        raise invalid(f"`logit_bias` must be an object, not {type_name(bias)}.", "logit_bias")
    for token, value in bias.items():
        # isdecimal() alone also takes other scripts' digits.
        if not (token.isascii() and token.isdecimal() and len(token) <= 10 and int(token) < 2**31):
            raise invalid(f"`logit_bias` has the key {token[:32]!r}, which is no token id.", "logit_bias")
        sampling.logit_bias[int(token)] = number_value(value, f"logit_bias.{token}")


def _read_response_format(fields: Fields | None, sampling: common_pb2.SamplingParams) -> None:
    if fields is None:
        return
    match fields.required_text("type"):
        case "text":
            pass
        case "json_object":
            sampling.json_object = True
        case "json_schema":
            schema = fields.members("json_schema")
            if schema is None:
                fields.missing("json_schema")
            wanted = schema.free_object("schema")
            if wanted is None:
                schema.missing("schema")
            sampling.json_schema = _json_text(wanted, schema.name("schema"))
            # The answer keeps to the schema in any case; its name and description are the caller's own.
            for key in ("name", "description", "strict"):
                schema.raw(key)
        case other:
            raise invalid(
                f"`response_format.type` is {other[:32]!r}; it must be text, json_object or json_schema.",
                "response_format.type",
            )


def _read_tools(fields: Fields, request: inference_pb2.ChatRequest) -> None:
    for index, tool in enumerate(fields.array("tools") or []):
        member = fields.child(tool, f"tools[{index}]")
        if member.text("type") not in (None, "function"):
            raise invalid(f"`{member.name('type')}` must be `function`.", member.name("type"))
        function = member.members("function")
        if function is None:
            member.missing("function")
        parameters = function.free_object("parameters")
        request.tools.add(
            name=function.required_text("name"),
            description=function.text("description") or "",
            parameters_schema=""
            if parameters is None
            else _json_text(parameters, function.name("parameters")),
            strict=function.boolean("strict") or False,
        )
    match fields.raw("tool_choice"):
        case None:
            pass
        case str() as mode if mode in _TOOL_MODES:
            request.tool_choice.mode = _TOOL_MODES[mode]
        case dict() as choice if choice.get("type") == "function":
            member = fields.child(choice, "tool_choice")
            member.raw("type")
            function = member.members("function")
            if function is None:
                raise invalid("`tool_choice.function` is missing.", "tool_choice")
            request.tool_choice.function = function.required_text("name")
        case _:
            raise invalid(
                "`tool_choice` must be auto, none, required or an object that names a function.",
                "tool_choice",
            )
    parallel = fields.boolean("parallel_tool_calls")
    if parallel is not None:
        request.parallel_tool_calls = parallel


@dataclass
class _ImageBudget:
    """Bytes of the images of one request so far."""

    size_bytes: int = 0


def _message(fields: Fields, images: _ImageBudget) -> inference_pb2.ChatMessage:
    role = fields.required_text("role")
    if role not in _ROLES:
        way_out = (
            "it is deprecated, use `tool`" if role == "function" else f"it must be one of {', '.join(_ROLES)}"
        )
        raise invalid(f"`{fields.name('role')}` is {role[:32]!r}; {way_out}.", fields.name("role"))
    message = inference_pb2.ChatMessage(role=_ROLES[role], name=fields.text("name") or "")
    fields.refuse("function_call", "it is deprecated; use `tool_calls`.")
    fields.refuse("audio", "this server takes text and images.")
    match fields.raw("content"):
        case None:
            pass
        case str() as text:
            message.content.add(text=text_value(text, fields.name("content")))
        case list() as parts:
            for index, part in enumerate(parts):
                member = fields.child(part, f"{fields.name('content')}[{index}]")
                message.content.append(_part(member, images))
        case other:
            raise invalid(
                f"`{fields.name('content')}` must be a string or an array of parts, not {type_name(other)}.",
                fields.name("content"),
            )
    tool_call_id = fields.text("tool_call_id")
    if role == "tool":
        message.tool_call_id = tool_call_id or fields.missing("tool_call_id")
    if role == "assistant":
        for index, tool_call in enumerate(fields.array("tool_calls") or []):
            member = fields.child(tool_call, f"{fields.name('tool_calls')}[{index}]")
            message.tool_calls.append(_tool_call(member))
        message.reasoning = fields.text("reasoning_content") or fields.text("reasoning") or ""
        refusal = fields.text("refusal")
        if refusal and not message.content:
            message.content.add(text=refusal)
        fields.array("annotations")
    if not message.content and not message.tool_calls and not message.reasoning:
        fields.missing("content")
    return message


def _tool_call(fields: Fields) -> inference_pb2.ToolCall:
    function = fields.members("function")
    if function is None:
        fields.missing("function")
    fields.text("type")
    return inference_pb2.ToolCall(
        id=fields.text("id") or "",
        name=function.required_text("name"),
        arguments=function.text("arguments") or "",
    )


def _part(fields: Fields, images: _ImageBudget) -> inference_pb2.ContentPart:
    kind = fields.required_text("type")
    match kind:
        case "text" | "refusal":
            text = fields.text(kind)
            if text is None:
                fields.missing(kind)
            return inference_pb2.ContentPart(text=text)
        case "image_url":
            image = fields.members("image_url")
            if image is None:
                fields.missing("image_url")
            return inference_pb2.ContentPart(image=_image(image, images))
    raise invalid(
        f"`{fields.name('type')}` is {kind[:32]!r}; parts of a message are text or image_url.",
        fields.name("type"),
    )


def _image(fields: Fields, images: _ImageBudget) -> inference_pb2.Image:
    url = fields.required_text("url")
    name = fields.name("url")
    detail = fields.text("detail")
    if detail is not None and detail not in _DETAILS:
        raise invalid(f"`{fields.name('detail')}` must be auto, low or high.", fields.name("detail"))
    image = inference_pb2.Image(detail=_DETAILS.get(detail or "", inference_pb2.Image.DETAIL_UNSPECIFIED))
    if url[:5].lower() != "data:":
        if not re.match(r"https?://", url, re.IGNORECASE):
            raise invalid(f"`{name}` must be an http, https or data URL.", name)
        image.url = url
        return image
    head = _DATA_URL.match(url)
    if head is None:
        raise invalid(f"`{name}` must be a data URL with base64.", name)
    size_bytes = (len(url) - head.end()) * 3 // 4
    if size_bytes > IMAGE_LIMIT_BYTES:
        raise too_large(f"`{name}` holds {size_bytes} bytes; an image may have {IMAGE_LIMIT_BYTES}.", name)
    images.size_bytes += size_bytes
    if images.size_bytes > IMAGES_LIMIT_BYTES:
        raise too_large(f"The images of one request may have {IMAGES_LIMIT_BYTES} bytes in all.", name)
    try:
        image.data = binascii.a2b_base64(url[head.end() :], strict_mode=True)
    except (binascii.Error, ValueError):
        raise ApiError("INVALID_IMAGE", f"`{name}` is not base64.", name) from None
    image.media_type = head[1] or ""
    return image


def _prompts(fields: Fields, key: str) -> list[inference_pb2.Prompt]:
    """A text, several texts, one list of token ids or several."""
    name = fields.name(key)
    match fields.raw(key):
        case None:
            fields.missing(key)
        case str() as text:
            return [inference_pb2.Prompt(text=text_value(text, name))]
        case []:
            raise invalid(f"`{name}` is empty.", name)
        case [str(), *_] as texts:
            return [
                inference_pb2.Prompt(text=text_value(text, f"{name}[{index}]"))
                for index, text in enumerate(texts)
            ]
        case [list(), *_] as prompts:
            return [_token_prompt(ids, f"{name}[{index}]") for index, ids in enumerate(prompts)]
        case list() as ids:
            return [_token_prompt(ids, name)]
        case other:
            raise invalid(f"`{name}` must be a string or an array, not {type_name(other)}.", name)


def _token_prompt(ids: object, name: str) -> inference_pb2.Prompt:
    if not isinstance(ids, list):
        raise invalid(f"`{name}` must be an array of token ids, not {type_name(ids)}.", name)
    if not ids:
        raise invalid(f"`{name}` is empty.", name)
    prompt = inference_pb2.Prompt()
    prompt.token_ids.ids.extend(integer_value(token, f"{name}[{index}]") for index, token in enumerate(ids))
    return prompt


def _json_text(value: object, name: str) -> str:
    """The same JSON, keys in their order: they reach the prompt."""
    try:
        return text_value(_ENCODE_TEXT(value), name)
    except ValueError:
        raise invalid(f"`{name}` holds a number that is not finite.", name) from None


_ENCODE_TEXT = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


# --- Answers -------------------------------------------------------------------------------------


def chat_completion(response: inference_pb2.ChatResponse, options: Options, fingerprint: str) -> JsonObject:
    """The body of a whole chat answer."""
    body = _head("chatcmpl-", response, "chat.completion", options, fingerprint)
    body["choices"] = [
        {
            "index": choice.index,
            "message": _assistant(choice.message),
            "logprobs": chat_logprobs(choice.logprobs) if options.logprobs else None,
            "finish_reason": _FINISH_REASONS.get(choice.finish_reason),
            **_stop_reason(choice),
        }
        for choice in response.choices
    ]
    return _with_usage(body, response.usage, [*options.warnings, *response.warnings])


def completion(response: inference_pb2.GenerateResponse, options: Options, fingerprint: str) -> JsonObject:
    """The body of a whole continuation."""
    body = _head("cmpl-", response, "text_completion", options, fingerprint)
    body["choices"] = [
        {
            "index": choice.index,
            "text": choice.text,
            "logprobs": text_logprobs([*choice.prompt_logprobs, *choice.logprobs])[0]
            if options.logprobs
            else None,
            "finish_reason": _FINISH_REASONS.get(choice.finish_reason),
            **_stop_reason(choice),
        }
        for choice in response.choices
    ]
    return _with_usage(body, response.usage, [*options.warnings, *response.warnings])


def embeddings(response: inference_pb2.EmbedResponse, options: Options) -> JsonObject:
    """The body of /v1/embeddings."""
    body: JsonObject = {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "embedding": list(embedding.floats.values)
                if embedding.WhichOneof("vector") == "floats"
                else binascii.b2a_base64(embedding.float32_le, newline=False).decode(),
                "index": embedding.index,
            }
            for embedding in response.embeddings
        ],
        "model": response.model or options.model,
        "usage": {
            "prompt_tokens": response.usage.prompt_token_count,
            "total_tokens": response.usage.total_token_count,
        },
    }
    warnings = [*options.warnings, *response.warnings]
    return {**body, "warnings": warnings} if warnings else body


def chat_events(
    replies: Iterable[inference_pb2.ChatStreamResponse], options: Options, fingerprint: str
) -> Iterator[bytes]:
    """The server-sent events of a chat, the last [DONE] aside."""
    chunk = _ChunkMaker("chatcmpl-", "chat.completion.chunk", options, fingerprint)
    encode = sse.encode
    # Between these two stands the text of nearly every event; a dict per token would cost ten times as much.
    prefixes: list[str] = []
    suffix = ""
    finish: JsonObject | None = None
    try:
        for reply in replies:
            event = reply.WhichOneof("event")
            # Held back for one event: the end, which mostly comes with it, may bring warnings to put there.
            if finish is not None:
                yield chunk.choice(finish, reply.end.warnings)
                finish = None
            if event == "delta":
                delta = reply.delta
                text = delta.text
                if text and not (delta.reasoning or delta.tool_calls or delta.logprobs):
                    yield f"{prefixes[delta.index]}{encode(text)}{suffix}".encode()
                    continue
                choice = _chat_delta(delta, options.logprobs)
                if choice is not None:
                    yield chunk.choice(choice)
            elif event == "start":
                chunk.start(reply.start)
                for index in range(options.choice_count):
                    prefix, suffix = chunk.around(
                        {"index": index, "delta": {"content": "\0"}, "finish_reason": None}
                    )
                    prefixes.append(prefix)
                    role = {"index": index, "delta": {"role": "assistant"}, "finish_reason": None}
                    yield chunk.choice(role, [*options.warnings, *reply.start.warnings] if index == 0 else ())
            elif event == "finish":
                finish = {
                    "index": reply.finish.index,
                    "delta": {},
                    "finish_reason": _FINISH_REASONS.get(reply.finish.finish_reason),
                    **_stop_reason(reply.finish),
                }
            elif event == "end" and options.include_usage:
                yield chunk.usage(reply.end.usage)
    except Exception:
        if finish is not None:
            yield chunk.choice(finish)
        raise


def completion_events(
    replies: Iterable[inference_pb2.GenerateStreamResponse], options: Options, fingerprint: str
) -> Iterator[bytes]:
    """The server-sent events of a continuation, the last [DONE] aside."""
    chunk = _ChunkMaker("cmpl-", "text_completion", options, fingerprint)
    encode = sse.encode
    around: dict[int, tuple[str, str]] = {}
    offsets: dict[int, int] = {}
    warnings: list[str] = []
    finish: JsonObject | None = None
    try:
        for reply in replies:
            event = reply.WhichOneof("event")
            # Held back for one event, as in a chat.
            if finish is not None:
                yield chunk.choice(finish, [*warnings, *reply.end.warnings])
                finish, warnings = None, []
            if event == "delta":
                delta = reply.delta
                index = delta.index
                text = delta.text
                if options.logprobs:
                    entries = [*delta.prompt_logprobs, *delta.logprobs]
                    logprobs, offsets[index] = text_logprobs(entries, offsets.get(index, 0))
                    yield chunk.choice(
                        {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
                    )
                elif text:
                    if index not in around:
                        choice = {"index": index, "text": "\0", "logprobs": None, "finish_reason": None}
                        around[index] = chunk.around(choice)
                    prefix, suffix = around[index]
                    yield f"{prefix}{encode(text)}{suffix}".encode()
            elif event == "start":
                chunk.start(reply.start)
                warnings = [*options.warnings, *reply.start.warnings]
            elif event == "finish":
                finish = {
                    "index": reply.finish.index,
                    "text": "",
                    "logprobs": None,
                    "finish_reason": _FINISH_REASONS.get(reply.finish.finish_reason),
                    **_stop_reason(reply.finish),
                }
            elif event == "end" and options.include_usage:
                yield chunk.usage(reply.end.usage)
    except Exception:
        if finish is not None:
            yield chunk.choice(finish, warnings)
        raise


class _ChunkMaker:
    """Makes the chunks of one stream, which all begin alike."""

    def __init__(self, id_prefix: str, kind: str, options: Options, fingerprint: str) -> None:
        self._id_prefix = id_prefix
        self._kind = kind
        self._options = options
        self._fingerprint = fingerprint
        self._head: JsonObject = {}

    def start(self, start: inference_pb2.StreamStart) -> None:
        self._head = _head(self._id_prefix, start, self._kind, self._options, self._fingerprint)

    def choice(self, choice: JsonObject, warnings: Iterable[str] = ()) -> bytes:
        chunk = {**self._head, "choices": [choice]}
        if self._options.include_usage:
            chunk["usage"] = None
        sentences = list(warnings)
        if sentences:
            chunk["warnings"] = sentences
        return sse.event(chunk)

    def usage(self, usage: common_pb2.Usage) -> bytes:
        return sse.event(_with_usage({**self._head, "choices": []}, usage, []))

    def around(self, choice: JsonObject) -> tuple[str, str]:
        """The event of a choice whose one text is NUL, as what stands before and after the text."""
        before, after = self.choice(choice).decode().split(r'"\u0000"')
        return before, after


def chat_logprobs(entries: Iterable[common_pb2.TokenLogprob]) -> JsonObject:
    """Log-probabilities in the form of chat choices."""
    return {
        "content": [
            {**_token(entry), "top_logprobs": [_token(rival) for rival in entry.top]} for entry in entries
        ],
        "refusal": None,
    }


def text_logprobs(entries: Iterable[common_pb2.TokenLogprob], offset: int = 0) -> tuple[JsonObject, int]:
    """Log-probabilities in the form of completions, and the offset in characters of the text after them."""
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for entry in entries:
        tokens.append(entry.text)
        values.append(entry.logprob if entry.HasField("logprob") else None)
        tops.append({rival.text: rival.logprob for rival in entry.top} if entry.top else None)
        offsets.append(offset)
        offset += len(entry.text)
    body = {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
    return body, offset


def usage_json(usage: common_pb2.Usage) -> JsonObject:
    """Token counts as OpenAI writes them."""
    return {
        "prompt_tokens": usage.prompt_token_count,
        "completion_tokens": usage.completion_token_count,
        "total_tokens": usage.total_token_count,
        "prompt_tokens_details": {"cached_tokens": usage.cached_prompt_token_count},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_token_count},
    }


def finish_reason(choice: inference_pb2.Choice) -> str | None:
    """Why a choice ended, in OpenAI's word."""
    return _FINISH_REASONS.get(choice.finish_reason)


def _head(id_prefix: str, source: Any, kind: str, options: Options, fingerprint: str) -> JsonObject:
    return {
        "id": source.id if source.id.startswith(id_prefix) else id_prefix + source.id,
        "object": kind,
        "created": source.create_time.seconds,
        "model": source.model or options.model,
        "system_fingerprint": fingerprint,
    }


def _with_usage(body: JsonObject, usage: common_pb2.Usage, warnings: list[str]) -> JsonObject:
    body["usage"] = usage_json(usage)
    if warnings:
        body["warnings"] = warnings
    return body


def _assistant(message: inference_pb2.ChatMessage) -> JsonObject:
    text = "".join(part.text for part in message.content)
    answer: JsonObject = {
        "role": _ROLE_NAMES.get(message.role, "assistant"),
        # As OpenAI: null where the reply only calls tools.
        "content": text if text or not message.tool_calls else None,
        "refusal": None,
    }
    if message.reasoning:
        answer["reasoning_content"] = message.reasoning
    if message.tool_calls:
        answer["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return answer


def _chat_delta(delta: inference_pb2.ChatDelta, with_logprobs: bool) -> JsonObject | None:
    """A choice of a chunk with whatever the delta brings. None: nothing."""
    content: JsonObject = {}
    if delta.reasoning:
        content["reasoning_content"] = delta.reasoning
    if delta.text:
        content["content"] = delta.text
    if delta.tool_calls:
        content["tool_calls"] = [_tool_call_delta(call) for call in delta.tool_calls]
    choice: JsonObject = {"index": delta.index, "delta": content}
    if with_logprobs:
        choice["logprobs"] = chat_logprobs(delta.logprobs) if delta.logprobs else None
    choice["finish_reason"] = None
    return choice if content or choice.get("logprobs") else None


def _tool_call_delta(call: inference_pb2.ToolCallDelta) -> JsonObject:
    function: JsonObject = {"arguments": call.arguments}
    if not call.name:
        return {"index": call.index, "function": function}
    function = {"name": call.name, **function}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _stop_reason(source: Any) -> JsonObject:
    return {"stop_reason": source.stop_sequence} if source.HasField("stop_sequence") else {}


def _token(entry: common_pb2.TokenLogprob) -> JsonObject:
    return {"token": entry.text, "logprob": entry.logprob, "bytes": list(entry.bytes)}
