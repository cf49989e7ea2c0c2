"""The messages between the control process and a worker.

A frame is a 4-byte little-endian length and one msgpack-encoded struct. Only plain data crosses: str, int,
float, bytes. The worker sends at most one `Step` per engine step, with the tokens of every row in it.
"""

import struct
from collections.abc import Iterator
from typing import Literal

import msgspec

MAX_FRAME_BYTES = 80 * 1024 * 1024
"""A request may carry 64 MiB; anything beyond this is not a frame of ours."""

PRIORITY_SECONDS = 1.0
"""Waiting time that a point of priority is worth, in every queue: who waits long enough comes before any priority."""

_LENGTH = struct.Struct("<I")


class Constraint(msgspec.Struct, array_like=True, frozen=True):
    """What the text of a row must be: a JSON object, an instance of a JSON Schema, or what a regular expression or
    a Lark grammar matches; `text` is the schema, the expression or the grammar."""

    kind: Literal["json_object", "json_schema", "regex", "grammar"]
    text: str = ""


class ToolUse(msgspec.Struct, array_like=True, frozen=True):
    """How the tools of a prompt may be called; the tools themselves are in the prompt, `strict` among their fields."""

    is_required: bool = False
    function: str = ""  # the one that has to be called
    is_parallel: bool = True  # several calls in one reply


ModelKind = Literal["text", "vision", "embedding", "reranker"]
"""What a worker loads, in the words of `model_types.py`."""


class Sampling(msgspec.Struct, array_like=True, frozen=True):
    """How one row picks its tokens; `max_tokens` 0 means what the context leaves.

    None means what the checkpoint's generation_config.json recommends, else what is named here.
    """

    max_tokens: int = 0
    temperature: float | None = None  # 0, greedy
    top_p: float | None = None  # 1, off
    top_k: int | None = None  # 0, off
    min_p: float | None = None  # 0, off
    repetition_penalty: float | None = None  # 1, off
    repetition_context_size: int = 20
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logit_bias: dict[int, float] = {}
    top_logprobs: int | None = None  # None, no log-probabilities at all; 0, those of the chosen tokens only
    max_thinking_tokens: int | None = None  # 0, no thinking; None, no limit of its own
    constraint: Constraint | None = None


class Image(msgspec.Struct, array_like=True, frozen=True):
    """A decoded picture: `height` x `width` x 3 bytes of sRGB, rows from the top."""

    width: int
    height: int
    pixels: bytes
    detail: Literal["auto", "low", "high"] = "auto"


class Prompt(msgspec.Struct, array_like=True, frozen=True):
    """What a row starts from: exactly one of `messages` (JSON, for the chat template), `text`, `token_ids`.

    Where the messages have images their content is a list of parts, `{"type": "image"}` for each of `images` in turn.
    """

    messages: bytes = b""
    tools: bytes = b""
    template_arguments: bytes = b""
    text: str | None = None
    token_ids: tuple[int, ...] = ()
    images: tuple[Image, ...] = ()


# Control process to worker.


class Load(msgspec.Struct, tag="load", array_like=True, frozen=True):
    """Load the checkpoint in the folder `view`; a worker does this once in its life."""

    view: str
    kind: ModelKind = "text"
    tokenizer_only: bool = False
    max_rows: int = 32
    kv_budget_bytes: int = 0  # 0, no limit
    context_limit: int = 0  # most tokens of a row; 0, what the model was made for
    use_gpu: bool = True


class Submit(msgspec.Struct, tag="submit", array_like=True, frozen=True):
    """Generate for one prompt: a row per entry of `keys`, which differ in nothing but their noise."""

    keys: tuple[int, ...]
    prompt: Prompt
    sampling: Sampling
    priority: int = 0
    tool_use: ToolUse | None = None  # None: what looks like a tool call is text
    echo: bool = False  # the text of each row begins with the prompt's
    is_scored_only: bool = False  # each row ends with its prefill, whatever `sampling.max_tokens` says


class Cancel(msgspec.Struct, tag="cancel", array_like=True, frozen=True):
    """Nobody waits for these rows any more; unknown keys are ignored."""

    keys: tuple[int, ...]


class Pause(msgspec.Struct, tag="pause", array_like=True, frozen=True):
    """The reader of this row is slow: take it out of the batch, keep its cache."""

    key: int


class Resume(msgspec.Struct, tag="resume", array_like=True, frozen=True):
    """The reader caught up: the row decodes on."""

    key: int


class Count(msgspec.Struct, tag="count", array_like=True, frozen=True):
    """How many tokens is this prompt? Answered by `Counted` or `Failed`."""

    key: int
    prompt: Prompt


class Embed(msgspec.Struct, tag="embed", array_like=True, frozen=True):
    """Make a vector of each prompt. Answered by `Embedded` or `Failed`."""

    key: int
    prompts: tuple[Prompt, ...]
    dimensions: int = 0  # keep so many leading numbers of each, and normalise again; 0, all
    priority: int = 0


class Rerank(msgspec.Struct, tag="rerank", array_like=True, frozen=True):
    """Score how well each document answers the query. Answered by `Reranked` or `Failed`."""

    key: int
    query: str
    documents: tuple[str, ...]
    priority: int = 0


class AskUsage(msgspec.Struct, tag="usage?", array_like=True, frozen=True):
    """Send a `Usage` between two steps."""


class Limits(msgspec.Struct, tag="limits", array_like=True, frozen=True):
    """From now on at most so many rows decode at once, and their caches take at most so many bytes (0: any)."""

    max_rows: int
    kv_budget_bytes: int


Command = Load | Submit | Cancel | Pause | Resume | Count | Embed | Rerank | AskUsage | Limits


# Worker to control process.


