from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtt.algorithms import FlexLoRA, Tier, TTSVDFedTT
from fedtt.errors import ConfigError
from fedtt.folds import Contribution, Mean
from fedtt.layout import Theta
from fedtt.tensor_train import tt_dense, tt_svd
from tests.support.ranks import (
    at_rank,
    bases_of,
    device,
    devices,
    folded,
    lora_adapter,
    mean_of,
    products,
    tt_adapter,
)
from tests.support.trains import cores_of, random_theta

METHOD = TTSVDFedTT(tiers=(Tier(rank=1, below_mb=500), Tier(rank=2, below_mb=2000)))
ADAPTER = tt_adapter()
HEAD_BIAS = len(ADAPTER.layout.factors) - 1
some = settings(deadline=None, max_examples=15)
rounds = devices(ADAPTER, [None, 1, 2], sizes=(0.0, 0.03, 0.3))
seeds = st.integers(0, 2**32)


def start(seed: int = 0) -> Theta:
    return random_theta(ADAPTER, seed) / np.float32(2)


@given(rounds, seeds)
@some
def test_the_mean_of_dense_changes_is_added_and_rounded_back_by_tt_svd(
    given_: list[Contribution], seed: int
) -> None:
    theta = start(seed)
    _, changes = mean_of(ADAPTER, bases_of(METHOD, ADAPTER, theta), given_)
    found, before = products(ADAPTER, folded(METHOD, ADAPTER, theta, given_).theta), products(ADAPTER, theta)
    for prefix, matrix, _ in ADAPTER.tt_matrices:
        goal = before[prefix] + changes[prefix]
        expected = tt_dense(tt_svd(goal, matrix), matrix.split)
        np.testing.assert_allclose(found[prefix], expected, atol=2e-5 * float(np.linalg.norm(goal)))


@given(rounds)
@some
def test_biases_are_averaged_as_they_are(given_: list[Contribution]) -> None:
    theta, n = start(), sum(c.examples for c in given_)
    found = folded(METHOD, ADAPTER, theta, given_).theta[ADAPTER.layout.slices[HEAD_BIAS]]
    mean = sum(
        c.examples / n * c.delta[at_rank(ADAPTER, c.rank).layout.slices[HEAD_BIAS]].astype(float)
        for c in given_
    )
    np.testing.assert_allclose(found, theta[ADAPTER.layout.slices[HEAD_BIAS]] + mean, rtol=1e-5, atol=1e-6)


def test_a_dense_head_too() -> None:
    adapter = tt_adapter("dense")
    theta, method = random_theta(adapter, 0), TTSVDFedTT(tiers=(Tier(rank=1, below_mb=9),))
    given_ = [device(adapter, None, 1, examples=3), device(adapter, 1, 2, examples=1)]
    found = folded(method, adapter, theta, given_).theta
    low = adapter.at_rank(1).layout
    for index in (-2, -1):
        own, other = adapter.layout.slices[index], low.slices[index]
        mean = (3 * given_[0].delta[own] + given_[1].delta[other]) / 4
        np.testing.assert_allclose(found[own], theta[own] + mean, rtol=1e-5, atol=1e-6)


@given(seeds, st.floats(0.01, 1.0))
@some
def test_one_device_of_the_own_rank_gets_the_matrices_it_sent(seed: int, size: float) -> None:
    """W(θ + Δ) has the ranks of θ: nothing is cut away."""
    theta, one = start(), device(ADAPTER, None, seed, size)
    step = folded(METHOD, ADAPTER, theta, [one])
    sent = products(ADAPTER, theta + one.delta)
    for name, matrix in products(ADAPTER, step.theta).items():
        np.testing.assert_allclose(matrix, sent[name], atol=1e-5 * float(np.linalg.norm(sent[name])))
    assert step.report["truncated_share_worst"] < 1e-9


def test_the_same_ledger_gives_the_same_bits() -> None:
    given_ = [device(ADAPTER, rank, seed) for seed, rank in enumerate([None, 1, 2, None])]
    one, other = (folded(METHOD, ADAPTER, start(), given_) for _ in range(2))
    assert one.theta.tobytes() == other.theta.tobytes()
    assert {r: v.tobytes() for r, v in one.variants.items()} == {
        r: v.tobytes() for r, v in other.variants.items()
    }


