"""Puts the messages of a chat into the fields and the order that a model's template knows."""

import json
from collections.abc import Iterator
from typing import Any

from mlxgui_grpc.reply_facts import is_harmony_template

Message = dict[str, Any]


def adapted(messages: list[Message], template: str, *, has_tools: bool) -> list[Message]:
    """The messages as `template` takes them; empty: it is a module of mlx-lm, not a text. They may be changed."""
    if "developer" not in template:
        for message in messages:
            if message["role"] == "developer":  # OpenAI's newer name for it, which few templates know.
                message["role"] = "system"
    if not template:  # DeepSeek V3.2's: tools stand in a system message, and the arguments of calls are text.
        if has_tools and messages and all(message["role"] != "system" for message in messages):
            messages.insert(0, {"role": "system", "content": ""})
        for message in messages:
            for call in message.get("tool_calls", ()):
                function = call["function"]
                if not isinstance(function["arguments"], str):
                    function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    elif is_harmony_template(template):
        return [_with_thinking(message) for message in _one_call_each(_instructions_first(messages))]
    return messages


# gpt-oss's template: instructions come first, or not at all; of an assistant's message with calls it writes the first
# call, and before it the thinking or the content, as thinking, but raises where there are both; results belong to
# the call before them.


def _instructions_first(messages: list[Message]) -> list[Message]:
    """All system and developer messages as the first one."""
    given = [message for message in messages if message["role"] in ("system", "developer")]
    if len(given) <= 1 and (not given or messages[0] is given[0]):
        return messages
    text = "\n\n".join(message["content"] for message in given if message["content"])
    others = [message for message in messages if message["role"] not in ("system", "developer")]
    return [{"role": "developer", "content": text}, *others]


def _one_call_each(messages: list[Message]) -> Iterator[Message]:
    """Each call in a message of its own, and after it its results."""
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        calls = message.get("tool_calls", ())
        if len(calls) <= 1:
            yield message
            continue
        results: list[Message] = []
        while at < len(messages) and messages[at]["role"] == "tool":
            results.append(messages[at])
            at += 1
        for number, call in enumerate(calls):
            head = message if number == 0 else {"role": message["role"], "content": ""}
            yield {**head, "tool_calls": [call]}
            is_last = number == len(calls) - 1
            own = [each for each in results if is_last or each.get("tool_call_id", call["id"]) == call["id"]]
            if own and not is_last and "tool_call_id" not in own[0]:
                own = own[:1]  # Without ids they are in the order of the calls.
            yield from own
            results = [each for each in results if all(each is not one for one in own)]


def _with_thinking(message: Message) -> Message:
    thinking = message.get("reasoning_content", "")
    if not thinking:
        return message
    message = {**message, "thinking": thinking}
    if "tool_calls" in message and message["content"]:
        message |= {"thinking": f"{thinking}\n\n{message['content']}", "content": ""}
    return message
