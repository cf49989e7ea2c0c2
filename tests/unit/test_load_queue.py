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
        async with queue.turn(Ticket("first", needs_room=False)):
            await first.wait()

    async def wait(ticket: Ticket) -> None:
        async with queue.turn(ticket):
            ticket.needs_room = False
            assert queue.position(ticket) == 0, "who has room does not wait"
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
    now = time.monotonic()
    tickets = [
        Ticket(f"{priority}-{i}", priority, now + i * 0.001) for i, priority in enumerate((0, 5, 0, 5, -3))
    ]
    assert asyncio.run(_run(tickets)) == ["5-1", "5-3", "0-0", "0-2", "-3-4"]


def test_whoever_has_waited_long_enough_comes_before_any_priority() -> None:
    now = time.monotonic()
    tickets = [Ticket("late", 100, begin=now), Ticket("patient", -100, begin=now - 201.0)]
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


def test_a_turn_passes_over_a_ticket_that_is_being_given_up() -> None:
    """In the step between its cancellation and the moment its owner learns of it."""

    async def play() -> None:
        queue = LoadQueue()
        go = asyncio.Event()

        async def wait(name: str, until: asyncio.Event | None = None) -> str:
            async with queue.turn(Ticket(name)):
                if until is not None:
                    await until.wait()
            return name

        holder = asyncio.create_task(wait("holder", go))
        await asyncio.sleep(0)
        leaving, staying = asyncio.create_task(wait("leaving")), asyncio.create_task(wait("staying"))
        await asyncio.sleep(0)
        go.set()
        leaving.cancel()
        async with asyncio.timeout(30):
            assert await holder == "holder" and await staying == "staying"
        assert leaving.cancelled() and not queue.tickets()

    asyncio.run(play())


def test_who_waits_for_room_is_seen_first_and_can_be_overtaken() -> None:
    async def play() -> None:
        queue = LoadQueue()
        holder, other = Ticket("holder"), Ticket("other")

        async def wait() -> None:
            async with queue.turn(other):
                pass

        async with queue.turn(holder):
            task = asyncio.create_task(wait())
            await asyncio.sleep(0)
            holder.needs_room = False
            assert [ticket.model for ticket in queue.tickets()] == ["other"]
            holder.needs_room = True
            assert [queue.position(ticket) for ticket in (holder, other)] == [1, 2]
            assert not queue.is_overtaken(holder)
            queue.move(other, 50)
            assert queue.is_overtaken(holder)
            queue.move(holder, 60)
            assert not queue.is_overtaken(holder)
        await task

    asyncio.run(play())
