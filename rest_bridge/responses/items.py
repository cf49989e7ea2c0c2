"""The input of a response: items, which become the messages of a chat."""

from mlxgui.v1 import inference_pb2
from rest_bridge.errors import invalid
from rest_bridge.json_body import Fields, text_value, type_name
from rest_bridge.openai.images import ImageBudget, image_at, read_detail
from rest_bridge.translated import TranslatedOptions

# What the API writes into the items of an answer, which come back as input.
_WRITTEN = ("id", "status", "phase", "caller", "namespace")

_ROLES = {
    "system": inference_pb2.ROLE_SYSTEM,
    "developer": inference_pb2.ROLE_DEVELOPER,
    "user": inference_pb2.ROLE_USER,
    "assistant": inference_pb2.ROLE_ASSISTANT,
}


def read_input(fields: Fields, request: inference_pb2.ChatRequest, options: TranslatedOptions) -> None:
    """Adds what `input` holds to the messages. Raises ApiError (400, 413)."""
    match fields.raw("input"):
        case None:
            fields.missing("input")
        case str() as text:
            message = options.add_message(request, inference_pb2.ROLE_USER, "input")
            options.add_part(message, inference_pb2.ContentPart(text=text_value(text, "input")), "input")
        case []:
            raise invalid("`input` is empty; send a text or at least one item.", "input")
        case list() as items:
            reader = _Items(request, options)
            for index, item in enumerate(items):
                reader.read(fields.child(item, f"input[{index}]"))
        case other:
            raise invalid(f"`input` must be a string or an array of items, not {type_name(other)}.", "input")


class _Items:
    """What an assistant did in one turn is several items here and one message there."""

    def __init__(self, request: inference_pb2.ChatRequest, options: TranslatedOptions) -> None:
        self._request = request
        self._options = options
        self._images = ImageBudget()

    def read(self, item: Fields) -> None:
        kind = item.text("type") or "message"
        for key in _WRITTEN:
            item.raw(key)
        match kind:
            case "message":
                self._read_message(item)
            case "reasoning":
                self._read_reasoning(item)
            case "function_call":
                # A model may have called without a word before.
                turn = self._turn() or self._new_turn(item)
                path = f"tool_calls[{len(turn.tool_calls)}]"
                self._options.note(path, item.path)
                self._options.note(f"{path}.arguments", item.name("arguments"))
                turn.tool_calls.add(
                    id=item.required_text("call_id"),
                    name=item.required_text("name"),
                    arguments=item.text("arguments") or "",
                )
            case "function_call_output":
                message = self._add(inference_pb2.ROLE_TOOL, item)
                message.tool_call_id = item.required_text("call_id")
                self._options.note("tool_call_id", item.name("call_id"))
                self._options.note("content", item.name("output"))
                item.text("name")
                self._read_parts(item, "output", message)
            case "item_reference":
                raise invalid(
                    f"`{item.name('type')}` is 'item_reference', but no items are stored; send the item itself.",
                    item.name("type"),
                )
            case _:
                raise invalid(
                    f"`{item.name('type')}` is {kind[:32]!r}; items are message, reasoning, function_call or "
                    "function_call_output.",
                    item.name("type"),
                )

    def _read_message(self, item: Fields) -> None:
        role = item.required_text("role")
        if role not in _ROLES:
            name = item.name("role")
            raise invalid(f"`{name}` is {role[:32]!r}; it must be one of {', '.join(_ROLES)}.", name)
        message = None
        if role == "assistant":
            message = self._turn()
            # Two texts with nothing in between are two messages; text after a call is still the turn of the call.
            if message is not None and message.content and not message.tool_calls:
                message = None
        self._read_parts(item, "content", message or self._add(_ROLES[role], item))

    def _read_reasoning(self, item: Fields) -> None:
        texts: list[str] = []
        for key, kind in (("content", "reasoning_text"), ("summary", "summary_text")):
            parts = [
                item.child(part, f"{item.name(key)}[{index}]")
                for index, part in enumerate(item.array(key) or [])
            ]
            for part in parts:
                if part.text("type") != kind:
                    raise invalid(f"`{part.name('type')}` must be {kind}.", part.name("type"))
                text = part.text("text") or ""
                # A summary stands for a content that is not there.
                if key == "content" or not texts:
                    texts.append(text)
        if not texts:
            return
        turn = self._turn()
        if turn is None or turn.content or turn.tool_calls:
            turn = self._new_turn(item)
        turn.reasoning += "".join(texts)

    def _read_parts(self, item: Fields, key: str, message: inference_pb2.ChatMessage) -> None:
        name = item.name(key)
        match item.raw(key):
            case None:
                item.missing(key)
            case str() as text:
                part = inference_pb2.ContentPart(text=text_value(text, name))
                self._options.add_part(message, part, name)
            case [] if message.role != inference_pb2.ROLE_TOOL:
                raise invalid(f"`{name}` is empty.", name)
            case list() as parts:
                for index, part in enumerate(parts):
                    member = item.child(part, f"{name}[{index}]")
                    content = self._part(member)
                    source = member.name("image_url") if content.HasField("image") else None
                    self._options.add_part(message, content, member.path, source)
            case other:
                raise invalid(
                    f"`{name}` must be a string or an array of parts, not {type_name(other)}.", name
                )

    def _part(self, part: Fields) -> inference_pb2.ContentPart:
        kind = part.required_text("type")
        match kind:
            case "input_text" | "output_text" | "text" | "refusal":
                key = "refusal" if kind == "refusal" else "text"
                part.raw("annotations")
                part.raw("logprobs")
                text = part.text(key)
                if text is None:
                    part.missing(key)
                return inference_pb2.ContentPart(text=text)
            case "input_image":
                part.refuse("file_id", "no files are stored; send the image as `image_url`.")
                url = part.required_text("image_url")
                image = image_at(url, part.name("image_url"), read_detail(part), self._images)
                return inference_pb2.ContentPart(image=image)
        name = part.name("type")
        raise invalid(f"`{name}` is {kind[:32]!r}; parts are input_text, input_image or output_text.", name)

    def _turn(self) -> inference_pb2.ChatMessage | None:
        """The assistant's message that is still being written, if the last one is."""
        messages = self._request.messages
        return messages[-1] if messages and messages[-1].role == inference_pb2.ROLE_ASSISTANT else None

    def _new_turn(self, item: Fields) -> inference_pb2.ChatMessage:
        return self._add(inference_pb2.ROLE_ASSISTANT, item)

    def _add(self, role: "inference_pb2.Role.ValueType", item: Fields) -> inference_pb2.ChatMessage:
        return self._options.add_message(self._request, role, item.path)
