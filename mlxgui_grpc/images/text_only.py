"""Prompts with images for a model that has no eyes. Light: the workers import it too."""

import json

import msgspec

from mlxgui_grpc.engine import frames


def without_images(prompt: frames.Prompt) -> frames.Prompt:
    """The prompt for a model that reads text only: the parts of each message as one text."""
    if not prompt.messages:
        return msgspec.structs.replace(prompt, images=())
    messages = json.loads(prompt.messages)
    for message in messages:
        if isinstance(message.get("content"), list):
            texts = [part["text"] for part in message["content"] if part["type"] == "text"]
            message["content"] = "\n".join(texts)
    encoded = json.dumps(messages, ensure_ascii=False).encode()
    return msgspec.structs.replace(prompt, messages=encoded, images=())
