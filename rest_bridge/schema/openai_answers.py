"""What OpenAI's routes answer, whole and as the chunks of a stream."""

from typing import Literal

from pydantic import Field

from rest_bridge.schema.base import Answer, sometimes

FinishReason = Literal["stop", "length", "tool_calls"]


class Error(Answer):
    """What OpenAI's clients read of an error."""

    message: str
    type: Literal[
        "invalid_request_error",
        "rate_limit_error",
        "server_error",
        "conflict",
        "permission_error",
        "authentication_error",
    ]
    param: str | None
    """The field at fault, as the caller wrote it."""
    code: str | None
    """The reason as a word, for example `model_not_found`."""


class OpenAIError(Answer):
    """An error on OpenAI's routes."""

    error: Error
    detail: str


class ErrorEvent(Answer):
    """An error after the first event of a stream; [DONE] follows."""

    error: Error


class PromptTokens(Answer):
    cached_tokens: int


class CompletionTokens(Answer):
    reasoning_tokens: int


class Usage(Answer):
    """Exact, as the model's tokenizer counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    completion_tokens_details: CompletionTokens


class Token(Answer):
    token: str
    logprob: float
    bytes: list[int]


class RankedToken(Token):
    top_logprobs: list[Token]


class ChatLogprobs(Answer):
    content: list[RankedToken]
    refusal: None


class AnsweredFunction(Answer):
    name: str
    arguments: str
    """JSON text, as the model wrote it."""


class AnsweredToolCall(Answer):
    id: str
    type: Literal["function"]
    function: AnsweredFunction


class AssistantMessage(Answer):
    role: Literal["assistant"]
    content: str | None
    """null where the reply only calls tools."""
    refusal: None
    reasoning_content: str = sometimes()
    reasoning: str = sometimes()
    """The same as `reasoning_content`."""
    tool_calls: list[AnsweredToolCall] = sometimes()


class ChatChoice(Answer):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str = sometimes()
    """The stop sequence that ended it."""


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    """Seconds since 1970."""
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    warnings: list[str] = sometimes()
    """Sentences about what had no effect; also in the header X-MLXGUI-Warnings."""


class FunctionDelta(Answer):
    name: str = sometimes()
    arguments: str


class ToolCallDelta(Answer):
    """`id`, `type` and `name` in the first part of a call; arguments to be appended."""

    index: int
    id: str = sometimes()
    type: Literal["function"] = sometimes()
    function: FunctionDelta


class Delta(Answer):
    role: Literal["assistant"] = sometimes()
    content: str = sometimes()
    reasoning_content: str = sometimes()
    reasoning: str = sometimes()
    tool_calls: list[ToolCallDelta] = sometimes()


class ChunkChoice(Answer):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None
    stop_reason: str = sometimes()


class ChatCompletionChunk(Answer):
    """One event: first the role of each choice, then its parts, then why it ended; last the usage, if wanted."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    warnings: list[str] = sometimes()


class TextLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Answer):
    index: int
    """Prompt's index * n + choice."""
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason
    stop_reason: str = sometimes()


class Completion(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage
    warnings: list[str] = sometimes()


class TextChunkChoice(Answer):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str = sometimes()


class CompletionChunk(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChunkChoice]
    usage: Usage | None = None
    warnings: list[str] = sometimes()


class Embedding(Answer):
    object: Literal["embedding"]
    embedding: list[float] | str
    """Numbers, or little-endian float32 in base64."""
    index: int


class EmbeddingUsage(Answer):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Answer):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    warnings: list[str] = sometimes()


class RankedText(Answer):
    text: str


class RankedDocument(Answer):
    index: int
    """Its place in the request."""
    relevance_score: float = Field(ge=0, le=1)
    document: RankedText = sometimes()


class Ranking(Answer):
    object: Literal["list"]
    model: str
    results: list[RankedDocument]
    usage: EmbeddingUsage
    warnings: list[str] = sometimes()


class OpenAIModel(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    permission: list[str]
    root: str
    parent: None
