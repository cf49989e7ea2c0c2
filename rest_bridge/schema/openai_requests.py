"""The bodies that OpenAI's clients send. What a field does is in `openai.field_lists`."""

from typing import Any, Literal

from pydantic import Field

from rest_bridge.openai.reasoning import EFFORTS
from rest_bridge.schema.base import OpenRequest


class FunctionCall(OpenRequest):
    name: str = Field(min_length=1)
    arguments: str | None = None
    """JSON text."""


class ToolCall(OpenRequest):
    """A call that the assistant made earlier."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class ImageUrl(OpenRequest):
    url: str = Field(pattern=r"^(data:|https?://)")
    """A data URL with base64 (PNG, JPEG, WebP, GIF), or an http or https URL that leads to a public address."""
    detail: Literal["auto", "low", "high"] | None = None


class TextPart(OpenRequest):
    type: Literal["text"]
    text: str


class ImagePart(OpenRequest):
    type: Literal["image_url"]
    image_url: ImageUrl


class RefusalPart(OpenRequest):
    type: Literal["refusal"]
    refusal: str


class ChatMessage(OpenRequest):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart | ImagePart | RefusalPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    """The call that a message of the role `tool` answers."""
    reasoning_content: str | None = None
    """What the assistant thought, handed to templates that take it; `reasoning` is the same."""
    reasoning: str | None = None
    refusal: str | None = None


class Function(OpenRequest):
    name: str = Field(pattern="^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON Schema; nested at most 64 levels deep."""
    strict: bool | None = None
    """Enforce the schema while decoding."""


class Tool(OpenRequest):
    type: Literal["function"] | None = None
    function: Function


class FunctionName(OpenRequest):
    name: str = Field(min_length=1)


class NamedTool(OpenRequest):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(OpenRequest):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1)


class AllowedToolChoice(OpenRequest):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class TextFormat(OpenRequest):
    type: Literal["text", "json_object"]


class JsonSchema(OpenRequest):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(OpenRequest):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class StructuredOutputs(OpenRequest):
    """What the whole text must be: one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None


class StreamOptions(OpenRequest):
    include_usage: bool | None = None
    """A last chunk without choices has the usage."""
    include_obfuscation: bool | None = None


class Sampled(OpenRequest):
    """What chats and completions share."""

    model: str | None = Field(None, examples=["demo"])
    max_tokens: int | None = Field(None, ge=1, le=16384)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    repetition_context_size: int | None = Field(None, ge=0, le=16384)
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    max_completion_tokens: int | None = Field(None, ge=1, le=16384)
    n: int | None = Field(None, ge=1, le=16)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: TextFormat | JsonSchemaFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None
    priority: int | None = Field(None, ge=-100, le=100)
    keep_alive: int | str | None = Field(None, examples=["5m", 0, -1])
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    safety_identifier: str | None = None
    moderation: Any = None


class ChatCompletionRequest(Sampled):
    messages: list[ChatMessage] = Field(
        min_length=1,
        max_length=2048,
        examples=[[{"role": "user", "content": "What is the capital of France?"}]],
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["auto", "none", "required"] | NamedTool | AllowedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal[EFFORTS] | None = None  # type: ignore[valid-type]
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_thinking_tokens: int | None = Field(None, ge=0, le=16384)
    thinking_budget: int | None = Field(None, ge=0, le=16384)
    modalities: list[Literal["text"]] | None = None
    verbosity: str | None = None


class CompletionRequest(Sampled):
    max_tokens: int | None = Field(None, ge=0, le=16384)
    """0 only with `echo`."""
    prompt: str | list[str] | list[int] | list[list[int]] = Field(examples=["The capital of France is"])
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)


class EmbeddingRequest(OpenRequest):
    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]] = Field(examples=["A sentence."])
    """A text, several (at most 2,048), token ids, or several lists of them."""
    dimensions: int | None = Field(None, ge=1, lt=2**31)
    """Keep so many leading numbers of each vector, normalised again."""
    encoding_format: Literal["float", "base64"] | None = None
    priority: int | None = Field(None, ge=-100, le=100)
    keep_alive: int | str | None = None
    user: str | None = None


class DocumentText(OpenRequest):
    text: str


class RerankRequest(OpenRequest):
    model: str | None = None
    query: str = Field(min_length=1, examples=["What is the capital of France?"])
    documents: list[str | DocumentText] = Field(
        min_length=1, max_length=2048, examples=[["Paris.", "A cat."]]
    )
    top_n: int | None = Field(None, ge=1, lt=2**31)
    """Answer only so many best documents."""
    return_documents: bool | None = None
    """Repeat each document beside its score."""
    priority: int | None = Field(None, ge=-100, le=100)
    keep_alive: int | str | None = None
    user: str | None = None
