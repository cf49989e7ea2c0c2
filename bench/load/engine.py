"""The limit: mlx-lm's BatchGenerator alone in a process; nothing is tokenized or detokenized in the loop.

Batch and prefill sizes are mlx-lm's defaults (32 and 8), which are also the defaults of its server.
"""

import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx_lm
from mlx_lm.generate import BatchGenerator

from bench.load.prompts import prompt, reply_length
from bench.load.tally import Reply, Tally
from bench.protocol import Order, send

POOL = 256


class Loop:
    """A batch of sequences of one model, with what each delivered counted in a tally."""

    def __init__(self, model: Any, prompts: Iterator[list[int]], tally: Tally, clients: int) -> None:
        # Any: mlx-lm's methods are not annotated.
        self._generator: Any = BatchGenerator(model, completion_batch_size=max(32, clients))
        self._prompts = prompts
        self._tally = tally
        self._replies: dict[int, Reply] = {}

    def insert(self, lengths: list[int]) -> None:
        prompts = list(itertools.islice(self._prompts, len(lengths)))
        replies = [self._tally.begin(length) for length in lengths]
        self._replies.update(zip(self._generator.insert(prompts, lengths), replies, strict=True))

    def step(self) -> int:
        """Decode one token of every running sequence; returns how many sequences ended."""
        _, responses = self._generator.next()
        now = time.perf_counter()
        ended = 0
        for response in responses:
            reply = self._replies[response.uid]
            self._tally.event(reply, now)
            if response.finish_reason is not None:
                self._tally.end(reply, None)
                del self._replies[response.uid]
                ended += 1
        return ended

    @property
    def running_count(self) -> int:
        return len(self._replies)

    def close(self) -> None:
        self._generator.close()


def run(order: Order, model: Any, prompts: Iterator[list[int]]) -> Tally:
    """Run one cell: whole rounds in lock-step, or one arrival at a time, between two arrivals."""
    tally = Tally()
    loop = Loop(model, prompts, tally, order.clients)
    numbers = itertools.count()

    def lengths(count: int) -> list[int]:
        return [
            reply_length(order.seed, next(numbers), order.reply_tokens, is_spread=order.spread_lengths)
            for _ in range(count)
        ]

    if order.mode == "lock-step":
        loop.insert([order.warm_tokens] * order.clients)
        while loop.running_count > 0:
            loop.step()
        _open(tally)
        while not _is_over(tally, order):
            loop.insert(lengths(order.clients))
            while loop.running_count > 0:
                loop.step()
    else:
        # Ends spread evenly over one reply's length, so that from the start they come one at a time.
        loop.insert([max(1, order.reply_tokens * (i + 1) // order.clients) for i in range(order.clients)])
        warm_ends = max(1, order.clients * order.warm_tokens // order.reply_tokens)
        ends = 0
        while True:
            ended = loop.step()
            if not ended:
                continue
            ends += ended
            if tally.is_open and _is_over(tally, order):
                break
            if tally.opened is None and ends >= warm_ends:
                _open(tally)
            loop.insert(lengths(ended))
    tally.close()
    send(sys.stdout, mark="end")
    loop.close()
    return tally


def once(order: Order, model: Any, tokens: list[int]) -> Tally:
    """Run one request alone."""
    tally = Tally()
    loop = Loop(model, iter([tokens]), tally, 1)
    _open(tally)
    loop.insert([order.reply_tokens])
    while loop.running_count > 0:
        loop.step()
    tally.close()
    send(sys.stdout, mark="end")
    loop.close()
    return tally


def _open(tally: Tally) -> None:
    tally.open()
    send(sys.stdout, mark="start")


def _is_over(tally: Tally, order: Order) -> bool:
    return tally.opened is not None and time.perf_counter() >= tally.opened + order.seconds


def main() -> None:
    loaded: tuple[Any, ...] = mlx_lm.load(sys.argv[1])
    model, tokenizer = loaded[:2]

    def encode(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True))

    pools: dict[tuple[int, int], Iterator[list[int]]] = {}
    send(sys.stdout, mark="ready")
    for line in sys.stdin:
        order = Order.from_line(line)
        if order.kind == "once":
            tally = once(order, model, encode(prompt(order.seed, order.prompt_index, order.prompt_words)))
        else:
            key = order.seed, order.prompt_words
            if key not in pools:
                pools[key] = itertools.cycle(
                    [encode(prompt(order.seed, index, order.prompt_words)) for index in range(POOL)]
                )
            tally = run(order, model, pools[key])
        send(sys.stdout, figures=asdict(tally.figures()))


if __name__ == "__main__":
    # The folder of a model is all it serves.
    assert Path(sys.argv[1]).is_dir(), sys.argv[1]
    main()
