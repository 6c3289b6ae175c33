"""How the seats of a round are dealt out to groups, and who is sampled for them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from aggregator.grouping import seats
from fedtt.sampling import Oort
from fedtt.task import RoundSpec
from storage.records import MAIN
from tests.support.groups import GroupedServer, grouped_task


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.integers(1, 4), st.integers(0, 200), st.data()
)
def test_seats_add_up_and_each_group_has_enough_for_its_fold(
    sizes: list[int], least: int, more: int, data: st.DataObject
) -> None:
    cohort = least * len(sizes) + more
    buffer = data.draw(st.integers(least, cohort))
    rounds = RoundSpec(
        count=1, cohort=cohort, buffer=buffer, quorum=data.draw(st.integers(min(least, buffer), buffer))
    )
    found = seats(rounds, sizes, least)
    assert sum(of_group for of_group, _, _ in found) == cohort
    for of_group, closes_at, quorum in found:
        assert least <= quorum <= closes_at <= of_group
        assert closes_at >= of_group * buffer / cohort - 1e-9
    for (a, *_), size in zip(found, sizes, strict=True):
        assert abs(a - least - more * size / sum(sizes)) < 1  # the largest remainder


def test_samplers_choose_within_a_group() -> None:
    server = GroupedServer(replace(grouped_task(), sampling=Oort()))
    server.everyone()
    with server.store.reading() as tx:
        rounds = [r for r in tx.rounds(server.task_id) if r.branch != MAIN]
        members = tx.members(server.task_id)
    for round_ in rounds:
        assert len(round_.invited) == 2
        assert {f"group-{members[device]}" for device in round_.invited} == {round_.branch}
