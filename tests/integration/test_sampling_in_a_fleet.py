"""Every way of sampling from end to end: real devices of unequal speed, the real server, virtual time."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from msgspec.structs import replace

from fedtt.sampling import ByExamples, Oort, PowerOfChoice, Sampling, Uniform
from fleet.profiles import Profile
from storage.records import TaskState, UpdateState
from tests.support.fleets import SmallFleet, small_task

DEVICES, ROUNDS = 20, 12
PROFILES = (Profile(name="quick", step_s=0.5), Profile(name="slow", step_s=60.0))
STRATEGIES: list[Sampling] = [Uniform(), ByExamples(), PowerOfChoice(candidates=8), Oort()]


def fleet(directory: Path, sampling: Sampling, **rounds: object) -> SmallFleet:
    task = small_task(**{"rounds": ROUNDS, "cohort": 4} | rounds)  # type: ignore[arg-type]
    return SmallFleet(directory, devices=DEVICES, task=replace(task, sampling=sampling), profiles=PROFILES)


def rounds_of(small: SmallFleet) -> dict[str, list[int]]:
    """device -> the rounds that took its updates."""
    with small.server.service.store.reading() as tx:
        return {
            device.id: sorted(
                u.round_number for state in UpdateState for u in tx.updates_of(device.id, state)
            )
            for device in tx.devices()
        }


@pytest.mark.parametrize("sampling", STRATEGIES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("staleness", [0, 2])
def test_a_task_comes_to_its_end_within_every_devices_bounds(
    sampling: Sampling, staleness: int, tmp_path: Path
) -> None:
    limited = replace(sampling, separation=3, participation_cap=4)
    small = fleet(tmp_path, limited, max_staleness=staleness, buffer=3)
    small.run()
    assert small.server.task.state is TaskState.FINISHED
    taken = rounds_of(small)
    assert sum(map(len, taken.values())) >= 3 * ROUNDS
    for rounds in taken.values():
        assert len(rounds) <= 4
        assert all(b - a >= 3 for a, b in itertools.pairwise(rounds))
    with small.server.service.store.reading() as tx:
        for name, rounds in taken.items():
            part = tx.participation(1, name)
            assert (part.count, part.last_round) == (len(rounds), rounds[-1]) if part else not rounds


def test_oort_asks_quick_devices_more_often_than_slow_ones(tmp_path: Path) -> None:
    """Once all are known: before that they are explored alike."""
    small = fleet(tmp_path, Oort(exploration=1.0, exploration_decay=0.85, least_exploration=0), rounds=24)
    small.run(lasts_s=7 * 86400.0)
    with small.server.service.store.reading() as tx:
        took_s = {d.id: p.duration_s for d in tx.devices() if (p := tx.participation(1, d.id))}
        newest = tx.rounds(1)[: ROUNDS // 2]
    invited = [name for round_ in newest for name in round_.invited]
    assert len(took_s) == DEVICES
    quick = sum((took_s.get(name) or 999.0) < 20.0 for name in invited)
    assert quick > 3 * (len(invited) - quick)
