"""The Responses API: what `/v1/responses` takes and answers."""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from rest_bridge.schema.base import Answer, OpenRequest, sometimes
from rest_bridge.schema.openai_answers import RankedToken
from rest_bridge.schema.openai_requests import NamedTool


class InputPart(OpenRequest):
    type: Literal["input_text", "output_text", "text", "refusal", "input_image"]
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    detail: Literal["auto", "low", "high"] | None = None


class InputItem(OpenRequest):
    """A message, a call, its output, or what the model thought: also the items of an earlier answer."""

    type: Literal["message", "reasoning", "function_call", "function_call_output"] | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[InputPart | dict[str, Any]] | None = None
    summary: list[dict[str, Any]] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None


class ResponseTool(OpenRequest):
    type: Literal["function"]
    name: str = Field(pattern="^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(OpenRequest):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseText(OpenRequest):
    format: ResponseFormat | None = None


class ResponseReasoning(OpenRequest):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class ResponseRequest(OpenRequest):
    """Stateless: no answer is stored, the whole conversation comes as `input`."""

    model: str | None = Field(None, examples=["demo"])
    input: str | list[InputItem] = Field(examples=["What is the capital of France?"])
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=16384)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[str] | None = None
    stream: bool | None = None
    text: ResponseText | None = None
    reasoning: ResponseReasoning | None = None
    tools: list[ResponseTool] | None = Field(None, max_length=128)
    tool_choice: Literal["auto", "none", "required"] | ResponseTool | NamedTool | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


class OutputText(Answer):
    type: Literal["output_text"]
    annotations: list[Any]
    logprobs: list[RankedToken]
    text: str


class ReasoningText(Answer):
    type: Literal["reasoning_text"]
    text: str


class OutputMessage(Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    content: list[OutputText]
    status: Literal["in_progress", "completed", "incomplete"]


class ReasoningItem(Answer):
    id: str
    type: Literal["reasoning"]
    summary: list[Any]
    content: list[ReasoningText]
    status: Literal["in_progress", "completed", "incomplete"]


class FunctionCallItem(Answer):
    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"]


class InputTokens(Answer):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokens(Answer):
    reasoning_tokens: int


class ResponseUsage(Answer):
    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int


class IncompleteDetails(Answer):
    reason: Literal["max_output_tokens"]


class ResponseFailure(Answer):
    code: str
    message: str


class Response(Answer):
    """The answer; besides this it repeats the fields of its request."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputMessage | ReasoningItem | FunctionCallItem]
    usage: ResponseUsage | None
    warnings: list[str] = sometimes()


class ResponseEvent(Answer):
    """One event, named as its `type`; those of the life of the response hold it as `response`."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(pattern=r"^(response\.[a-z_.]+|error)$")
    sequence_number: int
    response: Response = sometimes()
    item: OutputMessage | ReasoningItem | FunctionCallItem = sometimes()
