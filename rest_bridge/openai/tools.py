"""The tools of a request, and the tool calls of its messages and answers."""

from collections.abc import Container

from mlxgui.v1 import inference_pb2
from rest_bridge.errors import JsonObject, invalid
from rest_bridge.json_body import Fields, json_text
from rest_bridge.openai.options import Options

_TOOL_MODES = {
    "auto": inference_pb2.ToolChoice.MODE_AUTO,
    "none": inference_pb2.ToolChoice.MODE_NONE,
    "required": inference_pb2.ToolChoice.MODE_REQUIRED,
}


def read_tools(fields: Fields, request: inference_pb2.ChatRequest, options: Options) -> None:
    """Reads the tools and how they may be called. Raises ApiError (400)."""
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
            else json_text(parameters, function.name("parameters")),
            strict=function.boolean("strict") or False,
        )
        options.tools.append(function.path)
    _read_tool_choice(fields, request, options)
    parallel = fields.boolean("parallel_tool_calls")
    if parallel is not None:
        request.parallel_tool_calls = parallel


def _read_tool_choice(fields: Fields, request: inference_pb2.ChatRequest, options: Options) -> None:
    match fields.raw("tool_choice"):
        case None:
            pass
        case str() as mode if mode in _TOOL_MODES:
            request.tool_choice.mode = _TOOL_MODES[mode]
        case dict() as choice if choice.get("type") == "function":
            member = fields.child(choice, "tool_choice")
            member.raw("type")
            request.tool_choice.function = _known_name(member, request)
        case dict() as choice if choice.get("type") == "allowed_tools":
            member = fields.child(choice, "tool_choice")
            member.raw("type")
            _keep_allowed(member, request, options)
        case _:
            raise invalid(
                "`tool_choice` must be auto, none, required or an object that names a function.",
                "tool_choice",
            )


def _keep_allowed(fields: Fields, request: inference_pb2.ChatRequest, options: Options) -> None:
    allowed = fields.members("allowed_tools")
    if allowed is None:
        fields.missing("allowed_tools")
    mode = allowed.required_text("mode")
    if mode not in ("auto", "required"):
        raise invalid(f"`{allowed.name('mode')}` must be auto or required.", allowed.name("mode"))
    names = set()
    for index, tool in enumerate(allowed.array("tools") or []):
        member = allowed.child(tool, f"{allowed.name('tools')}[{index}]")
        member.text("type")
        names.add(_known_name(member, request))
    if not names:
        raise invalid(f"`{allowed.name('tools')}` is empty.", allowed.name("tools"))
    request.tool_choice.mode = _TOOL_MODES[mode]
    keep_tools(names, request, options)


def keep_tools(names: Container[str], request: inference_pb2.ChatRequest, options: Options) -> None:
    """Takes away the tools that are not among the allowed ones, so that the model neither sees nor calls them."""
    kept = [pair for pair in zip(request.tools, options.tools, strict=True) if pair[0].name in names]
    options.tools[:] = [name for _, name in kept]
    del request.tools[:]
    request.tools.extend(tool for tool, _ in kept)


def _known_name(choice: Fields, request: inference_pb2.ChatRequest) -> str:
    """The function that a choice names, which must be among the tools."""
    function = choice.members("function")
    if function is None:
        choice.missing("function")
    wanted = function.required_text("name")
    if all(tool.name != wanted for tool in request.tools):
        name = function.name("name")
        raise invalid(f"`{name}` is {wanted[:64]!r}, which is none of the `tools`.", name)
    return wanted


def read_tool_call(fields: Fields) -> inference_pb2.ToolCall:
    """A call in a message of the assistant's. Raises ApiError (400)."""
    function = fields.members("function")
    if function is None:
        fields.missing("function")
    fields.text("type")
    return inference_pb2.ToolCall(
        id=fields.text("id") or "",
        name=function.required_text("name"),
        arguments=function.text("arguments") or "",
    )


def tool_call(call: inference_pb2.ToolCall) -> JsonObject:
    """A whole call of a reply."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def tool_call_delta(call: inference_pb2.ToolCallDelta) -> JsonObject:
    """A part of a call in a chunk: what it is in its first part, and arguments."""
    function: JsonObject = {"arguments": call.arguments}
    if not call.name:
        return {"index": call.index, "function": function}
    function = {"name": call.name, **function}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}
