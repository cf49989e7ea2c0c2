"""Answers as server-sent events."""

from collections.abc import Iterable, Iterator

from mlxgui.v1 import common_pb2, inference_pb2
from rest_bridge import sse
from rest_bridge.errors import JsonObject
from rest_bridge.openai.answers import FINISH_REASONS, head, reasoning, stop_reason, with_usage
from rest_bridge.openai.logprobs import chat_logprobs, text_logprobs
from rest_bridge.openai.options import Options
from rest_bridge.openai.tools import tool_call_delta


def chat_events(
    replies: Iterable[inference_pb2.ChatStreamResponse], options: Options, fingerprint: str
) -> Iterator[bytes]:
    """The server-sent events of a chat, the last [DONE] aside."""
    chunk = _ChunkMaker("chatcmpl-", "chat.completion.chunk", options, fingerprint)
    encode = sse.encode
    # Between these two stands the text of nearly every event; a dict per token would cost ten times as much.
    prefixes: list[str] = []
    suffix = ""
    finish: JsonObject | None = None
    # Choices that have said nothing yet. Where one never does its text is empty, not null as beside tool calls.
    silent = set(range(options.choice_count))
    try:
        for reply in replies:
            event = reply.WhichOneof("event")
            # Held back for one event: the end, which mostly comes with it, may bring warnings to put there.
            if finish is not None:
                yield chunk.choice(finish, reply.end.warnings)
                finish = None
            if event == "delta":
                delta = reply.delta
                text = delta.text
                if text and not (delta.reasoning or delta.tool_calls or delta.logprobs):
                    silent.discard(delta.index)
                    yield f"{prefixes[delta.index]}{encode(text)}{suffix}".encode()
                    continue
                if text or delta.tool_calls:
                    silent.discard(delta.index)
                choice = _chat_delta(delta, options.logprobs)
                if choice is not None:
                    yield chunk.choice(choice)
            elif event == "start":
                chunk.start(reply.start)
                for index in range(options.choice_count):
                    prefix, suffix = chunk.around(
                        {"index": index, "delta": {"content": "\0"}, "finish_reason": None}
                    )
                    prefixes.append(prefix)
                    role = {"index": index, "delta": {"role": "assistant"}, "finish_reason": None}
                    yield chunk.choice(role, options.told(reply.start.warnings) if index == 0 else ())
            elif event == "finish":
                finish = {
                    "index": reply.finish.index,
                    "delta": {"content": ""} if reply.finish.index in silent else {},
                    "finish_reason": FINISH_REASONS.get(reply.finish.finish_reason),
                    **stop_reason(reply.finish),
                }
            elif event == "end" and options.include_usage:
                yield chunk.usage(reply.end.usage)
    except Exception:
        if finish is not None:
            yield chunk.choice(finish)
        raise


def completion_events(
    replies: Iterable[inference_pb2.GenerateStreamResponse], options: Options, fingerprint: str
) -> Iterator[bytes]:
    """The server-sent events of a continuation, the last [DONE] aside."""
    chunk = _ChunkMaker("cmpl-", "text_completion", options, fingerprint)
    encode = sse.encode
    around: dict[int, tuple[str, str]] = {}
    offsets: dict[int, int] = {}
    warnings: list[str] = []
    finish: JsonObject | None = None
    try:
        for reply in replies:
            event = reply.WhichOneof("event")
            # Held back for one event, as in a chat.
            if finish is not None:
                yield chunk.choice(finish, [*warnings, *reply.end.warnings])
                finish, warnings = None, []
            if event == "delta":
                delta = reply.delta
                index = delta.index
                text = delta.text
                if options.logprobs:
                    entries = [*delta.prompt_logprobs, *delta.logprobs]
                    logprobs, offsets[index] = text_logprobs(entries, offsets.get(index, 0))
                    yield chunk.choice(
                        {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
                    )
                elif text:
                    if index not in around:
                        choice = {"index": index, "text": "\0", "logprobs": None, "finish_reason": None}
                        around[index] = chunk.around(choice)
                    prefix, suffix = around[index]
                    yield f"{prefix}{encode(text)}{suffix}".encode()
            elif event == "start":
                chunk.start(reply.start)
                warnings = options.told(reply.start.warnings)
            elif event == "finish":
                finish = {
                    "index": reply.finish.index,
                    "text": "",
                    "logprobs": None,
                    "finish_reason": FINISH_REASONS.get(reply.finish.finish_reason),
                    **stop_reason(reply.finish),
                }
            elif event == "end" and options.include_usage:
                yield chunk.usage(reply.end.usage)
    except Exception:
        if finish is not None:
            yield chunk.choice(finish, warnings)
        raise


class _ChunkMaker:
    """Makes the chunks of one stream, which all begin alike."""

    def __init__(self, id_prefix: str, kind: str, options: Options, fingerprint: str) -> None:
        self._id_prefix = id_prefix
        self._kind = kind
        self._options = options
        self._fingerprint = fingerprint
        self._head: JsonObject = {}

    def start(self, start: inference_pb2.StreamStart) -> None:
        self._head = head(self._id_prefix, start, self._kind, self._options, self._fingerprint)

    def choice(self, choice: JsonObject, warnings: Iterable[str] = ()) -> bytes:
        chunk = {**self._head, "choices": [choice]}
        if self._options.include_usage:
            chunk["usage"] = None
        sentences = list(warnings)
        if sentences:
            chunk["warnings"] = sentences
        return sse.event(chunk)

    def usage(self, usage: common_pb2.Usage) -> bytes:
        return sse.event(with_usage({**self._head, "choices": []}, usage, []))

    def around(self, choice: JsonObject) -> tuple[str, str]:
        """The event of a choice whose one text is NUL, as what stands before and after the text."""
        before, after = self.choice(choice).decode().split(r'"\u0000"')
        return before, after


def _chat_delta(delta: inference_pb2.ChatDelta, with_logprobs: bool) -> JsonObject | None:
    """A choice of a chunk with whatever the delta brings. None: nothing."""
    content: JsonObject = {}
    if delta.reasoning:
        content.update(reasoning(delta.reasoning))
    if delta.text:
        content["content"] = delta.text
    if delta.tool_calls:
        content["tool_calls"] = [tool_call_delta(call) for call in delta.tool_calls]
    choice: JsonObject = {"index": delta.index, "delta": content}
    if with_logprobs:
        choice["logprobs"] = chat_logprobs(delta.logprobs) if delta.logprobs else None
    choice["finish_reason"] = None
    return choice if content or choice.get("logprobs") else None
