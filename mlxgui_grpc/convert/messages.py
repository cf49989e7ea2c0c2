"""The messages of a chat, as the chat template takes them."""

import json
from collections.abc import Sequence
from typing import Any

from mlxgui.v1 import inference_pb2
from mlxgui_grpc.convert.images import image_source
from mlxgui_grpc.convert.values import json_bytes
from mlxgui_grpc.errors import InvalidRequestError
from mlxgui_grpc.images.sources import ImageSource, check_sources

MAX_MESSAGES = 2_048
MAX_PARTS = 256

_ROLES = {
    inference_pb2.ROLE_SYSTEM: "system",
    inference_pb2.ROLE_DEVELOPER: "developer",
    inference_pb2.ROLE_USER: "user",
    inference_pb2.ROLE_ASSISTANT: "assistant",
    inference_pb2.ROLE_TOOL: "tool",
}


def messages_from_proto(
    messages: Sequence[inference_pb2.ChatMessage],
) -> tuple[bytes, tuple[ImageSource, ...]]:
    """The messages as JSON, and the images in them, in their order; raises InvalidRequestError naming the field.

    The content of a message with images is a list of parts, `{"type": "image"}` for each of them; else a text.
    """
    if not messages:
        raise InvalidRequestError("messages must not be empty", field="messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequestError(f"messages has more than {MAX_MESSAGES} entries", field="messages")
    images: list[ImageSource] = []
    call_ids: set[str] = set()
    result = []
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        result.append(_message(message, field, images))
        if message.tool_call_id and message.tool_call_id not in call_ids:
            raise InvalidRequestError(
                f"{field}.tool_call_id '{message.tool_call_id}' is the id of no tool call in an earlier assistant "
                "message",
                field=f"{field}.tool_call_id",
            )
        call_ids.update(call.id for call in message.tool_calls)
    check_sources(images)
    return json_bytes(result, "messages"), tuple(images)


def _message(message: inference_pb2.ChatMessage, field: str, images: list[ImageSource]) -> dict[str, Any]:
    role = _ROLES.get(message.role)
    if role is None:
        raise InvalidRequestError(
            f"{field}.role must be system, developer, user, assistant or tool", field=f"{field}.role"
        )
    if len(message.content) > MAX_PARTS:
        raise InvalidRequestError(
            f"{field}.content has more than {MAX_PARTS} parts", field=f"{field}.content"
        )
    parts: list[dict[str, str]] = []
    for index, part in enumerate(message.content):
        kind = part.WhichOneof("part")
        if kind == "text":
            parts.append({"type": "text", "text": part.text})
        elif kind == "image":
            if role not in ("user", "tool"):
                raise InvalidRequestError(
                    f"{field}.content[{index}] is an image: only user and tool messages may have them",
                    field=f"{field}.content[{index}]",
                )
            images.append(image_source(part.image, f"{field}.content[{index}]"))
            parts.append({"type": "image"})
        else:
            raise InvalidRequestError(f"{field}.content[{index}] is empty", field=f"{field}.content[{index}]")
    has_images = any(part["type"] == "image" for part in parts)
    content: Any = parts if has_images else "\n".join(part["text"] for part in parts)
    result: dict[str, Any] = {"role": role, "content": content}
    if message.tool_calls:
        if role != "assistant":
            raise InvalidRequestError(
                f"{field}.tool_calls belong to assistant messages only", field=f"{field}.tool_calls"
            )
        result["tool_calls"] = [
            {
                "type": "function",
                "id": call.id,
                "function": {
                    "name": call.name,
                    "arguments": _arguments(call.arguments, f"{field}.tool_calls[{index}].arguments"),
                },
            }
            for index, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id and role != "tool":
        raise InvalidRequestError(
            f"{field}.tool_call_id belongs to tool messages only", field=f"{field}.tool_call_id"
        )
    for name in ("name", "tool_call_id", "reasoning"):
        if value := getattr(message, name):
            result["reasoning_content" if name == "reasoning" else name] = value
    return result


def _arguments(text: str, field: str) -> Any:
    """Templates want the arguments of a call as an object; what does not parse stays text, as the model wrote it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    json_bytes(value, field)
    return value
