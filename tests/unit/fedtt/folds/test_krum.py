"""Krum against scores added up by hand, and under attack."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtt.folds import Contribution, Krum
from tests.support.contributions import SIZE, contribution, contributions, deltas
from tests.support.fold_oracle import krum_by_hand


@st.composite
def rounds(draw: st.DrawFn) -> tuple[Krum, list[Contribution]]:
    fold = Krum(hostile=draw(st.integers(1, 3)), selected=draw(st.integers(1, 4)))
    return fold, draw(contributions(least=fold.least, most=fold.least + 4, stale=2))


@given(rounds())
def test_it_is_the_mean_of_the_updates_with_the_lowest_scores(drawn: tuple[Krum, list[Contribution]]) -> None:
    fold, given_ = drawn
    expected = krum_by_hand(fold, [c.delta.tolist() for c in given_])
    np.testing.assert_allclose(fold.combine(SIZE, given_), expected, rtol=1e-12, atol=1e-12)


@given(rounds())
def test_krum_itself_is_one_of_the_updates(drawn: tuple[Krum, list[Contribution]]) -> None:
    fold, given_ = drawn
    found = Krum(hostile=fold.hostile).combine(SIZE, given_)
    assert found.tolist() in [c.delta.tolist() for c in given_]


@given(deltas, st.integers(5, 9))
def test_identical_updates_are_their_own_fold(delta: list[float], count: int) -> None:
    assert Krum().combine(SIZE, [contribution(delta)] * count).tolist() == delta


@settings(deadline=None)
@given(
    hostile=st.integers(1, 4),
    extra=st.integers(0, 3),
    seed=st.integers(0, 2**32),
    far=st.sampled_from([30.0, 1e3, 1e18, 1e37]),
    colluding=st.booleans(),
    centre=deltas,
)
def test_it_picks_from_the_honest_majority_under_attack(
    hostile: int, extra: int, seed: int, far: float, colluding: bool, centre: list[float]
) -> None:
    """Honest updates within 1 of a centre; hostile ones far off, all alike or each its own way.

    Those who collude lie at distance 0 from each other, but f - 1 of them are fewer than the n - f - 2
    neighbours that count.
    """
    rng = np.random.default_rng(seed)
    count = 2 * hostile + 3 + extra
    honest = np.array(centre) + rng.uniform(-0.5, 0.5, (count - hostile, SIZE))
    ways = rng.standard_normal((1 if colluding else hostile, SIZE))
    attack = np.array(centre) + far * ways / np.linalg.norm(ways, axis=1, keepdims=True)
    given_ = [contribution(row) for row in honest] + [
        contribution(attack[i % len(attack)], examples=10**9) for i in range(hostile)
    ]
    rng.shuffle(given_)
    for selected in range(1, count - hostile - 1):
        found = Krum(hostile=hostile, selected=selected).combine(SIZE, given_)
        assert np.abs(found - np.array(centre)).max() <= 0.5 + 1e-3


def test_the_mean_of_the_same_round_would_be_carried_off() -> None:
    given_ = [contribution([0, 0, 0, 1])] * 4 + [contribution([1e30, 0, 0, 0])]
    assert Krum().combine(SIZE, given_).tolist() == [0, 0, 0, 1]
    assert math.isclose(float(np.mean([c.delta for c in given_], axis=0)[0]), 2e29, rel_tol=1e-6)


@pytest.mark.parametrize(("hostile", "selected", "least"), [(1, 1, 5), (2, 1, 7), (1, 4, 7), (3, 1, 9)])
def test_fewer_updates_than_its_proof_needs_are_refused(hostile: int, selected: int, least: int) -> None:
    """n ≥ 2f + 3 and n ≥ m + f + 2."""
    fold = Krum(hostile=hostile, selected=selected)
    assert (fold.least, fold.linear) == (least, False)
    few = [contribution([1, 2, 3, 4])] * least
    assert fold.combine(SIZE, few).tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=f"this fold needs {least} updates"):
        fold.combine(SIZE, few[1:])