@given(st.lists(st.sampled_from([None, 1, 2]), max_size=6), seeds)
@some
def test_devices_that_train_nothing_change_nothing(ranks: list[int | None], seed: int) -> None:
    theta = start(seed)
    step = folded(METHOD, ADAPTER, theta, [device(ADAPTER, rank, size=0.0, examples=7) for rank in ranks])
    assert step.theta.tobytes() == theta.tobytes()
    assert step.report == {}


@given(seeds)
@some
def test_idle_devices_beside_a_busy_one_only_shorten_its_way(seed: int) -> None:
    theta, busy = start(), device(ADAPTER, None, seed, 0.02)
    idle = [device(ADAPTER, rank, size=0.0) for rank in (1, 2, None)]
    before, sent = products(ADAPTER, theta), products(ADAPTER, theta + busy.delta)
    step = folded(METHOD, ADAPTER, theta, [busy, *idle])
    for name, matrix in products(ADAPTER, step.theta).items():
        way = sent[name] - before[name]
        cut = step.report["truncated_share_of_change_worst"]
        apart = float(np.linalg.norm(matrix - before[name] - way / 4))
        assert apart <= (cut + 1e-3) * float(np.linalg.norm(way)) / 4


def test_rounds_without_training_never_shrink_what_low_ranks_cannot_hold() -> None:
    """FlexLoRA's mean of matrices does, by the share of the others in every round: rank collapse."""
    ours, theirs, tt, lora = METHOD, FlexLoRA(tiers=METHOD.tiers), tt_adapter(), lora_adapter()
    theta, other = start(), random_theta(lora, 0)
    name, pair = "block.0.mlp.down", "block.0.query"
    first = np.linalg.svd(products(tt, theta)[name])[1], np.linalg.svd(products(lora, other)[pair])[1]
    for _ in range(5):
        theta = folded(ours, tt, theta, [device(tt, rank, size=0.0) for rank in (1, None)]).theta
        other = folded(theirs, lora, other, [device(lora, rank, size=0.0) for rank in (1, None)]).theta
    last = np.linalg.svd(products(tt, theta)[name])[1], np.linalg.svd(products(lora, other)[pair])[1]
    np.testing.assert_array_equal(last[0], first[0])
    np.testing.assert_allclose(last[1][:3], first[1][:3] * [1, 1 / 32, 1 / 32], rtol=1e-4)  # 2**-5


def test_what_is_reported_is_what_was_cut_away() -> None:
    theta, given_ = start(), [device(ADAPTER, rank, seed, 0.3) for seed, rank in enumerate([None, None, 1])]
    _, changes = mean_of(ADAPTER, bases_of(METHOD, ADAPTER, theta), given_)
    step, before = folded(METHOD, ADAPTER, theta, given_), products(ADAPTER, theta)
    found = products(ADAPTER, step.theta)
    goals = {name: before[name] + changes[name] for name in changes}
    lost = {name: float(np.linalg.norm(found[name] - goals[name])) for name in changes}
    shares = [lost[name] / float(np.linalg.norm(goals[name])) for name in changes]
    of_change = [lost[name] / float(np.linalg.norm(changes[name])) for name in changes]
    assert step.report["truncated_share_worst"] == pytest.approx(max(shares), rel=1e-3)
    assert step.report["truncated_share_mean"] == pytest.approx(np.mean(shares), rel=1e-3)
    assert step.report["truncated_share_of_change_worst"] == pytest.approx(max(of_change), rel=1e-3)
    assert step.report["truncated_share_of_change_mean"] == pytest.approx(np.mean(of_change), rel=1e-3)


@given(rounds)
@some
def test_the_error_keeps_the_bound_of_tt_svd(given_: list[Contribution]) -> None:
    """Oseledets 2011, Theorem 2.2: sqrt(Σ_k ε_k²), ε_k what the k-th unfolding loses at its rank."""
    theta = start()
    _, changes = mean_of(ADAPTER, bases_of(METHOD, ADAPTER, theta), given_)
    found, before = products(ADAPTER, folded(METHOD, ADAPTER, theta, given_).theta), products(ADAPTER, theta)
    for prefix, matrix, _ in ADAPTER.tt_matrices:
        goal = before[prefix] + changes[prefix]
        cut = [
            np.linalg.svd(goal.reshape(math.prod(matrix.modes[:k]), -1))[1][matrix.ranks[k] :]
            for k in range(1, len(matrix.modes))
        ]
        bound = math.sqrt(sum(float((s**2).sum()) for s in cut))
        error = float(np.linalg.norm(found[prefix] - goal))
        assert error <= bound + 2e-5 * float(np.linalg.norm(goal))


