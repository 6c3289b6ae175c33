"""Coordinates in which a core's norm is the matrix's, against interfaces written out row by row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedtt.algorithms.gauge import Gauge, interface_grams
from fedtt.codec import CodecSpec, decode_delta, encode_delta
from fedtt.errors import LayoutError, WireError
from fedtt.layout import LiveSet, Theta
from tests.support.trains import cores_of, dense_matrices, long_adapter, random_theta

ADAPTER = long_adapter()
DOWN = "block.0.attention.down"  # five cores, 2·3·2 | 2·2
(TRAIN,) = (found for found in ADAPTER.tt_matrices if found.prefix == DOWN)
seeds = st.integers(0, 2**32 - 1)
centres = st.integers(0, 4)


def live_core(centre: int) -> LiveSet:
    return LiveSet(ADAPTER.layout, [TRAIN.indices[centre]])


def dense_change(theta: Theta, live: LiveSet, delta: NDArray[np.floating]) -> NDArray[np.float64]:
    """By how much the matrix moves when the live core does."""
    there = theta.astype(np.float64) + live.scatter(delta.astype(np.float64))
    change: NDArray[np.float64] = dense_matrices(ADAPTER, there)[DOWN] - dense_matrices(ADAPTER, theta)[DOWN]
    return change


def random_delta(live: LiveSet, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed + 1).standard_normal(live.size).astype(np.float32)


@given(seed=seeds, centre=centres)
@settings(deadline=None, max_examples=25)
def test_the_grams_are_those_of_the_interfaces_written_out(seed: int, centre: int) -> None:
    cores = cores_of(ADAPTER, random_theta(ADAPTER, seed), DOWN)
    left, right = [np.ones(1)], [np.ones(1)]
    for core in cores[:centre]:  # L, one row for each of its multi-indices
        left = [row @ core[:, n] for row in left for n in range(core.shape[1])]
    for core in cores[:centre:-1]:  # R, one column for each
        right = [core[:, n] @ column for column in right for n in range(core.shape[1])]
    found = interface_grams(cores, centre)
    np.testing.assert_allclose(found[0], sum(np.outer(row, row) for row in left), rtol=1e-12)
    np.testing.assert_allclose(found[1], sum(np.outer(column, column) for column in right), rtol=1e-12)


@given(seed=seeds, centre=centres)
@settings(deadline=None, max_examples=50)
def test_a_move_of_the_core_moves_the_matrix_by_its_own_norm(seed: int, centre: int) -> None:
    theta, live = random_theta(ADAPTER, seed), live_core(centre)
    gauge, inner = Gauge(ADAPTER, theta, live), random_delta(live, seed).astype(np.float64)
    norm = np.linalg.norm(dense_change(theta, live, gauge.leave(inner)))
    # interfaces drawn at random may be nearly deficient, and what is below 1e-3 of them is not stretched
    assert norm <= np.linalg.norm(inner) * (1 + 1e-9)
    assert norm == pytest.approx(np.linalg.norm(inner), rel=1e-6) or _is_deficient(theta, centre)


def _is_deficient(theta: Theta, centre: int) -> bool:
    grams = interface_grams(cores_of(ADAPTER, theta, DOWN), centre)
    return any(np.linalg.cond(gram) > 1e6 for gram in grams)


def test_without_the_gauge_the_same_norm_moves_the_matrix_by_very_different_amounts() -> None:
    live, norms = live_core(2), []
    for seed in range(20):
        theta, delta = random_theta(ADAPTER, seed), random_delta(live, seed)
        norms.append(np.linalg.norm(dense_change(theta, live, delta)) / np.linalg.norm(delta))
    assert max(norms) / min(norms) > 3


@given(seed=seeds, centre=centres)
@settings(deadline=None, max_examples=25)
def test_entering_and_leaving_are_inverse_and_leave_other_numbers_alone(seed: int, centre: int) -> None:
    bias = len(ADAPTER.layout.factors) - 1
    live = LiveSet(ADAPTER.layout, [TRAIN.indices[centre], bias])
    gauge, x = Gauge(ADAPTER, random_theta(ADAPTER, seed), live), random_delta(live, seed)
    np.testing.assert_allclose(gauge.leave(gauge.enter(x)), x, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(gauge.enter(gauge.leave(x)), x, rtol=1e-7, atol=1e-7)
    assert gauge.enter(x)[-5:].tolist() == x[-5:].tolist()  # the bias of 5 labels


@given(seed=seeds, centre=centres)
@settings(deadline=None, max_examples=25)
def test_gradients_follow_the_chain_rule(seed: int, centre: int) -> None:
    live = live_core(centre)
    gauge, gradient = Gauge(ADAPTER, random_theta(ADAPTER, seed), live), random_delta(live, seed)
    inner = random_delta(live, seed + 1)
    # df = <∂f/∂G, ΔG> = <∂f/∂G', ΔG'>
    assert gradient @ gauge.leave(inner) == pytest.approx(gauge.leave(gradient) @ inner, rel=1e-6, abs=1e-6)


@given(seed=seeds, centre=centres)
@settings(deadline=None, max_examples=25)
def test_what_rounding_to_four_bits_loses_in_the_core_it_loses_in_the_matrix(seed: int, centre: int) -> None:
    theta, live, codec = random_theta(ADAPTER, seed), live_core(centre), CodecSpec(quantise="int4")
    gauge, delta = Gauge(ADAPTER, theta, live), random_delta(live, seed)
    payload = encode_delta(codec, live, delta, np.random.default_rng(0))
    lost = decode_delta(codec, live, payload) - delta
    in_matrix = np.linalg.norm(dense_change(theta, live, gauge.leave(lost)))
    if not _is_deficient(theta, centre):
        assert in_matrix == pytest.approx(np.linalg.norm(lost), rel=1e-5)


@given(seed=seeds, centre=centres)
@settings(deadline=None, max_examples=25)
def test_it_is_the_same_whatever_value_the_live_core_has(seed: int, centre: int) -> None:
    theta, live = random_theta(ADAPTER, seed), live_core(centre)
    there = theta + live.scatter(random_delta(live, seed))
    x = random_delta(live, seed + 2)
    here = Gauge(ADAPTER, theta, live).enter(x)
    assert Gauge(ADAPTER, there, live).enter(x).tobytes() == here.tobytes()


def test_a_core_beside_an_interface_of_zero_keeps_its_own_coordinates_on_that_side() -> None:
    theta, live = random_theta(ADAPTER, 0), live_core(2)
    theta[ADAPTER.layout.slices[TRAIN.indices[4]]] = 0  # R = 0
    x = random_delta(live, 0)
    cores = cores_of(ADAPTER, theta, DOWN)
    values, V = np.linalg.eigh(interface_grams(cores, 2)[0])
    S_left = (V * np.sqrt(values)) @ V.T
    expected = np.einsum("ab,bnc->anc", S_left, x.reshape(cores[2].shape).astype(np.float64))
    np.testing.assert_allclose(Gauge(ADAPTER, theta, live).enter(x), expected.reshape(-1), rtol=1e-9)


def test_a_direction_that_hardly_reaches_the_matrix_is_not_stretched_without_bound() -> None:
    theta, live = random_theta(ADAPTER, 0), live_core(1)
    first = theta[ADAPTER.layout.slices[TRAIN.indices[0]]].reshape(1, 2, 2)
    first[0, :, 1] = first[0, :, 0] * np.float32(1 + 1e-6)  # L has rank 1 but for rounding
    x = random_delta(live, 0)
    out = Gauge(ADAPTER, theta, live).leave(x)
    assert np.isfinite(out).all()
    sigma = np.linalg.norm(first)
    right = np.sqrt(np.linalg.eigvalsh(interface_grams(cores_of(ADAPTER, theta, DOWN), 1)[1]))
    assert np.linalg.norm(out) <= 1.001 * np.linalg.norm(x) / (1e-3 * sigma * right.min())


def test_a_train_that_is_live_whole_is_left_as_it_is_beside_one_that_is_not() -> None:
    theta = random_theta(ADAPTER, 0)
    (head,) = (found for found in ADAPTER.tt_matrices if found.prefix == "head.weight")
    both = LiveSet(ADAPTER.layout, [TRAIN.indices[2], *head.indices])
    x = random_delta(both, 0)
    alone = both.scatter(x)[live_core(2).positions]
    for found, core in (
        (Gauge(ADAPTER, theta, both).enter(x), Gauge(ADAPTER, theta, live_core(2)).enter(alone)),
        (Gauge(ADAPTER, theta, both).leave(x), Gauge(ADAPTER, theta, live_core(2)).leave(alone)),
    ):
        assert found[: len(core)].tobytes() == core.tobytes()
        assert found[len(core) :].tobytes() == x[len(core) :].astype(np.float64).tobytes()


def test_two_live_cores_of_one_train_have_no_such_coordinates() -> None:
    with pytest.raises(LayoutError, match=r"block\.0\.attention\.down has 2 live cores"):
        Gauge(ADAPTER, random_theta(ADAPTER, 0), LiveSet(ADAPTER.layout, TRAIN.indices[:2]))


def test_factors_too_large_to_multiply_are_refused_before_anything_is_decomposed() -> None:
    theta = np.full(ADAPTER.layout.size, 3e38, np.float32)
    with pytest.raises(WireError, match="lower the learning rate"):
        Gauge(ADAPTER, theta, live_core(4))
