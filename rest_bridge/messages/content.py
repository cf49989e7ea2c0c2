"""The conversation of a request: messages of blocks, which become the messages of a chat."""

from mlxgui.v1 import inference_pb2
from rest_bridge.errors import invalid
from rest_bridge.json_body import Fields, json_text, text_value, type_name
from rest_bridge.openai.images import ImageBudget, image_at
from rest_bridge.translated import TranslatedOptions

_ROLES = {
    "user": inference_pb2.ROLE_USER,
    "assistant": inference_pb2.ROLE_ASSISTANT,
    "system": inference_pb2.ROLE_SYSTEM,
}
_IMAGE_TYPES = ("image/jpeg", "image/png", "image/gif", "image/webp")


def read_system(fields: Fields, request: inference_pb2.ChatRequest, options: TranslatedOptions) -> None:
    """Adds the system prompt, if there is one. Raises ApiError (400)."""
    match fields.raw("system"):
        case None | "" | []:
            pass
        case str() | list():
            message = options.add_message(request, inference_pb2.ROLE_SYSTEM, "system")
            options.note("content", "system")
            _Reader(request, options).read_texts(fields, "system", message)
        case other:
            raise invalid(
                f"`system` must be a string or an array of blocks, not {type_name(other)}.", "system"
            )


def read_messages(fields: Fields, request: inference_pb2.ChatRequest, options: TranslatedOptions) -> None:
    """Adds the messages. Raises ApiError (400, 413)."""
    messages = fields.array("messages")
    if messages is None:
        fields.missing("messages")
    if not messages:
        raise invalid("`messages` is empty; send at least one message.", "messages")
    reader = _Reader(request, options)
    for index, message in enumerate(messages):
        reader.read(fields.child(message, f"messages[{index}]"))
    if request.messages[-1].role == inference_pb2.ROLE_ASSISTANT:
        name = f"messages[{len(messages) - 1}]"
        raise invalid(f"`{name}` is the assistant's, but this server does not continue a begun answer.", name)