def test_the_effective_rank_is_that_between_the_modes_of_input_and_output() -> None:
    theta, one = start(), device(ADAPTER, None, 3, 0.2)
    step = folded(METHOD, ADAPTER, theta, [one])
    ranks = []
    for dense in products(ADAPTER, step.theta).values():
        p = np.linalg.svd(dense)[1]
        p = p[p > 1e-6] / p.sum()
        ranks.append(math.exp(-float((p * np.log(p)).sum())))
    assert step.report["effective_rank_least"] == pytest.approx(min(ranks), rel=1e-3)
    assert step.report["effective_rank_mean"] == pytest.approx(np.mean(ranks), rel=1e-3)


def test_a_variant_is_tt_svd_to_the_smaller_rank_and_the_same_elsewhere() -> None:
    theta = start()
    for rank in (1, 2):
        small = ADAPTER.at_rank(rank)
        found, own = METHOD.variant(ADAPTER, theta, rank), products(ADAPTER, theta)
        assert found.dtype == np.float32
        assert found.shape == (small.layout.size,)
        for train in small.tt_matrices:
            dense = products(small, found)[train.prefix]
            expected = tt_dense(tt_svd(own[train.prefix], train.matrix), train.matrix.split)
            np.testing.assert_allclose(dense, expected, atol=2e-5 * float(np.linalg.norm(dense)))
        np.testing.assert_array_equal(found[-5:], theta[-5:])
        mine, its = cores_of(ADAPTER, theta, "head.weight"), cores_of(small, found, "head.weight")
        for one, other in zip(mine, its, strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_variant_of_a_zero_train_has_left_parts_to_train_from() -> None:
    """As version 0 has: `up` begins with a last core of zeros."""
    theta = start()
    up = next(train for train in ADAPTER.tt_matrices if train.prefix == "block.0.mlp.up")
    theta[ADAPTER.layout.slices[up.indices[-1]]] = 0
    small = ADAPTER.at_rank(1)
    cores = cores_of(small, METHOD.variant(ADAPTER, theta, 1), up.prefix)
    assert not cores[-1].any()
    assert all(np.linalg.norm(core) > 0.1 for core in cores[:-1])


def test_only_low_ranks_may_come_and_the_others_directions_stay() -> None:
    theta, before = start(), products(ADAPTER, start())
    step = folded(METHOD, ADAPTER, theta, [device(ADAPTER, 1, seed, 0.01) for seed in range(3)])
    for name, matrix in products(ADAPTER, step.theta).items():
        old, new = np.linalg.svd(before[name])[1], np.linalg.svd(matrix)[1]
        np.testing.assert_allclose(new[:2], old[:2], rtol=0.2)
    assert step.report["effective_rank_least"] > 1.5


def test_one_update_at_a_time_is_held() -> None:
    alive: list[weakref.ref[Any]] = []
    most = 0

    def stream() -> Iterator[Contribution]:
        nonlocal most
        for seed in range(12):
            one = device(ADAPTER, None, seed)
            alive.append(weakref.ref(one.delta))
            yield one
            del one
            most = max(most, sum(ref() is not None for ref in alive))

    folded(METHOD, ADAPTER, start(), stream())
    assert len(alive) == 12
    assert most <= 1


def test_no_device_claims_the_round_with_the_examples_it_says_it_has() -> None:
    theta, fold = start(), Mean(max_examples=100)
    loud, quiet = device(ADAPTER, None, 1, 0.3, examples=10**6), device(ADAPTER, 1, 2, 0.0, examples=100)
    even = device(ADAPTER, None, 1, 0.3, examples=100)
    found = folded(METHOD, ADAPTER, theta, [loud, quiet], fold).theta
    assert found.tobytes() == folded(METHOD, ADAPTER, theta, [even, quiet]).theta.tobytes()


@pytest.mark.parametrize("adapter", [lora_adapter(), tt_adapter(rank=2)], ids=["lora", "rank 2"])
def test_bundles_it_cannot_train_are_refused(adapter: Any) -> None:
    METHOD.check(ADAPTER)
    with pytest.raises(ConfigError, match=r"method\.(name|tiers) = .*(--adapter tt|below 2)"):
        METHOD.check(adapter)
