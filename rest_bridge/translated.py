"""Options of a dialect whose messages are not one to one those of the contract."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mlxgui.v1 import inference_pb2
from rest_bridge.json_body import Fields
from rest_bridge.openai import Options

_PART = re.compile(r"(?<![\w.])messages\[\d+\](?:\.content\[\d+\])?")


@dataclass
class MessageNames:
    """What the caller calls a message of the contract and the fields in it, by their paths in the message."""

    name: str
    fields: dict[str, str] = field(default_factory=dict)


@dataclass
class TranslatedOptions(Options):
    """Notes where each message came from, so that an error can name the caller's own field."""

    messages: list[MessageNames] = field(default_factory=list)

    def add_message(
        self, request: inference_pb2.ChatRequest, role: "inference_pb2.Role.ValueType", name: str
    ) -> inference_pb2.ChatMessage:
        """A new message of the request, which the caller calls `name`, as it does its fields unless noted."""
        self.messages.append(MessageNames(name))
        return request.messages.add(role=role)

    def add_part(
        self,
        message: inference_pb2.ChatMessage,
        part: inference_pb2.ContentPart,
        name: str,
        source: str | None = None,
    ) -> None:
        """One more part of the request's last message, which the caller calls `name`, and an image's `source`."""
        path = f"content[{len(message.content)}]"
        message.content.append(part)
        self.note(path, name)
        if source is not None:
            self.note(f"{path}.image", source)

    def note(self, path: str, name: str) -> None:
        """The caller calls the field at `path` in the request's last message `name`, and what is in it too."""
        self.messages[-1].fields[path] = name

    def told(self, warnings: Iterable[str]) -> list[str]:
        return [
            *self.warnings,
            *(_PART.sub(lambda path: self.param(path[0]) or "", said) for said in warnings),
        ]

    def param(self, path: str | None) -> str | None:
        message = re.match(r"(?:request\.)?messages\[(\d+)\]\.?", path or "")
        if path is None or message is None or int(message[1]) >= len(self.messages):
            return super().param(path)
        names, rest = self.messages[int(message[1])], path[message.end() :]
        noted = rest
        while noted and noted not in names.fields:
            # One member or index less.
            noted = re.sub(r"[.\[]?[^.\[]*$", "", noted)
        if noted:
            return names.fields[noted]
        return f"{names.name}.{rest}" if rest else names.name


def unread_warnings(fields: Fields, without_effect: Mapping[str, str]) -> list[str]:
    """A sentence for each field that nothing has asked for, at any depth, the same one once.

    `without_effect` has the reasons, by a field's own name.
    """
    sentences: dict[str, None] = {}
    for path in fields.unread():
        name = path.rpartition(".")[2]
        if name in without_effect:
            sentences[f"`{name}` has no effect: {without_effect[name]}."] = None
        else:
            sentences[f"`{path[:128]}` is unknown and has no effect."] = None
    return list(sentences)
