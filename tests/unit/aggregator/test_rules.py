"""The protocol's decisions, each by itself."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from aggregator import rules
from fedtt.algorithms import ExactFedTT
from fedtt.task import RoundSpec, TaskSpec
from storage.records import LeaseState, RoundState
from tests.support.ledger import lease, round_

SPEC = RoundSpec(count=9, cohort=10, buffer=6, quorum=2, deadline_s=100.0, retry_s=20.0)


@pytest.mark.parametrize(
    ("accepted", "now", "expected"),
    [
        (0, 399.9, rules.Due.NOTHING),
        (5, 399.9, rules.Due.NOTHING),
        (6, 301.0, rules.Due.FOLD),
        (2, 400.0, rules.Due.FOLD),
        (1, 400.0, rules.Due.ABANDON),
        (0, 1e9, rules.Due.ABANDON),
    ],
)
def test_a_round_closes_when_its_buffer_is_full_or_at_its_deadline(
    accepted: int, now: float, expected: rules.Due
) -> None:
    assert rules.due(SPEC, round_(deadline_at=400.0), accepted, now) is expected


@pytest.mark.parametrize("state", [RoundState.FOLDING, RoundState.FOLDED, RoundState.ABANDONED])
def test_a_round_that_is_not_open_closes_no_more(state: RoundState) -> None:
    assert rules.due(SPEC, round_(deadline_at=400.0, state=state), 6, 1e9) is rules.Due.NOTHING


def test_a_round_without_a_lease_waits_for_ever() -> None:
    assert rules.due(SPEC, round_(deadline_at=None), 0, 1e12) is rules.Due.NOTHING


def test_a_seat_is_taken_by_every_lease_that_was_not_given_back() -> None:
    assert rules.free_seats(SPEC, {}) == 10
    leases = {LeaseState.ACTIVE: 3, LeaseState.UPLOADED: 2, LeaseState.EXPIRED: 1, LeaseState.FAILED: 50}
    assert rules.free_seats(SPEC, leases) == 4  # 10 - 3 - 2 - 1


@pytest.mark.parametrize(("now", "is_open"), [(300.0, False), (324.9, False), (325.0, True)])
def test_seats_are_for_the_invited_during_a_quarter_of_the_deadline(now: float, is_open: bool) -> None:
    full = round_(invited=tuple("abcdefghij"))
    assert rules.seat_open_to_all(SPEC, full, now) is is_open
    assert rules.seat_open_to_all(SPEC, round_(invited=tuple("abcdefghi")), now)


@pytest.mark.parametrize(
    ("max_staleness", "current", "held", "why"),
    [
        (0, {}, {}, None),
        (0, {"number": 2}, {}, "its round 1 has closed, now round 2 is open"),
        (0, {"number": 2, "version_number": 1}, {}, "it was trained from version 0, now 1 is current"),
        (1, {"number": 2, "version_number": 1}, {}, None),
        (1, {"number": 3, "version_number": 2}, {}, "it was trained from version 0, now 2 is current"),
        (0, {"state": RoundState.FOLDING}, {}, "the task takes no more updates"),
        (0, {}, {"state": LeaseState.EXPIRED}, None),
        (0, {}, {"state": LeaseState.FAILED}, "the lease was given back"),
    ],
)
def test_an_update_is_refused_for_one_reason(
    max_staleness: int, current: dict[str, Any], held: dict[str, Any], why: str | None
) -> None:
    task = TaskSpec(name="t", rounds=RoundSpec(count=9, cohort=10, max_staleness=max_staleness))
    assert rules.refusal(task, round_(), round_(**current), lease(**held)) == why


@pytest.mark.parametrize(
    ("live", "number", "why"),
    [
        ((0, 2, 3), 2, None),
        ((0, 2, 3), 3, "what surrounds its factors has been trained since its round 1"),
        ((0, 1, 3), 2, "its round 1 trained other factors than round 2, which is open"),
    ],
)
def test_a_late_update_is_folded_only_where_its_factors_mean_the_same(
    live: tuple[int, ...], number: int, why: str | None
) -> None:
    rounds = RoundSpec(count=9, cohort=10, max_staleness=9)
    task = TaskSpec(name="t", rounds=rounds, method=ExactFedTT(epoch_rounds=2))
    current = round_(number=number, version_number=number - 1, live=live)
    assert rules.refusal(task, round_(number=1), current, lease()) == why


POPULATION = [f"{n:016x}" * 2 for n in range(50)]


def test_devices_are_told_to_come_back_at_different_times_around_the_tasks_own() -> None:
    times = [rules.retry_after_s(SPEC, 1, 1, name) for name in POPULATION]
    assert all(10.0 <= time < 30.0 for time in times)  # half to one and a half of 20 s
    assert len(set(times)) == 50
    assert rules.retry_after_s(SPEC, 1, 1, POPULATION[3]) == times[3]


def test_devices_for_which_there_is_nothing_come_back_at_different_times_too() -> None:
    times = [rules.idle_retry_s(60.0, 1000.5, name) for name in POPULATION]
    assert all(30.0 <= time < 90.0 for time in times)
    assert len(set(times)) == 50
    assert rules.idle_retry_s(60.0, 1000.9, POPULATION[3]) == times[3]
    assert rules.idle_retry_s(60.0, 1100.0, POPULATION[3]) != times[3]


# what is foreseen

REGULAR = {"closed_at": 330.0, "opened_at": 312.0, "state": RoundState.FOLDED, "reason": ""}


def foreseen(turn: int, now: float, name: str = POPULATION[0], **last: Any) -> float | None:
    """In round 5 of 99, opened at 332; round 4 was opened at 312, so rounds follow each other by 20 s."""
    task = TaskSpec(name="t", rounds=replace(SPEC, count=99))
    before = round_(number=4, **REGULAR | last)
    current = round_(number=5, version_number=4, opened_at=332.0)
    round_s = rules.pace_s(SPEC, before, current)
    return None if round_s is None else rules.foreseen_s(task, round_s, current, turn, now, name)


def test_whose_turn_is_foreseen_asks_again_after_half_to_three_quarters_of_the_time() -> None:
    times = [foreseen(8, 342.0, name) for name in POPULATION]
    assert all(time is not None and 25.0 <= time < 37.5 for time in times)  # round 8 is opened at 392
    assert len(set(times)) == 50
    assert foreseen(8, 342.0, POPULATION[3]) == times[3]


def test_nobody_is_told_to_wait_for_rounds_that_a_task_does_not_have() -> None:
    last = foreseen(99, 342.0)  # with 4 of 99 folded round 5 is followed by 94 at least
    assert last is not None
    assert last > 900
    assert foreseen(10**6, 342.0) == foreseen(100, 342.0)


def test_nobody_is_told_more_than_an_hour() -> None:
    found = foreseen(99, 342.0, opened_at=-668.0, closed_at=-660.0)  # rounds of 1,000 s
    assert found == 3600.0


@pytest.mark.parametrize(
    "last",
    [
        {"opened_at": 300.0, "closed_at": 325.0},  # its seats were open to all by then
        {"state": RoundState.ABANDONED, "reason": "too few"},
    ],
)
def test_nothing_is_foreseen_where_the_last_round_did_not_fill_by_itself(last: dict[str, Any]) -> None:
    assert foreseen(8, 342.0, **last) is None


def test_nothing_is_foreseen_in_a_first_round() -> None:
    assert rules.pace_s(SPEC, None, round_()) is None


def test_whose_turn_is_within_two_rounds_goes_on_asking() -> None:
    assert foreseen(7, 332.1) == 0.0
    assert foreseen(8, 352.1) == 0.0
    assert (foreseen(8, 351.9) or 0.0) > 0.0
