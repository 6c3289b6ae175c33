"""Nearest-neighbour mixing against distances added up by hand, and what it keeps out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fedtt.folds import Contribution, Krum, Median, TrimmedMean
from fedtt.folds.base import share
from fedtt.folds.mixing import mix, squared_distances
from tests.support.contributions import SIZE, contribution, contributions

Robust = Median | TrimmedMean | Krum
FOLDS: list[Robust] = [Median(), TrimmedMean(trim=0.25), Krum(selected=2)]


def oracle(rows: list[list[float]], left_out: int) -> list[list[float]]:
    """Algorithm 2: y_i = Σ x_j / (n - f) over the n - f nearest to x_i, itself first, then earlier ones."""
    mixed = []
    for i, row in enumerate(rows):
        apart = [
            (j != i, sum((a - b) ** 2 for a, b in zip(row, rows[j], strict=True)), j)
            for j in range(len(rows))
        ]
        nearest = [rows[j] for *_, j in sorted(apart)[: len(rows) - left_out]]
        mixed.append([sum(column) / len(nearest) for column in zip(*nearest, strict=True)])
    return mixed


whole = st.lists(st.lists(st.integers(-50, 50).map(float), min_size=3, max_size=3), min_size=3, max_size=9)


@given(whole, st.data())
def test_each_update_becomes_the_mean_of_those_nearest_to_it(
    rows: list[list[float]], data: st.DataObject
) -> None:
    left_out = data.draw(st.integers(0, (len(rows) - 1) // 2))
    mixed = np.array(rows)
    mix(mixed, left_out)
    np.testing.assert_allclose(mixed, oracle(rows, left_out), rtol=1e-12, atol=1e-12)


def test_numbers_are_mixed_in_blocks_as_if_at_once() -> None:
    rows = np.random.default_rng(1).integers(-9, 9, (7, 9001)).astype(np.float64)
    mixed = rows.copy()
    mix(mixed, 2)
    np.testing.assert_allclose(mixed, oracle(rows.tolist(), 2), rtol=1e-12, atol=1e-12)


@given(whole)
def test_distances_are_those_of_the_formula(rows: list[list[float]]) -> None:
    given_ = np.array(rows)
    expected = ((given_[:, None] - given_[None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(squared_distances(given_), expected)  # whole numbers: nothing is rounded


@pytest.mark.parametrize("fold", FOLDS, ids=lambda fold: type(fold).__name__)
@given(given_=contributions(least=7, most=11), part=st.sampled_from([0.15, 0.25, 0.4]))
def test_a_mixing_fold_is_the_fold_of_mixed_updates(
    fold: Robust, given_: list[Contribution], part: float
) -> None:
    rows = np.stack([c.delta for c in given_]).astype(np.float64)
    mix(rows, share(part, len(rows)))
    mixed = [replace(c, delta=row) for c, row in zip(given_, rows, strict=True)]  # float64, as it is inside
    found = replace(fold, mixing=part).combine(SIZE, given_)
    np.testing.assert_allclose(found, fold.combine(SIZE, mixed), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fold", FOLDS, ids=lambda fold: type(fold).__name__)
def test_devices_that_differ_are_heard_where_colluders_are_not(fold: Robust) -> None:
    """Two kinds of honest devices, five and four, and two who send the opposite, ten times as long."""
    honest = [contribution([1, 0, 0, 0])] * 5 + [contribution([0, 1, 0, 0])] * 4
    hostile = [contribution([-10, -10, 0, 0])] * 2
    plain = fold.combine(SIZE, [*hostile, *honest])
    mixed = replace(fold, mixing=0.2).combine(SIZE, [*hostile, *honest])
    mean = np.array([5, 4, 0, 0]) / 9
    assert np.linalg.norm(mixed - mean) < 0.2 < np.linalg.norm(plain - mean)


@pytest.mark.parametrize(("part", "least"), [(0.0, 3), (0.2, 5), (0.1, 10), (0.34, 3)])
def test_a_round_holds_enough_that_one_is_left_out(part: float, least: int) -> None:
    fold = Median(mixing=part)
    assert fold.least == least
    with pytest.raises(ValueError, match=f"needs {least} updates"):
        fold.combine(SIZE, [contribution([0, 0, 0, 0])] * (least - 1))
