"""What a fleet keeps of a device that sleeps."""

from __future__ import annotations

import tracemalloc

from edge_client.journal import Journal, State
from fedtt.messages import Receipt, UpdateState
from fleet.population import Population, StatePlace
from fleet.profiles import Profile


def test_devices_that_have_taken_part_sleep_in_650_bytes_each_and_wake_as_they_were() -> None:
    population = Population(size=1000, shards=1, profiles=[Profile()], seed=0)
    tracemalloc.start()
    for index in range(1000):
        _take_part(population, index)
    in_use_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert in_use_bytes < 650 * 1000
    woken = [Journal(StatePlace(population.state(index))).state for index in range(1000)]
    assert [state.device for state in woken] == [f"{index:032x}" for index in range(1000)]
    assert {(state.acknowledged, state.enrolled) for state in woken} == {(7, True)}


def _take_part(population: Population, index: int) -> None:
    """A device comes, takes part and sleeps again."""
    journal = Journal(StatePlace(population.state(index)))
    name, lease = f"{index:032x}", f"{1000 + index:032x}"
    journal.update(device=name, consented_at=1.7e9 + index, enrolled=True)
    receipt = Receipt(lease=lease, digest=f"{index:064x}", state=UpdateState.ACCEPTED)
    journal.update(finished_lease=lease, acknowledged=7, receipt=receipt)
    population.keep(index, journal.state)


def test_a_device_that_the_server_does_not_know_wakes_as_a_new_one() -> None:
    population = Population(size=3, shards=1, profiles=[Profile()], seed=0)
    population.keep(2, State(consented_at=1.7e9))
    population.keep(1, State(device="c" * 32))
    population.leave_out(1)
    assert [population.state(index) for index in range(3)] == [State()] * 3
