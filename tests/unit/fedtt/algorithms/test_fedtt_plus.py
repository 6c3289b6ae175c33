from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtt.adapter import AdapterSpec
from fedtt.algorithms import FedTTPlus
from fedtt.algorithms.trains import outside_trains
from fedtt.codec import CodecSpec, payload_bytes
from fedtt.errors import ConfigError
from fedtt.folds import Contribution
from fedtt.layout import LiveSet
from fedtt.server_step import server_step
from fedtt.task import RoundSpec, TaskSpec
from tests.support.adapters import small_adapter
from tests.support.trains import dense_matrices, long_adapter, random_theta

ADAPTER = long_adapter()  # trains of five cores, and a head of four
rounds = st.integers(1, 10**6)


def live_cores(method: FedTTPlus, adapter: AdapterSpec, round_number: int) -> dict[str, list[int]]:
    """train -> which of its cores are live, the first being 0."""
    live = set(method.live(adapter, round_number).indices)
    return {
        train.prefix: [k for k, index in enumerate(train.indices) if index in live]
        for train in adapter.tt_matrices
    }


def test_first_last_and_one_between_that_goes_round() -> None:
    down = [live_cores(FedTTPlus(), ADAPTER, t)["block.0.attention.down"] for t in (1, 2, 3, 4, 5)]
    assert down == [[0, 1, 4], [0, 2, 4], [0, 3, 4], [0, 1, 4], [0, 2, 4]]
    head = [live_cores(FedTTPlus(), ADAPTER, t)["head.weight"] for t in (1, 2, 3)]
    assert head == [[0, 1, 3], [0, 2, 3], [0, 1, 3]]


def test_a_whole_head_is_live_in_every_round_beside_adapters_that_go_round() -> None:
    for t in (1, 2, 3, 4):
        whole, in_turn = (live_cores(FedTTPlus(whole_head=w), ADAPTER, t) for w in (True, False))
        assert whole.pop("head.weight") == [0, 1, 2, 3]
        assert len(in_turn.pop("head.weight")) == 3
        assert whole == in_turn


def test_each_between_stays_for_a_period() -> None:
    slow = FedTTPlus(period=2)
    up = [live_cores(slow, ADAPTER, t)["block.0.mlp.up"][1] for t in range(1, 9)]
    assert up == [1, 1, 2, 2, 3, 3, 1, 1]


@given(round_number=rounds)
def test_fixed_is_the_one_halfway_in_every_round(round_number: int) -> None:
    fixed = live_cores(FedTTPlus(rotation="fixed"), ADAPTER, round_number)
    assert fixed["block.0.attention.up"] == [0, 2, 4]
    assert fixed["head.weight"] == [0, 2, 3]


@given(round_number=rounds, period=st.integers(1, 5))
def test_every_core_is_live_at_some_time_within_a_turn_of_the_longest_train(
    round_number: int, period: int
) -> None:
    method = FedTTPlus(period=period)
    seen: set[int] = set()
    for number in range(round_number, round_number + 3 * period):  # 5 - 2 cores between
        seen |= set(method.live(ADAPTER, number).indices)
    assert seen == set(range(len(ADAPTER.layout.factors)))


@given(round_number=rounds)
def test_what_is_no_core_is_live_in_every_round(round_number: int) -> None:
    for adapter in (ADAPTER, small_adapter("lora", hidden=64, layers=1, head="tt")):
        assert set(outside_trains(adapter)) <= set(FedTTPlus().live(adapter, round_number).indices)


def test_short_trains_are_live_whole() -> None:
    short = small_adapter("tt", hidden=16, layers=1, head="dense")  # 16 | 8: two cores
    assert FedTTPlus().live(short, 3).indices == short.layout.everything.indices


def test_it_sends_less_than_fedtt() -> None:
    sent = payload_bytes(CodecSpec(), FedTTPlus().live(ADAPTER, 1))
    assert sent < 0.8 * payload_bytes(CodecSpec(), ADAPTER.layout.everything)


def test_the_server_takes_the_mean_of_each_live_core_and_leaves_the_frozen_ones() -> None:
    method, theta, rng = FedTTPlus(), random_theta(ADAPTER, 0), np.random.default_rng(1)
    spec = TaskSpec(name="t", rounds=RoundSpec(count=1, cohort=1), method=method)
    live = method.live(ADAPTER, 2)
    given_ = [
        Contribution(delta=rng.standard_normal(live.size).astype(np.float32), examples=n) for n in (3, 5)
    ]
    found = server_step(spec, ADAPTER, {None: theta}, live, given_, None).theta
    expected = theta.copy()
    for place, position in enumerate(live.positions):
        expected[position] += (3 * given_[0].delta[place] + 5 * given_[1].delta[place]) / 8
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    frozen = np.setdiff1d(np.arange(ADAPTER.layout.size), live.positions)
    assert found[frozen].tobytes() == theta[frozen].tobytes()


def cross_terms(live: LiveSet) -> float:
    """How far the matrices of the mean are from the mean of the matrices, over two devices."""
    theta, rng = random_theta(ADAPTER, 0), np.random.default_rng(1)
    moves = [live.scatter(live.gather(0.3 * rng.standard_normal(theta.size))) for _ in range(2)]
    of_mean = dense_matrices(ADAPTER, theta + sum(moves) / 2)
    one, other = (dense_matrices(ADAPTER, theta + move) for move in moves)
    return float(sum(np.sum((of_mean[name] - (one[name] + other[name]) / 2) ** 2) for name in of_mean))


def test_three_live_cores_leave_cross_terms_but_fewer_than_all() -> None:
    assert 0 < cross_terms(FedTTPlus().live(ADAPTER, 1)) < cross_terms(ADAPTER.layout.everything)


def test_a_bundle_without_trains_is_refused() -> None:
    FedTTPlus().check(ADAPTER)
    FedTTPlus().check(small_adapter("dense", hidden=16, layers=1, head="label-names"))
    with pytest.raises(ConfigError, match=r"method\.name = 'fedtt-plus'"):
        FedTTPlus().check(small_adapter("dense", hidden=16, layers=1, head="dense"))


def test_a_period_of_what_does_not_rotate_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.period = 3 .* rotation 'fixed'"):
        FedTTPlus(rotation="fixed", period=3)
