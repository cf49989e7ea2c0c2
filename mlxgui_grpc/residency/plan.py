"""Decides, from plain numbers, whether a model fits in memory and which others have to leave for it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlxgui_grpc.errors import InsufficientMemoryError, ModelInUseError, ModelServerError
from mlxgui_grpc.memory import WARNING_SHARE, gigabytes_text, insufficient_memory_text


@dataclass(frozen=True, slots=True)
class Occupant:
    """A model in memory, as the planner sees it."""

    name: str
    reserved_bytes: int
    idle_since: float
    """End of its last use."""
    is_busy: bool = False
    is_pinned: bool = False
    stays_until: float = -math.inf
    """Before this instant it is not evicted: it has just come."""


@dataclass(frozen=True, slots=True)
class Room:
    """The memory for models."""

    budget_bytes: int
    """What all of them together may take."""
    free_bytes: int
    """What is free of it now, and free on the machine."""
    max_models: int
    is_capped: bool = False
    """More would be free without the setting max_model_memory_gb."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What has to happen before the load. With a refusal nothing does."""

    victims: tuple[str, ...] = ()
    """Models to evict, in order. Busy ones, which come last, are to be waited for."""
    refusal: ModelServerError | None = None
    reclaimable_bytes: int = 0
    """What would be free without the models that are idle and not pinned."""
    memory_warning: str = ""


def plan_load(name: str, required_bytes: int, occupants: Sequence[Occupant], room: Room) -> Plan:
    """Who leaves for `name`: idle models before busy ones, the least recently used first, pinned ones never.

    Refuses only what could not fit with every unpinned model gone.
    """
    candidates = sorted(
        (occupant for occupant in occupants if not occupant.is_pinned),
        key=lambda occupant: (occupant.is_busy, occupant.idle_since),
    )
    reclaimable = room.free_bytes + sum(
        occupant.reserved_bytes for occupant in candidates if not occupant.is_busy
    )
    surplus_count = len(occupants) + 1 - room.max_models
    if surplus_count > len(candidates):
        pinned = sorted(occupant.name for occupant in occupants if occupant.is_pinned)
        refusal: ModelServerError = ModelInUseError(
            f"Model '{name}' cannot be loaded: max_concurrent_models is {room.max_models} and "
            f"{', '.join(repr(one) for one in pinned)} pinned; unpin one, or raise the setting",
            model=name,
        )
        return Plan(refusal=refusal, reclaimable_bytes=reclaimable)
    victims: list[Occupant] = []
    free = room.free_bytes
    for candidate in candidates:
        if free >= required_bytes and len(victims) >= surplus_count:
            break
        victims.append(candidate)
        free += candidate.reserved_bytes
    if free < required_bytes:
        refusal = InsufficientMemoryError(
            insufficient_memory_text(required_bytes, free)
            + ("; max_model_memory_gb limits it" if room.is_capped else ""),
            model=name,
            required_bytes=str(required_bytes),
            available_bytes=str(max(0, free)),
        )
        return Plan(refusal=refusal, reclaimable_bytes=reclaimable)
    # Small ones that were taken before a large one that would have done alone may stay.
    for victim in list(victims):
        if len(victims) > surplus_count and free - victim.reserved_bytes >= required_bytes:
            victims.remove(victim)
            free -= victim.reserved_bytes
    gone = {victim.name for victim in victims}
    taken = required_bytes + sum(one.reserved_bytes for one in occupants if one.name not in gone)
    return Plan(tuple(victim.name for victim in victims), None, reclaimable, _warning(name, taken, room))


def _warning(name: str, taken_bytes: int, room: Room) -> str:
    if taken_bytes <= WARNING_SHARE * room.budget_bytes:
        return ""
    percent = round(100 * taken_bytes / room.budget_bytes) if room.budget_bytes else 100
    return (
        f"With '{name}' the models take {gigabytes_text(taken_bytes)}, {percent} % of the "
        f"{gigabytes_text(room.budget_bytes)} that there is for them"
    )
