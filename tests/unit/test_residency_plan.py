"""Who leaves for whom: the planner's rules, from plain numbers."""

import pytest

from mlxgui_grpc.errors import InsufficientMemoryError, ModelInUseError
from mlxgui_grpc.memory import GIB
from mlxgui_grpc.residency.plan import Occupant, Plan, Room, plan_load


def occupant(name: str, gigabytes: int = 4, idle_since: float = 0.0, **facts: bool) -> Occupant:
    return Occupant(name, gigabytes * GIB, idle_since, **facts)


def plan(required: int, *occupants: Occupant, budget: int = 16, max_models: int = 3) -> Plan:
    free = budget * GIB - sum(one.reserved_bytes for one in occupants)
    return plan_load("new", required * GIB, occupants, Room(budget * GIB, free, max_models))


def test_nobody_leaves_while_there_is_room() -> None:
    found = plan(4, occupant("a"), occupant("b"))
    assert (found.victims, found.refusal, found.memory_warning) == ((), None, "")


def test_the_least_recently_used_leaves_when_the_places_are_taken() -> None:
    found = plan(1, occupant("old", 1, 10.0), occupant("older", 1, 5.0), occupant("young", 1, 20.0))
    assert found.victims == ("older",)


def test_idle_models_leave_before_busy_ones_and_pinned_ones_never() -> None:
    found = plan(
        8,
        occupant("busy", 4, 0.0, is_busy=True),
        occupant("pinned", 4, 1.0, is_pinned=True),
        occupant("idle", 4, 2.0),
    )
    assert found.victims == ("idle",)
    found = plan(
        12,
        occupant("busy", 4, 0.0, is_busy=True),
        occupant("pinned", 4, is_pinned=True),
        occupant("idle", 4, 2),
    )
    assert found.victims == ("idle", "busy"), "busy ones are waited for"


def test_small_models_stay_when_a_large_one_makes_enough_room() -> None:
    found = plan(10, occupant("small", 1, 1.0), occupant("large", 10, 2.0))
    assert found.victims == ("large",)


def test_what_can_never_fit_is_refused_with_both_numbers() -> None:
    found = plan(32, occupant("pinned", 4, is_pinned=True), occupant("idle", 4))
    assert isinstance(found.refusal, InsufficientMemoryError)
    assert found.refusal.message == (
        "❌ Insufficient memory - This model requires 32.0GB but you have 12.0GB available"
    )
    assert found.victims == (), "a refused load evicts nobody"
    assert found.reclaimable_bytes == 12 * GIB


def test_a_refusal_names_the_setting_that_leaves_no_room() -> None:
    """After the document's sentence, and only where the machine would have had it."""
    for is_capped, words in ((True, "; max_model_memory_gb limits it"), (False, "")):
        refusal = plan_load("new", 8 * GIB, [], Room(4 * GIB, 4 * GIB, 3, is_capped)).refusal
        assert refusal is not None and refusal.message == (
            f"❌ Insufficient memory - This model requires 8.0GB but you have 4.0GB available{words}"
        )


def test_what_only_running_requests_keep_out_is_not_refused() -> None:
    found = plan(14, occupant("busy", 8, is_busy=True))
    assert found.refusal is None and found.victims == ("busy",)


def test_places_that_are_all_pinned_are_a_conflict() -> None:
    found = plan(1, *(occupant(name, 1, is_pinned=True) for name in "abc"))
    assert isinstance(found.refusal, ModelInUseError)
    assert "max_concurrent_models is 3" in found.refusal.message


@pytest.mark.parametrize(("required", "is_warned"), [(7, False), (9, True)])
def test_beyond_four_fifths_of_the_budget_there_is_a_warning(required: int, is_warned: bool) -> None:
    found = plan(required, occupant("a", 5))
    assert bool(found.memory_warning) is is_warned
    if is_warned:
        assert "14.0GB" in found.memory_warning and "16.0GB" in found.memory_warning
