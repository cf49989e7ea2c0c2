"""The loop of a client process that talks to a server: orders from stdin, figures to stdout."""

import asyncio
import sys
from collections.abc import Callable
from dataclasses import asdict

from bench.load import closed_loop
from bench.protocol import Order, send


def serve(connect: Callable[[Order], closed_loop.Chat]) -> None:
    """Answer orders until stdin closes. `connect` gives the client of an order's endpoint and model."""
    asyncio.run(_serve(connect))


async def _serve(connect: Callable[[Order], closed_loop.Chat]) -> None:
    loop = asyncio.get_running_loop()
    # Prompt numbers go on over the cells of a process, so that no prompt is ever sent twice to one server.
    first_index = 1_000
    send(sys.stdout, mark="ready")
    # Nothing runs between two orders, so waiting for the next on another thread costs no measured time.
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = Order.from_line(line)
        chat = connect(order)
        if order.kind == "once":
            tally = await closed_loop.once(order, chat)
        else:
            tally = await closed_loop.run(order, chat, first_index)
            first_index += 100_000
        send(sys.stdout, figures=asdict(tally.figures()))
