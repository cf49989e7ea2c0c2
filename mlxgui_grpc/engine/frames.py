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


class Prompt(msgspec.Struct, array_like=True, frozen=True):
    """What a row starts from: exactly one of `messages` (JSON, for the chat template), `text`, `token_ids`."""

    messages: bytes = b""
    tools: bytes = b""
    template_arguments: bytes = b""
    text: str | None = None
    token_ids: tuple[int, ...] = ()


# Control process to worker.


class Load(msgspec.Struct, tag="load", array_like=True, frozen=True):
    """Load the checkpoint in the folder `view`; a worker does this once in its life."""

    view: str
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


class AskUsage(msgspec.Struct, tag="usage?", array_like=True, frozen=True):
    """Send a `Usage` between two steps."""


class Limits(msgspec.Struct, tag="limits", array_like=True, frozen=True):
    """From now on at most so many rows decode at once, and their caches take at most so many bytes (0: any)."""

    max_rows: int
    kv_budget_bytes: int


Command = Load | Submit | Cancel | Pause | Resume | Count | AskUsage | Limits


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


class Piece(msgspec.Struct, array_like=True, gc=False):
    """One row's share of a step: text that is final, and how many tokens were decoded for it."""

    key: int
    token_count: int
    text: str
    finish: Literal["", "stop", "length"] = ""
    stop_match: str = ""
    spent: Spent | None = None


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


Event = Ready | Warming | Loaded | Accepted | Prefilled | Step | Failed | Counted | Usage

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
