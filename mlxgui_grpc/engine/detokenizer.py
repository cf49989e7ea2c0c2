"""Turns a row's tokens into text that is final: whole characters only, and nothing that may begin a stop string."""

import codecs
from typing import Any, Protocol

from tokenizers.decoders import DecodeStream

HALF = "\ufffd"
"""What the bytes of an unfinished character are decoded to."""
_EACH_BYTE = "mlxgui.each_byte"
"""The error handler of UTF-8 that makes a U+FFFD of each byte that is part of no character."""


def _replace_each(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError), "only decoding uses it"
    return HALF * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each)
_Utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Incremental text of one row. The texts it returns join to the decoding of all of its tokens.

    A character whose bytes are spread over several tokens comes when it is complete. Bytes that are no characters
    are U+FFFD. Where special tokens are not skipped, it is for the caller not to add those that text leaves out.
    """

    def __init__(
        self, tokenizer: Any, prompt_tail: list[int] | None = None, *, skip_special_tokens: bool = True
    ) -> None:
        # The tail of a raw prompt tells a SentencePiece decoder that the first token does not begin the text.
        stream = _FallbackText if falls_back_to_bytes(tokenizer) else _StreamedText
        text: _Text = stream(tokenizer, prompt_tail or [], skip_special_tokens)
        self.add = text.add
        """The text that a token completes, if any."""
        self.flush = text.flush
        """What is left at the end: bytes that never became a character are shown as U+FFFD."""


def falls_back_to_bytes(tokenizer: Any) -> bool:
    """Whether it has a token for each byte, which is what it says of characters that it lacks."""
    return tokenizer.decoder is not None and b'"ByteFallback"' in tokenizer.decoder.__getstate__()


class _Text(Protocol):
    """How one kind of tokenizer is decoded token by token."""

    def add(self, token: int) -> str: ...

    def flush(self) -> str: ...


class _StreamedText:
    """By the decoder of `tokenizers`."""

    def __init__(self, tokenizer: Any, prompt_tail: list[int], skip_special_tokens: bool) -> None:
        self._stream = DecodeStream(ids=prompt_tail or None, skip_special_tokens=skip_special_tokens)
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._pending: list[int] = []
        # A tail that ends inside a character is told again with the character's end: it is not part of the reply.
        tail: str = tokenizer.decode(prompt_tail, skip_special_tokens=skip_special_tokens)
        self._retold = tail if tail.endswith(HALF) else ""

    def add(self, token: int) -> str:
        text: str | None = self._stream.step(self._tokenizer, token)
        if text is None:
            self._pending.append(token)
            return ""
        self._pending.clear()
        if self._retold:
            whole = text.removeprefix(self._retold)
            text = whole if whole != text else text.removeprefix(self._retold.rstrip(HALF))
            self._retold = ""
        return text

    def flush(self) -> str:
        if not self._pending:
            return ""
        text: str = self._tokenizer.decode(self._pending, skip_special_tokens=self._skip_special_tokens)
        self._pending.clear()
        return text


class _FallbackText:
    """By hand, for tokenizers with a token for each byte.

    Theirs makes U+FFFD of the good characters too in a run of bytes with a bad one, and so takes back what it said;
    its stream raises then. Here, as in SentencePiece, a bad byte is one U+FFFD and a good character comes at once.
    """

    def __init__(self, tokenizer: Any, prompt_tail: list[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._bytes = _Utf8(_EACH_BYTE)
        self._context: list[int] = []
        """The last token that said something, or all of them: a decoder treats the first of a text differently."""
        self._context_text = ""
        self._retold = 0
        """Of the bytes held back, the prompt's."""
        for token in prompt_tail:
            self.add(token)
        self._retold = len(self._bytes.getstate()[0])

    def add(self, token: int) -> str:
        if (byte := _byte(self._tokenizer.id_to_token(token))) is None:
            both = self._decode([*self._context, token])
            text = both.removeprefix(self._context_text)
            if not text and (self._context_text or not self._decode([token, token])):
                return ""  # It is skipped: a character goes on after it.
            text = self._bytes.decode(b"", final=True) + text
            self._bytes.reset()
        elif self._context:
            text = self._bytes.decode(byte)
        else:  # A decoder may leave out the space that a text begins with.
            text = self._decode([token]) if byte < b"\x80" else self._bytes.decode(byte)
        self._context = [token] if self._context_text else [*self._context, token]
        self._context_text = self._decode(self._context)
        return self._without_retold(text)

    def flush(self) -> str:
        text = self._bytes.decode(b"", final=True)
        self._bytes.reset()
        return self._without_retold(text)

    def _without_retold(self, text: str) -> str:
        if text and self._retold:
            text, self._retold = text.removeprefix(HALF * self._retold), 0
        return text

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skip_special_tokens)
        return text


def _byte(token: str | None) -> bytes | None:
    """The byte that a token stands for, as <0x0A> does for a line break."""
    if token is None or len(token) != 6 or not token.startswith("<0x") or token[5] != ">":
        return None
    try:
        return bytes.fromhex(token[3:5])
    except ValueError:
        return None


class StopMatcher:
    """Holds back text that may turn out to be a stop string, so that none is ever delivered, nor a part of one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""

    def add(self, text: str) -> tuple[str, str]:
        """Take the next text; return (text that is final, the stop string that was found or "")."""
        if not self._stop:
            return text, ""
        held = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := held.find(stop)) >= 0]
        if found:
            # The one that is complete first, however the text was cut; of two, the longer.
            _, at, stop = min(found)
            self._held = ""
            return held[:at], stop
        keep = max(overlap(held, stop) for stop in self._stop)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], ""

    def flush(self) -> str:
        """The text held back, when no more will come."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, wanted: str) -> int:
    """The length of the longest end of `text` that begins `wanted`, short of all of it."""
    return next((n for n in range(min(len(wanted) - 1, len(text)), 0, -1) if text.endswith(wanted[:n])), 0)
