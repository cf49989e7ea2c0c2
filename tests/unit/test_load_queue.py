"""The queue of loads: one at a time, by priority, without starvation."""

import asyncio
import random
import time

from mlxgui_grpc.residency.load_queue import LoadQueue, Ticket


async def _run(tickets: list[Ticket]) -> list[str]:
    """Let all tickets queue behind a first one; the order in which they get their turn."""
    queue, order = LoadQueue(), list[str]()
    first = asyncio.Event()

    async def hold() -> None:
        async with queue.turn(Ticket("first")):
            await first.wait()

    async def wait(ticket: Ticket) -> None:
        async with queue.turn(ticket):
            assert queue.position(ticket) == 0, "who has the turn does not wait"
            order.append(ticket.model)

    holder = asyncio.create_task(hold())
    await asyncio.sleep(0)
    waiters = [asyncio.create_task(wait(ticket)) for ticket in tickets]
    await asyncio.sleep(0)
    places = [queue.position(ticket) for ticket in tickets]
    assert sorted(places) == list(range(1, len(tickets) + 1))
    first.set()
    await asyncio.gather(holder, *waiters)
    expected = [
        ticket.model for _, ticket in sorted(zip(places, tickets, strict=True), key=lambda one: one[0])
    ]
    assert order == expected, "positions say the order"
    return order


def test_larger_priorities_go_first_and_equal_ones_in_order() -> None:
    now = time.time()
    tickets = [
        Ticket(f"{priority}-{i}", priority, now + i * 0.001) for i, priority in enumerate((0, 5, 0, 5, -3))
    ]
    assert asyncio.run(_run(tickets)) == ["5-1", "5-3", "0-0", "0-2", "-3-4"]


def test_whoever_has_waited_long_enough_comes_before_any_priority() -> None:
    now = time.time()
    tickets = [Ticket("late", 100, now), Ticket("patient", -100, now - 201.0)]
    assert asyncio.run(_run(tickets)) == ["patient", "late"]


def test_tickets_that_are_moved_or_given_up_leave_the_others_in_order() -> None:
    async def play(seed: int) -> None:
        draw = random.Random(seed)
        queue, served, running = LoadQueue(), list[Ticket](), 0

        async def wait(ticket: Ticket) -> None:
            nonlocal running
            async with queue.turn(ticket):
                running += 1
                assert running == 1, "one at a time"
                try:
                    await asyncio.sleep(0)
                finally:
                    running -= 1
                served.append(ticket)

        tickets = [Ticket(str(i), draw.randint(-100, 100)) for i in range(30)]
        tasks = {ticket: asyncio.create_task(wait(ticket)) for ticket in tickets}
        given_up = set()
        for _ in range(40):
            await asyncio.sleep(0)
            ticket = draw.choice(tickets)
            if draw.random() < 0.3 and not tasks[ticket].done():
                tasks[ticket].cancel()
                given_up.add(ticket)
            elif queue.position(ticket):
                queue.move(ticket, draw.randint(-100, 100))
            orders = [one.order for one in queue.tickets()]
            assert orders == sorted(orders)
        async with asyncio.timeout(30):
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert not queue.tickets()
        assert set(tickets) - set(served) <= given_up, "nobody is forgotten"

    for seed in range(20):
        asyncio.run(play(seed))
