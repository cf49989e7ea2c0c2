"""Plays closed-loop streaming clients against a server and measures whole request cycles of them."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable

from bench.load.prompts import prompt, reply_length
from bench.load.tally import Tally
from bench.protocol import Order, send

# Sends one chat (prompt, max_tokens), feeds its events to the tally, and raises if it fails.
Chat = Callable[[str, int, Tally], Awaitable[None]]
ERROR_LIMIT = 20


async def run(order: Order, chat: Chat, first_index: int) -> Tally:
    """Run the order's clients until the window is over; marks its start and end on stdout.

    The window opens when the last client has its warm-up reply and closes when that same client ends a reply
    at least `seconds` later: it spans whole request cycles, so the share of prefill in it is no accident.
    """
    tally = Tally()
    over = asyncio.Event()
    warming = order.clients
    next_index = first_index

    async def request(reply_tokens: int) -> bool:
        nonlocal next_index
        index, next_index = next_index, next_index + 1
        try:
            await chat(prompt(order.seed, index, order.prompt_words), reply_tokens, tally)
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            tally.fail(f"{type(error).__name__}: {error}")
            if sum(tally.errors.values()) >= ERROR_LIMIT:
                over.set()
            await asyncio.sleep(0.05)
            return False
        return True

    async def client(number: int) -> None:
        nonlocal warming
        # Clients that start together must not end together too: a lock-step of the load's own making.
        while not await request(max(1, order.warm_tokens * (number + 1) // order.clients)):
            pass
        warming -= 1
        is_pacer = warming == 0
        if is_pacer:
            tally.open()
            send(sys.stdout, mark="start")
        while not over.is_set():
            length = reply_length(order.seed, next_index, order.reply_tokens, is_spread=order.spread_lengths)
            await request(length)
            if is_pacer and tally.opened is not None and time.perf_counter() >= tally.opened + order.seconds:
                tally.close()
                over.set()

    clients = [asyncio.create_task(client(number)) for number in range(order.clients)]
    try:
        await asyncio.wait_for(over.wait(), order.limit_seconds)
    except TimeoutError:
        tally.fail("the cell's time limit passed before its window was over")
    if tally.is_open:
        tally.close(was_cut=True)
    send(sys.stdout, mark="end")
    for task in clients:
        task.cancel()
    for outcome in await asyncio.gather(*clients, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome
    return tally


async def once(order: Order, chat: Chat) -> Tally:
    """Send the order's one request, with a window of its own."""
    tally = Tally()
    tally.open()
    send(sys.stdout, mark="start")
    try:
        text = prompt(order.seed, order.prompt_index, order.prompt_words)
        await asyncio.wait_for(chat(text, order.reply_tokens, tally), order.limit_seconds)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        tally.fail(f"{type(error).__name__}: {error}")
    tally.close()
    send(sys.stdout, mark="end")
    return tally
