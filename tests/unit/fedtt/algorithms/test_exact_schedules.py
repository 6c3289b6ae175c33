"""Which cores exact FedTT has live in which round."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtt.algorithms import ExactFedTT, FedTT
from fedtt.algorithms.trains import outside_trains
from tests.unit.fedtt.algorithms.test_exact_fedtt import (
    ADAPTER,
    DOWN,
    HEAD,
    LAYOUT,
    SCHEDULES,
    UP,
    Schedule,
    live_at,
    live_cores,
    norms,
)


def test_cyclic_goes_from_the_last_core_to_the_first_and_begins_again() -> None:
    taken = [live_cores(ExactFedTT(), t) for t in range(1, 8)]
    assert [each[DOWN] for each in taken] == [[4], [3], [2], [1], [0], [4], [3]]
    assert [each[HEAD] for each in taken] == [[3], [2], [1], [0], [3], [2], [1]]


def test_a_sweep_goes_forth_and_back_without_staying_at_the_ends() -> None:
    taken = [live_cores(ExactFedTT(schedule="sweep"), t) for t in range(1, 11)]
    assert [each[UP] for each in taken] == [[4], [3], [2], [1], [0], [1], [2], [3], [4], [3]]
    assert [each[HEAD] for each in taken] == [[3], [2], [1], [0], [1], [2], [3], [2], [1], [0]]


def test_up_and_down_take_turns_and_the_head_takes_part_in_both() -> None:
    taken = [live_cores(ExactFedTT(schedule="alternate"), t) for t in range(1, 6)]
    assert [each[UP] for each in taken] == [[4], [], [3], [], [2]]
    assert [each[DOWN] for each in taken] == [[], [4], [], [3], []]
    assert [each[HEAD] for each in taken] == [[3], [2], [1], [0], [3]]


def test_by_cores_alone_biases_and_dense_matrices_are_never_live() -> None:
    outside = set(outside_trains(ADAPTER))
    assert outside
    for t in range(1, 8):
        live = {alone: set(live_at(ExactFedTT(cores_only=alone), t).indices) for alone in (False, True)}
        assert live[False] - live[True] == outside


def test_an_epoch_lasts_its_rounds() -> None:
    method = ExactFedTT(epoch_rounds=3)
    assert [live_cores(method, t)[DOWN] for t in range(1, 8)] == [[4], [4], [4], [3], [3], [3], [2]]
    assert [method.same_gauge(2, t) for t in (1, 2, 3, 4)] == [True, True, True, False]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_until_a_first_fold_the_first_turn_goes_on_as_rounds_may_fail(schedule: Schedule) -> None:
    method = ExactFedTT(schedule=schedule)
    for t in (1, 2, 7):
        live = method.live(ADAPTER, t, None)
        assert live.indices == method.live(ADAPTER, 1, None).indices
        assert {train.indices[-1] for train in ADAPTER.tt_matrices[1::2]} <= set(live.indices)  # every up


def test_by_norm_cores_that_were_never_folded_come_first_the_last_of_them_before_the_others() -> None:
    method = ExactFedTT(schedule="norm")
    state = norms(block_0_attention_down=[9, math.nan, 9, math.nan, 9])
    assert live_cores(method, 3, state)[DOWN] == [3]
    assert live_cores(method, 4, state)[DOWN] == [3]


def test_by_norm_the_core_that_moved_most_for_its_size_is_live_in_every_second_round() -> None:
    method, state = ExactFedTT(schedule="norm"), norms(block_0_attention_down=[1, 2, 5, 2, 1])
    odd, even = ([live_cores(method, t, state)[DOWN] for t in range(first, 21, 2)] for first in (1, 2))
    assert odd == [[2]] * 10
    assert even == [[4], [3], [2], [1], [0]] * 2  # the others' norms do not go stale


def test_of_equal_norms_the_last_core_is_taken() -> None:
    assert live_cores(ExactFedTT(schedule="norm"), 1, norms())[DOWN] == [4]


@given(schedule=st.sampled_from(SCHEDULES), t=st.integers(1, 10**6))
def test_every_core_is_live_at_some_time(schedule: Schedule, t: int) -> None:
    method, state, seen = ExactFedTT(schedule=schedule), norms(), set[int]()
    for number in range(t, t + 12):  # two turns of five cores, at most one round late
        seen |= set(method.live(ADAPTER, number, state).indices)
    assert seen == set(range(len(LAYOUT.factors)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_whole_head_is_live_in_every_round_and_the_adapters_take_the_turns_they_would(
    schedule: Schedule,
) -> None:
    """As FedTT has it, so that neither wins by its head."""
    for t in range(1, 13):
        whole, in_turn = (live_cores(ExactFedTT(schedule=schedule, whole_head=w), t) for w in (True, False))
        assert whole.pop(HEAD) == live_cores(FedTT(), t)[HEAD] == [0, 1, 2, 3]
        assert len(in_turn.pop(HEAD)) == 1
        assert whole == in_turn
