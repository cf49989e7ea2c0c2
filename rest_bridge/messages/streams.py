"""Messages as server-sent events: blocks that start, grow and stop one after the other."""

from collections.abc import Iterable, Iterator

from mlxgui.v1 import inference_pb2
from rest_bridge import sse
from rest_bridge.blocks import Begun, Closed, Grown, Opened, Over, Reply
from rest_bridge.errors import ApiError
from rest_bridge.messages.answers import (
    content_block,
    ending,
    error_body,
    input_text,
    message_head,
    starting_usage,
    usage_json,
)
from rest_bridge.messages.requests import MessageOptions


def message_stream(
    events: Iterable[inference_pb2.ChatStreamResponse], options: MessageOptions, fingerprint: str
) -> sse.Stream:
    """The events of a message. The input of a tool comes in one piece, once it is known to be a JSON object."""
    return sse.Stream(_events(events, options), error_event, end=b"")


def error_event(error: ApiError) -> bytes:
    """What ends the stream instead of `message_stop`."""
    return sse.event(error_body(error), "error")


def _events(events: Iterable[inference_pb2.ChatStreamResponse], options: MessageOptions) -> Iterator[bytes]:
    reply = Reply()
    for step in reply.read(events):
        match step:
            case Grown(block, piece, _):
                # Nearly every event is one of these.
                if block.kind == "text" and piece:
                    delta = f'{{"type":"text_delta","text":{sse.encode(piece)}}}'
                    yield _delta(block.index, delta)
                elif block.kind == "reasoning":
                    delta = f'{{"type":"thinking_delta","thinking":{sse.encode(piece)}}}'
                    yield _delta(block.index, delta)
            case Opened(block):
                yield _event("content_block_start", index=block.index, content_block=content_block(block))
            case Closed(block):
                if block.kind == "call":
                    delta = f'{{"type":"input_json_delta","partial_json":{sse.encode(input_text(block))}}}'
                    yield _delta(block.index, delta)
                yield _event("content_block_stop", index=block.index)
            case Begun(start):
                message = {**message_head(reply, options), "usage": starting_usage(start)}
                warnings = options.told(start.warnings)
                if warnings:
                    message["warnings"] = warnings
                yield _event("message_start", message=message)
            case Over(end):
                more = {"warnings": list(end.warnings)} if end.warnings else {}
                yield _event(
                    "message_delta", delta=ending(reply, options), usage=usage_json(end.usage), **more
                )
                yield _event("message_stop")


def _event(kind: str, **more: object) -> bytes:
    return sse.event({"type": kind, **more}, kind)


def _delta(index: int, delta: str) -> bytes:
    head = '{"type":"content_block_delta"'
    return f'event: content_block_delta\ndata: {head},"index":{index},"delta":{delta}}}\n\n'.encode()