class Ready(msgspec.Struct, tag="ready", array_like=True, frozen=True):
    """Imports are done and an operation ran on `device`: the worker can load."""

    device: str
    versions: dict[str, str]
    device_name: str = ""
    device_memory_bytes: int = 0  # what MLX recommends to use of a GPU's; a CPU has no such figure
    is_gpu: bool = False


class Loaded(msgspec.Struct, tag="loaded", array_like=True, frozen=True):
    """The model is in memory and warm."""

    context_length: int
    batchable: bool
    weight_bytes: int
    load_seconds: float
    kv_bytes_per_token: int = 0  # what a row's cache grows by, all layers together; 0, unknown
    active_bytes: int = 0  # what MLX holds now
    notes: tuple[str, ...] = ()  # what a user should know of how this model is served here, as sentences
    warnings: tuple[str, ...] = ()  # of those, what every answer has to say
    tool_format: str = ""  # name of mlx-lm's parser of its tool calls; empty, none is known
    can_think: bool = False  # it marks its thinking


class Warming(msgspec.Struct, tag="warming", array_like=True, frozen=True):
    """The weights are in memory; the model runs for the first time."""


class Accepted(msgspec.Struct, tag="accepted", array_like=True, frozen=True):
    """The prompt is tokenized and fits; the rows wait for their prefill."""

    keys: tuple[int, ...]
    prompt_token_count: int


class Prefilled(msgspec.Struct, tag="prefilled", array_like=True, frozen=True):
    """Progress of a prompt long enough to be prefilled in chunks."""

    keys: tuple[int, ...]
    done_token_count: int
    total_token_count: int


class Spent(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """Where the time of a row went, in seconds; `queue` ends when its prefill begins."""

    queue: float
    prefill: float
    decode: float


class ToolCallPart(msgspec.Struct, array_like=True, frozen=True):
    """A part of one tool call of a row: `id` and `name` in its first part only, `arguments` to be appended."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class Logprob(msgspec.Struct, array_like=True, frozen=True):
    """One token's natural log-probability at temperature 1, before penalties, bias and constraint."""

    token: int
    text: str
    bytes: bytes
    logprob: float | None  # None for the first token of a prompt, which nothing predicts
    top: tuple["Logprob", ...] = ()  # the likeliest at this place, likeliest first


class PieceExtra(msgspec.Struct, array_like=True):
    """What most pieces do not have.

    A piece does not say in which order its kinds came: it is taken for reasoning, then text, then calls, and differs
    only where one token completes several, as the end of a call with what follows it.
    """

    reasoning: str = ""
    reasoning_token_count: int = 0
    tool_calls: tuple[ToolCallPart, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: tuple[Logprob, ...] = ()
    warnings: tuple[str, ...] = ()


class Piece(msgspec.Struct, array_like=True, gc=False):
    """One row's share of a step: text that is final, and how many tokens were decoded for it."""

    key: int
    token_count: int
    text: str
    finish: Literal["", "stop", "length", "tool_calls"] = ""
    stop_match: str = ""
    spent: Spent | None = None
    extra: PieceExtra | None = None


class Step(msgspec.Struct, tag="step", array_like=True, gc=False):
    """What one engine step brought."""

    pieces: list[Piece]


class Failed(msgspec.Struct, tag="failed", array_like=True, frozen=True):
    """These rows (or this count, or with no keys the load) end with an error of `errors.BY_REASON`."""

    keys: tuple[int, ...]
    reason: str
    message: str
    field: str = ""


class Counted(msgspec.Struct, tag="counted", array_like=True, frozen=True):
    """The answer to `Count`."""

    key: int
    token_count: int
    warnings: tuple[str, ...] = ()  # what of the prompt is not heeded, as sentences


class Embedded(msgspec.Struct, tag="embedded", array_like=True, frozen=True):
    """The answer to `Embed`: the vectors of all prompts one after the other, float32, little-endian."""

    key: int
    dimensions: int
    vectors: bytes
    prompt_token_count: int
    queue_seconds: float
    compute_seconds: float


class Reranked(msgspec.Struct, tag="reranked", array_like=True, frozen=True):
    """The answer to `Rerank`: a score from 0 to 1 for each document, in their order."""

    key: int
    scores: tuple[float, ...]
    prompt_token_count: int
    queue_seconds: float
    compute_seconds: float


class Usage(msgspec.Struct, tag="usage", array_like=True, frozen=True):
    """What the worker holds: MLX's own counts and the rows at each stage.

    Sent when asked for, at most once a second while it works, and once when it falls idle.
    """

    active_bytes: int
    cache_bytes: int  # freed by arrays, kept by MLX for the next ones
    peak_bytes: int
    kv_bytes: int
    running_count: int
    waiting_count: int
    preempted_count: int  # how often a row made room for others, since the load
    work_count: int  # tokens prefilled or decoded since the load: while it stands still, nothing gets done
    is_answer: bool = False  # to `AskUsage`


Answer = Counted | Embedded | Reranked
"""An event that answers a command with one key and ends it."""
Event = Ready | Warming | Loaded | Accepted | Prefilled | Step | Failed | Answer | Usage

_encoder = msgspec.msgpack.Encoder()
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_event = msgspec.msgpack.Decoder(Event).decode


def encode(message: Command | Event) -> bytes:
    """One whole frame."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameBuffer:
    """Cuts a byte stream into frame bodies."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies that `data` completes; raises ValueError on a length no frame of ours has."""
        buffer = self._bytes
        buffer += data
        start, end = 0, len(buffer)
        while end - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes is not one of ours")
            if end - start - _LENGTH.size < length:
                break
            start += _LENGTH.size
            yield bytes(memoryview(buffer)[start : start + length])
            start += length
        del buffer[:start]
