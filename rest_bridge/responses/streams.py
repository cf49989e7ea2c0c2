"""Responses as server-sent events, each with its type and number."""

from collections.abc import Iterable, Iterator

from mlxgui.v1 import inference_pb2
from rest_bridge import sse
from rest_bridge.blocks import Begun, Block, Closed, Grown, Opened, Over, Reply
from rest_bridge.errors import ApiError, JsonObject
from rest_bridge.responses.answers import (
    failed_body,
    final_body,
    item_id,
    logprob_entries,
    output_item,
    running_body,
    text_part,
)
from rest_bridge.responses.requests import ResponseOptions


def response_stream(
    events: Iterable[inference_pb2.ChatStreamResponse], options: ResponseOptions, fingerprint: str
) -> sse.Stream:
    """The events of a response. A failure is an `error` and then `response.failed`, which ends it."""
    stream = _ResponseStream(options)
    return sse.Stream(stream.events(events), stream.failure, end=b"")


class _ResponseStream:
    def __init__(self, options: ResponseOptions) -> None:
        self._options = options
        self._reply = Reply()
        self._number = 0

    def events(self, events: Iterable[inference_pb2.ChatStreamResponse]) -> Iterator[bytes]:
        for step in self._reply.read(events):
            match step:
                case Grown(block, piece, logprobs):
                    yield self._grown(block, piece, logprobs)
                case Opened(block):
                    yield from self._opened(block)
                case Closed(block):
                    yield from self._closed(block)
                case Begun():
                    body = running_body(self._reply, self._options)
                    warnings = self._options.told(self._reply.warnings)
                    if warnings:
                        body["warnings"] = warnings
                    yield self._event("response.created", response=body)
                    yield self._event("response.in_progress", response=body)
                case Over():
                    body = final_body(self._reply, self._options)
                    yield self._event(f"response.{body['status']}", response=body)

    def failure(self, error: ApiError) -> bytes:
        """What ends the stream instead: flat as documented, and nested as OpenAI's SDK looks for it."""
        details = error.openai_error()
        flat = {key: details[key] for key in ("code", "message", "param")}
        body = failed_body(self._reply, self._options, error)
        return self._event("error", **flat, error=details) + self._event("response.failed", response=body)

    def _opened(self, block: Block) -> Iterator[bytes]:
        item = output_item(block, self._reply)
        item["status"] = "in_progress"
        if block.kind != "call":
            item["content"] = []
        yield self._event("response.output_item.added", output_index=block.index, item=item)
        if block.kind != "call":
            yield self._part_event("response.content_part.added", block, part=_part(block))

    def _grown(self, block: Block, piece: str, logprobs: Iterable[object]) -> bytes:
        match block.kind:
            case "text":
                # Nearly every event is one of these.
                head = self._head("response.output_text.delta", block)
                entries = sse.encode(logprob_entries(logprobs)) if logprobs else "[]"  # type: ignore[arg-type]
                return f'{head},"content_index":0,"delta":{sse.encode(piece)},"logprobs":{entries}}}\n\n'.encode()
            case "reasoning":
                head = self._head("response.reasoning_text.delta", block)
                return f'{head},"content_index":0,"delta":{sse.encode(piece)}}}\n\n'.encode()
        head = self._head("response.function_call_arguments.delta", block)
        return f'{head},"delta":{sse.encode(piece)}}}\n\n'.encode()

    def _closed(self, block: Block) -> Iterator[bytes]:
        match block.kind:
            case "text":
                part = text_part(block)
                more = {"text": part["text"], "logprobs": part["logprobs"]}
                yield self._part_event("response.output_text.done", block, **more)
            case "reasoning":
                yield self._part_event("response.reasoning_text.done", block, text=block.content)
            case "call":
                yield self._event(
                    "response.function_call_arguments.done",
                    item_id=item_id(block, self._reply),
                    output_index=block.index,
                    name=block.name,
                    arguments=block.content,
                )
        if block.kind != "call":
            yield self._part_event("response.content_part.done", block, part=_part(block))
        item = output_item(block, self._reply)
        yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _part_event(self, kind: str, block: Block, **more: object) -> bytes:
        place = {"item_id": item_id(block, self._reply), "output_index": block.index, "content_index": 0}
        return self._event(kind, **place, **more)

    def _event(self, kind: str, **more: object) -> bytes:
        payload: JsonObject = {"type": kind, "sequence_number": self._take_number(), **more}
        return sse.event(payload, kind)

    def _head(self, kind: str, block: Block) -> str:
        place = f'"item_id":"{item_id(block, self._reply)}","output_index":{block.index}'
        return f'event: {kind}\ndata: {{"type":"{kind}","sequence_number":{self._take_number()},{place}'

    def _take_number(self) -> int:
        number, self._number = self._number, self._number + 1
        return number


def _part(block: Block) -> JsonObject:
    return text_part(block) if block.kind == "text" else {"type": "reasoning_text", "text": block.content}
