"""What a fleet keeps of a device that sleeps."""

from __future__ import annotations

from edge_client.journal import State
from fedtt.messages import Receipt, UpdateState
from fleet.population import Population
from fleet.profiles import Profile


def test_a_device_that_has_taken_part_sleeps_in_a_third_of_a_kilobyte_and_wakes_as_it_was() -> None:
    population = Population(size=3, shards=1, profiles=[Profile()], seed=0)
    receipt = Receipt(lease="a" * 32, digest="b" * 64, state=UpdateState.ACCEPTED)
    asleep = State(
        device="c" * 32,
        enrolled=True,
        consented_at=1.7e9,
        finished_lease="a" * 32,
        acknowledged=7,
        receipt=receipt,
    )
    population.keep(1, asleep)
    population.keep(2, State())  # the server does not know it yet
    assert [population.state(index) for index in range(3)] == [None, asleep, None]
    assert len(population._states[1]) < 340
    told = State(device="c" * 32, label_counts={"d": b"12"}, privacy_spent={"t": 0.5})
    population.keep(1, told)
    assert population.state(1) == told
