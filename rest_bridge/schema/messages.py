"""Anthropic's Messages API: what `/v1/messages` and the count of its tokens take and answer."""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from rest_bridge.schema.base import Answer, OpenRequest, sometimes


class BlockParam(OpenRequest):
    """A text, an image, a result of a tool, or a block of an earlier answer."""

    type: Literal["text", "image", "tool_result", "tool_use", "thinking", "redacted_thinking"]
    text: str | None = None
    source: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[dict[str, Any]] | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    thinking: str | None = None


class MessageParam(OpenRequest):
    role: Literal["user", "assistant", "system"]
    content: str | list[BlockParam]


class MessageTool(OpenRequest):
    name: str = Field(pattern="^[A-Za-z0-9_-]{1,64}$")
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    description: str | None = None
    strict: bool | None = None


class MessageToolChoice(OpenRequest):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(OpenRequest):
    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = None


class CountRequest(OpenRequest):
    model: str | None = Field(None, examples=["demo"])
    messages: list[MessageParam] = Field(
        min_length=1, examples=[[{"role": "user", "content": "What is the capital of France?"}]]
    )
    system: str | list[BlockParam] | None = None
    tools: list[MessageTool] | None = Field(None, max_length=128)
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None
    """The older name of `output_config.format`."""


class MessageRequest(CountRequest):
    max_tokens: int = Field(ge=1, le=16384)
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)


class TextBlock(Answer):
    type: Literal["text"]
    text: str


class ThinkingBlock(Answer):
    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(Answer):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ThinkingTokens(Answer):
    thinking_tokens: int


class MessageUsage(Answer):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens = sometimes()


class Message(Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: (
        Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"] | None
    )
    stop_sequence: str | None
    usage: MessageUsage
    warnings: list[str] = sometimes()


class MessageEvent(Answer):
    """One event, named as its `type`."""

    model_config = ConfigDict(extra="allow")

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "ping",
    ]
    message: Message = sometimes()
    content_block: TextBlock | ThinkingBlock | ToolUseBlock = sometimes()


class TokenCount(Answer):
    input_tokens: int
    warnings: list[str] = sometimes()


class ErrorDetails(Answer):
    error_code: str
    unsupported: list[str] = sometimes()
    param: str = sometimes()


class MessageFault(Answer):
    type: str
    message: str
    details: ErrorDetails


class MessageErrorEvent(Answer):
    """An error after the first event of a stream, which it ends."""

    type: Literal["error"]
    error: MessageFault


class MessageError(MessageErrorEvent):
    """An error in Anthropic's form."""

    request_id: str
