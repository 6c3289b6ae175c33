from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtt.algorithms import FlexLoRA, Tier
from fedtt.errors import ConfigError
from fedtt.folds import Contribution
from fedtt.layout import Theta
from tests.support.adapters import small_adapter
from tests.support.ranks import at_rank, bases_of, device, devices, folded, lora_adapter, mean_of, products
from tests.support.trains import random_theta

METHOD = FlexLoRA(tiers=(Tier(rank=1, below_mb=500), Tier(rank=2, below_mb=2000)))
ADAPTER = lora_adapter()
PAIRS = {pair.prefix: pair for pair in ADAPTER.lora_pairs}
some = settings(deadline=None, max_examples=25)
rounds = devices(ADAPTER, [None, 1, 2], sizes=(0.0, 0.03, 0.3))
seeds = st.integers(0, 2**32)


def start(seed: int = 0) -> Theta:
    return random_theta(ADAPTER, seed) / np.float32(2)


def factor(theta: Theta, index: int) -> np.ndarray:
    return theta[ADAPTER.layout.slices[index]].reshape(ADAPTER.layout.factors[index].shape)


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    product: np.ndarray = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return product


@given(rounds, seeds)
@some
def test_the_mean_of_the_products_is_decomposed_by_svd(given_: list[Contribution], seed: int) -> None:
    theta = start(seed)
    means, _ = mean_of(ADAPTER, bases_of(METHOD, ADAPTER, theta), given_)
    step = folded(METHOD, ADAPTER, theta, given_)
    found = products(ADAPTER, step.theta)
    for name, pair in PAIRS.items():
        np.testing.assert_allclose(found[name], truncated(means[name], 3), atol=1e-5)
        if not step.report:
            continue  # what nobody has moved keeps its factors
        a, b = factor(step.theta, pair.a), factor(step.theta, pair.b)
        np.testing.assert_allclose(a @ a.T, np.eye(3), atol=1e-5)  # A = V_rᵀ
        sigma = np.linalg.svd(means[name])[1][:3]
        np.testing.assert_allclose(b.T @ b, np.diag(sigma**2), atol=1e-4)  # B = U_r Σ_r


@given(rounds)
@some
def test_the_head_is_averaged_as_it_is_train_or_not(given_: list[Contribution]) -> None:
    theta, n = start(), sum(c.examples for c in given_)
    expected = theta.astype(float)
    for index in range(len(ADAPTER.layout.factors)):
        if ADAPTER.block_of(index) is None:
            own = ADAPTER.layout.slices[index]
            for c in given_:
                expected[own] += c.examples / n * c.delta[at_rank(ADAPTER, c.rank).layout.slices[index]]
    head = slice(ADAPTER.adapter_size, None)
    assert len(expected[head]) > 5
    found = folded(METHOD, ADAPTER, theta, given_).theta
    np.testing.assert_allclose(found[head], expected[head], rtol=1e-5, atol=1e-6)


def test_at_one_rank_devices_that_train_nothing_change_nothing() -> None:
    theta = start()
    step = folded(METHOD, ADAPTER, theta, [device(ADAPTER, seed=s, size=0.0) for s in range(3)])
    assert step.theta.tobytes() == theta.tobytes()


def test_without_updates_nothing_moves() -> None:
    assert folded(METHOD, ADAPTER, start(), []).theta.tobytes() == start().tobytes()


def test_what_is_reported_is_what_was_cut_away() -> None:
    theta, given_ = start(), [device(ADAPTER, rank, seed, 0.3) for seed, rank in enumerate([None, None, 1])]
    means, _ = mean_of(ADAPTER, bases_of(METHOD, ADAPTER, theta), given_)
    step, before = folded(METHOD, ADAPTER, theta, given_), products(ADAPTER, theta)
    lost = {n: float(np.linalg.norm(truncated(means[n], 3) - means[n])) for n in PAIRS}
    shares = [lost[n] / float(np.linalg.norm(means[n])) for n in PAIRS]
    of_change = [lost[n] / float(np.linalg.norm(means[n] - before[n])) for n in PAIRS]
    assert step.report["truncated_share_worst"] == pytest.approx(max(shares), rel=1e-4)
    assert step.report["truncated_share_of_change_mean"] == pytest.approx(np.mean(of_change), rel=1e-4)


@given(rounds)
@some
def test_a_variant_is_the_best_of_its_rank(given_: list[Contribution]) -> None:
    step = folded(METHOD, ADAPTER, start(), given_)
    own = products(ADAPTER, step.theta)
    for rank, theta in step.variants.items():
        small = ADAPTER.at_rank(rank)
        for pair in small.lora_pairs:
            np.testing.assert_allclose(
                products(small, theta)[pair.prefix], truncated(own[pair.prefix], rank), atol=1e-5
            )
        np.testing.assert_array_equal(theta[small.adapter_size :], step.theta[ADAPTER.adapter_size :])


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_vanished_direction_keeps_a_row_of_the_a_before_and_so_a_gradient(rank: int) -> None:
    """∂/∂B = slope Aᵀ: a column of B is alive where its row of A is not zero."""
    theta = start()
    for pair in ADAPTER.lora_pairs:
        factor(theta, pair.b)[:, rank:] = 0  # B A has this rank
    after = folded(METHOD, ADAPTER, theta, [device(ADAPTER, size=1e-7)])
    for pair in ADAPTER.lora_pairs:
        a, b, before = factor(after.theta, pair.a), factor(after.theta, pair.b), factor(theta, pair.a)
        assert np.abs(b[:, rank:]).max() < 1e-6
        np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, atol=1e-5)
        within = a @ np.linalg.pinv(before) @ before  # onto its row space
        np.testing.assert_allclose(within, a, atol=1e-4)


def test_bundles_it_cannot_train_are_refused() -> None:
    METHOD.check(ADAPTER)
    with pytest.raises(ConfigError, match=r"method\.tiers = \[1, 2\] is not allowed: ranks below 2"):
        METHOD.check(lora_adapter(rank=2))
    with pytest.raises(ConfigError, match=r"method\.name = 'flexlora' .*--adapter lora"):
        METHOD.check(small_adapter("tt", hidden=16, layers=1))