class _Reader:
    """Turns of the same role one after the other are one turn; the results of tools are messages of their own."""

    def __init__(self, request: inference_pb2.ChatRequest, options: TranslatedOptions) -> None:
        self._request = request
        self._options = options
        self._images = ImageBudget()

    def read(self, fields: Fields) -> None:
        role, name = fields.required_text("role"), fields.name("content")
        if role not in _ROLES:
            raise invalid(
                f"`{fields.name('role')}` is {role[:32]!r}; it must be user, assistant or system.",
                fields.name("role"),
            )
        if role == "system":
            self.read_texts(fields, "content", self._add(inference_pb2.ROLE_SYSTEM, fields.path))
            return
        match fields.raw("content"):
            case None:
                fields.missing("content")
            case str() as text:
                part = inference_pb2.ContentPart(text=text_value(text, name))
                self._add_part(_ROLES[role], fields.path, part, name)
            case list() as blocks:
                if not blocks and role == "user":
                    raise invalid(f"`{name}` is empty.", name)
                for index, block in enumerate(blocks):
                    member = fields.child(block, f"{name}[{index}]")
                    if role == "user":
                        self._read_user_block(member, fields.path)
                    else:
                        self._read_assistant_block(member, fields.path)
            case other:
                raise invalid(
                    f"`{name}` must be a string or an array of blocks, not {type_name(other)}.", name
                )

    def read_texts(self, fields: Fields, key: str, message: inference_pb2.ChatMessage) -> None:
        """Adds a text, or blocks of text only."""
        name = fields.name(key)
        match fields.raw(key):
            case str() as text:
                part = inference_pb2.ContentPart(text=text_value(text, name))
                self._options.add_part(message, part, name)
            case [_, *_] as blocks:
                for index, block in enumerate(blocks):
                    member = fields.child(block, f"{name}[{index}]")
                    if member.required_text("type") != "text":
                        raise invalid(f"`{member.name('type')}` must be text.", member.name("type"))
                    self._options.add_part(message, _text(member), member.path)
            case _:
                raise invalid(f"`{name}` must be a string or an array of text blocks.", name)

    def _read_user_block(self, block: Fields, turn: str) -> None:
        kind = block.required_text("type")
        match kind:
            case "text":
                self._add_part(inference_pb2.ROLE_USER, turn, _text(block), block.path)
            case "image":
                part, source = self._image(block)
                self._add_part(inference_pb2.ROLE_USER, turn, part, block.path, source)
            case "tool_result":
                self._read_result(block)
            case _:
                name = block.name("type")
                raise invalid(
                    f"`{name}` is {kind[:32]!r}; a user's blocks are text, image or tool_result.", name
                )

    def _read_assistant_block(self, block: Fields, turn: str) -> None:
        role = inference_pb2.ROLE_ASSISTANT
        kind = block.required_text("type")
        match kind:
            case "text":
                self._add_part(role, turn, _text(block), block.path)
            case "thinking":
                self._turn(role, turn).reasoning += block.text("thinking") or ""
                # This server signs nothing.
                block.text("signature")
            case "redacted_thinking":
                block.text("data")
                warning = "`redacted_thinking` has no effect: nobody but its author can read it."
                if warning not in self._options.warnings:
                    self._options.warnings.append(warning)
            case "tool_use":
                values = block.free_object("input")
                calls = self._turn(role, turn).tool_calls
                path = f"tool_calls[{len(calls)}]"
                self._options.note(path, block.path)
                self._options.note(f"{path}.arguments", block.name("input"))
                calls.add(
                    id=block.required_text("id"),
                    name=block.required_text("name"),
                    arguments=json_text(values or {}, block.name("input")),
                )
                block.raw("caller")
            case _:
                name = block.name("type")
                raise invalid(
                    f"`{name}` is {kind[:32]!r}; an assistant's blocks are text, thinking or tool_use.", name
                )

    def _read_result(self, block: Fields) -> None:
        message = self._add(inference_pb2.ROLE_TOOL, block.path)
        message.tool_call_id = block.required_text("tool_use_id")
        self._options.note("tool_call_id", block.name("tool_use_id"))
        name = block.name("content")
        if block.boolean("is_error"):
            # Chat templates know no failed results; the word is what a model can read.
            self._options.add_part(message, inference_pb2.ContentPart(text="Error:"), block.name("is_error"))
        match block.raw("content"):
            case None:
                pass
            case str() as text:
                part = inference_pb2.ContentPart(text=text_value(text, name))
                self._options.add_part(message, part, name)
            case list() as parts:
                for index, part in enumerate(parts):
                    member = block.child(part, f"{name}[{index}]")
                    kind = member.required_text("type")
                    if kind not in ("text", "image"):
                        where = member.name("type")
                        raise invalid(
                            f"`{where}` is {kind[:32]!r}; a result's blocks are text or image.", where
                        )
                    content, source = (_text(member), None) if kind == "text" else self._image(member)
                    self._options.add_part(message, content, member.path, source)
            case other:
                raise invalid(
                    f"`{name}` must be a string or an array of blocks, not {type_name(other)}.", name
                )

    def _image(self, block: Fields) -> tuple[inference_pb2.ContentPart, str]:
        """An image, and what the caller calls where it comes from."""
        source = block.members("source")
        if source is None:
            block.missing("source")
        kind = source.required_text("type")
        match kind:
            case "url":
                url, name = source.required_text("url"), source.name("url")
            case "base64":
                media_type = source.required_text("media_type")
                if media_type not in _IMAGE_TYPES:
                    name = source.name("media_type")
                    raise invalid(f"`{name}` must be one of {', '.join(_IMAGE_TYPES)}.", name)
                url, name = f"data:{media_type};base64,{source.required_text('data')}", source.name("data")
            case _:
                name = source.name("type")
                raise invalid(f"`{name}` is {kind[:32]!r}; it must be base64 or url.", name)
        detail = inference_pb2.Image.DETAIL_UNSPECIFIED
        return inference_pb2.ContentPart(image=image_at(url, name, detail, self._images)), name

    def _add_part(
        self,
        role: "inference_pb2.Role.ValueType",
        turn: str,
        part: inference_pb2.ContentPart,
        name: str,
        source: str | None = None,
    ) -> None:
        self._options.add_part(self._turn(role, turn), part, name, source)

    def _turn(self, role: "inference_pb2.Role.ValueType", name: str) -> inference_pb2.ChatMessage:
        """The last message, if it is of this role."""
        messages = self._request.messages
        return messages[-1] if messages and messages[-1].role == role else self._add(role, name)

    def _add(self, role: "inference_pb2.Role.ValueType", name: str) -> inference_pb2.ChatMessage:
        return self._options.add_message(self._request, role, name)


def _text(block: Fields) -> inference_pb2.ContentPart:
    text = block.text("text")
    if text is None:
        block.missing("text")
    return inference_pb2.ContentPart(text=text)
