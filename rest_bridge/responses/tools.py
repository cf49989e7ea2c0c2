"""The tools of a request, in the flat form of the Responses API."""

from mlxgui.v1 import inference_pb2
from rest_bridge.errors import JsonObject, invalid
from rest_bridge.json_body import Fields, json_text
from rest_bridge.openai.tools import keep_tools
from rest_bridge.translated import TranslatedOptions

_MODES = {
    "auto": inference_pb2.ToolChoice.MODE_AUTO,
    "none": inference_pb2.ToolChoice.MODE_NONE,
    "required": inference_pb2.ToolChoice.MODE_REQUIRED,
}


def read_tools(
    fields: Fields, request: inference_pb2.ChatRequest, options: TranslatedOptions
) -> tuple[list[JsonObject], str | JsonObject]:
    """Reads the tools and how they may be called; both as the answer repeats them. Raises ApiError (400)."""
    echo: list[JsonObject] = []
    for index, tool in enumerate(fields.array("tools") or []):
        member = fields.child(tool, f"tools[{index}]")
        _require_function(member)
        parameters = member.free_object("parameters")
        strict = member.boolean("strict") or False
        name, description = member.required_text("name"), member.text("description")
        request.tools.add(
            name=name,
            description=description or "",
            parameters_schema="" if parameters is None else json_text(parameters, member.name("parameters")),
            strict=strict,
        )
        options.tools.append(member.path)
        about = {"name": name, "description": description, "parameters": parameters, "strict": strict}
        echo.append({"type": "function", **about})
    choice = _read_choice(fields, request, options)
    parallel = fields.boolean("parallel_tool_calls")
    if parallel is not None:
        request.parallel_tool_calls = parallel
    return echo, choice


def _require_function(tool: Fields) -> None:
    kind, name = tool.required_text("type"), tool.name("type")
    if kind != "function":
        raise invalid(
            f"`{name}` is {kind[:32]!r}: this server has no tools of its own; it takes functions.", name
        )
    if tool.raw("name") is None and tool.raw("function") is not None:
        name = tool.name("name")
        raise invalid(f"`{name}` is missing: here a function's name stands beside its `type`.", name)


def _read_choice(
    fields: Fields, request: inference_pb2.ChatRequest, options: TranslatedOptions
) -> str | JsonObject:
    choice = fields.raw("tool_choice")
    match choice:
        case None:
            return "auto"
        case str() if choice in _MODES:
            request.tool_choice.mode = _MODES[choice]
            return choice
        case {"type": "function"}:
            name = _known_name(fields.child(choice, "tool_choice"), request)
            request.tool_choice.function = name
            return {"type": "function", "name": name}
        case {"type": "allowed_tools"}:
            return _keep_allowed(fields.child(choice, "tool_choice"), request, options)
    raise invalid("`tool_choice` must be auto, none, required, a function or allowed_tools.", "tool_choice")


def _keep_allowed(
    fields: Fields, request: inference_pb2.ChatRequest, options: TranslatedOptions
) -> JsonObject:
    fields.raw("type")
    mode = fields.required_text("mode")
    if mode not in ("auto", "required"):
        raise invalid(f"`{fields.name('mode')}` must be auto or required.", fields.name("mode"))
    allowed = [
        _known_name(fields.child(tool, f"{fields.name('tools')}[{index}]"), request)
        for index, tool in enumerate(fields.array("tools") or [])
    ]
    if not allowed:
        raise invalid(f"`{fields.name('tools')}` is empty.", fields.name("tools"))
    request.tool_choice.mode = _MODES[mode]
    keep_tools(allowed, request, options)
    tools = [{"type": "function", "name": name} for name in allowed]
    return {"type": "allowed_tools", "mode": mode, "tools": tools}


def _known_name(choice: Fields, request: inference_pb2.ChatRequest) -> str:
    """The function that a choice names, which must be among the tools."""
    choice.text("type")
    wanted, name = choice.required_text("name"), choice.name("name")
    if all(tool.name != wanted for tool in request.tools):
        raise invalid(f"`{name}` is {wanted[:64]!r}, which is none of the `tools`.", name)
    return wanted
