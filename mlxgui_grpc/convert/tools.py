"""The tools of a chat, and whether they must be called."""

import re
from typing import Any

from mlxgui.v1 import inference_pb2
from mlxgui_grpc.convert.schemas import schema_from_text
from mlxgui_grpc.convert.values import json_bytes
from mlxgui_grpc.engine import frames
from mlxgui_grpc.errors import InvalidRequestError

MAX_TOOLS = 128

_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def tool_use_from_proto(request: inference_pb2.ChatRequest) -> frames.ToolUse | None:
    """How the tools may be called; None: not at all. Raises InvalidRequestError naming the field."""
    choice = request.tool_choice
    is_required = bool(choice.function) or choice.mode == inference_pb2.ToolChoice.MODE_REQUIRED
    if not request.tools:
        if is_required:
            raise InvalidRequestError(
                "tool_choice asks for a call of a tool, and tools is empty", field="tool_choice"
            )
        return None
    if choice.function and all(tool.name != choice.function for tool in request.tools):
        raise InvalidRequestError(
            f"tool_choice names '{choice.function}', which is none of the tools", field="tool_choice"
        )
    if choice.mode == inference_pb2.ToolChoice.MODE_NONE:
        return None
    return frames.ToolUse(
        is_required=is_required,
        function=choice.function,
        is_parallel=request.parallel_tool_calls if request.HasField("parallel_tool_calls") else True,
    )


def tools_from_proto(request: inference_pb2.ChatRequest) -> bytes:
    """The tools as JSON, in the form that chat templates take; empty when none may be called.

    Raises InvalidRequestError or PayloadTooLargeError, which name the field.
    """
    if len(request.tools) > MAX_TOOLS:
        raise InvalidRequestError(
            f"tools has {len(request.tools)} entries; there may be {MAX_TOOLS}", field="tools"
        )
    tools = []
    names: set[str] = set()
    for index, tool in enumerate(request.tools):
        field = f"tools[{index}]"
        if not _TOOL_NAME.fullmatch(tool.name):
            raise InvalidRequestError(
                f"{field}.name must be 1 to 64 letters, digits, underscores or dashes", field=f"{field}.name"
            )
        if tool.name in names:
            raise InvalidRequestError(
                f"{field}.name '{tool.name}' is the name of another tool too", field=f"{field}.name"
            )
        names.add(tool.name)
        function: dict[str, Any] = {
            "name": tool.name,
            "description": tool.description,
            "parameters": schema_from_text(tool.parameters_schema or "{}", f"{field}.parameters_schema"),
        }
        if tool.strict:
            function["strict"] = True
        tools.append({"type": "function", "function": function})
    if not tools or request.tool_choice.mode == inference_pb2.ToolChoice.MODE_NONE:
        return b""
    return json_bytes(tools, "tools")
