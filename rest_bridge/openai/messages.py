"""The messages of a chat."""

from mlxgui.v1 import inference_pb2
from rest_bridge.errors import invalid
from rest_bridge.json_body import Fields, text_value, type_name
from rest_bridge.openai.images import ImageBudget, read_image
from rest_bridge.openai.tools import read_tool_call

_ROLES = {
    "system": inference_pb2.ROLE_SYSTEM,
    "developer": inference_pb2.ROLE_DEVELOPER,
    "user": inference_pb2.ROLE_USER,
    "assistant": inference_pb2.ROLE_ASSISTANT,
    "tool": inference_pb2.ROLE_TOOL,
}

ROLE_NAMES = {number: name for name, number in _ROLES.items()}


def read_message(fields: Fields, images: ImageBudget) -> inference_pb2.ChatMessage:
    """One message of a conversation. Raises ApiError (400, 413)."""
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
            message.tool_calls.append(read_tool_call(member))
        message.reasoning = fields.text("reasoning_content") or fields.text("reasoning") or ""
        refusal = fields.text("refusal")
        if refusal and not message.content:
            message.content.add(text=refusal)
        fields.array("annotations")
    if not message.content and not message.tool_calls and not message.reasoning:
        fields.missing("content")
    return message


def _part(fields: Fields, images: ImageBudget) -> inference_pb2.ContentPart:
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
            return inference_pb2.ContentPart(image=read_image(image, images))
    raise invalid(
        f"`{fields.name('type')}` is {kind[:32]!r}; parts of a message are text or image_url.",
        fields.name("type"),
    )
