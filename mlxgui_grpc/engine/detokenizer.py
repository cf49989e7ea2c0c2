"""Turns a row's tokens into text that is final: whole characters only, and nothing that may begin a stop string."""

from typing import Any

from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Incremental text of one row. The texts it returns join to the decoding of all of its tokens.

    A character whose bytes are spread over several tokens comes when it is complete.
    """

    def __init__(self, tokenizer: Any, prompt_tail: list[int] | None = None) -> None:
        # The tail of a raw prompt tells a SentencePiece decoder that the first token does not begin the text.
        self._stream = DecodeStream(ids=prompt_tail or None, skip_special_tokens=True)
        self._tokenizer = tokenizer
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """The text that `token` completes, if any."""
        text: str | None = self._stream.step(self._tokenizer, token)
        if text is None:
            self._pending.append(token)
            return ""
        self._pending.clear()
        return text

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character are shown as U+FFFD."""
        if not self._pending:
            return ""
        text: str = self._tokenizer.decode(self._pending, skip_special_tokens=True)
        self._pending.clear()
        return text


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
        keep = max(_overlap(held, stop) for stop in self._stop)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], ""

    def flush(self) -> str:
        """The text held back, when no more will come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`, short of all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
