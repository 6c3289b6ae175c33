"""How often and how deep: the choice against a search written from the model, and what it must follow."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fedtt.algorithms.pace import (
    Bounds,
    Pace,
    Progress,
    _Model,
    choose_paces,
    fitted_exponent,
    rounds_worth,
    upper_left,
)
from fedtt.work import depth_share

quick = settings(deadline=None, max_examples=60)
BOUNDS = Bounds(
    max_frequency=4, min_depth=1, payload_bytes=(400, 700, 1000, 1300, 1600, 1900), bytes_weight=0.5
)

bounds = st.builds(
    lambda tau, head, a_block, depth, least, beta: Bounds(
        max_frequency=tau,
        min_depth=min(least, depth),
        payload_bytes=tuple(head + a_block * d for d in range(1, depth + 1)),
        bytes_weight=beta,
    ),
    st.integers(1, 3),
    st.integers(1, 2000),
    st.integers(1, 2000),
    st.integers(1, 3),
    st.integers(1, 3),
    st.floats(0.0, 1.0),
)
news = st.builds(Progress, round_s=st.floats(1.0, 500.0), cohort=st.integers(1, 20))


def with_measured(b: Bounds) -> st.SearchStrategy[tuple[Bounds, list[Progress]]]:
    """With groups that have held a pace, and whose loss fell."""
    pace = st.builds(
        Pace,
        frequency=st.integers(1, b.max_frequency),
        depth=st.integers(b.min_depth, b.deepest),
    )
    group = st.builds(
        Progress,
        round_s=st.floats(1.0, 500.0),
        cohort=st.integers(1, 20),
        pace=pace,
        loss_drop=st.floats(1e-3, 3.0),
    )
    return st.tuples(st.just(b), st.lists(group, min_size=1, max_size=3))


agreements, exponents = st.floats(0.0, 1.0), st.floats(0.1, 2.0)


def slow_score(
    groups: list[Progress], paces: tuple[Pace, ...], b: Bounds, agreement: float, exponent: float
) -> float:
    """Σ a h(τ) (d/D)^ρ / (T^(1-β) bytes^β), where a = drop / (h(τ) (d/D)^ρ) of what a group did, 1 if new."""
    q = min(agreement, 0.99)

    def worth(pace: Pace) -> float:
        return float(sum(q**k for k in range(pace.frequency)) * (pace.depth / b.deepest) ** exponent)

    scales = [g.loss_drop / worth(g.pace) if g.loss_drop and g.pace else 1.0 for g in groups]
    drop = sum(a * worth(p) for a, p in zip(scales, paces, strict=True))
    lasts = max(
        g.round_s * p.frequency * (1 + 2 * p.depth / b.deepest) / 3
        for g, p in zip(groups, paces, strict=True)
    )
    sent = sum(
        g.cohort * p.frequency * b.payload_bytes[p.depth - 1] for g, p in zip(groups, paces, strict=True)
    )
    return float(drop / (lasts ** (1 - b.bytes_weight) * sent**b.bytes_weight))


def best_score(groups: list[Progress], b: Bounds, agreement: float, exponent: float) -> float:
    """Of every choice for every group with every choice for the others."""
    one = [
        Pace(frequency=tau, depth=d)
        for tau in range(1, b.max_frequency + 1)
        for d in range(b.min_depth, b.deepest + 1)
    ]
    return max(
        slow_score(groups, paces, b, agreement, exponent)
        for paces in itertools.product(one, repeat=len(groups))
    )


@quick
@given(st.lists(news, min_size=1, max_size=3), bounds, agreements, exponents)
def test_no_other_paces_of_all_groups_give_more_than_those_chosen(
    groups: list[Progress], b: Bounds, agreement: float, exponent: float
) -> None:
    chosen = choose_paces(groups, b, agreement, exponent)
    assert len(chosen) == len(groups)
    for pace in chosen:
        assert 1 <= pace.frequency <= b.max_frequency
        assert b.min_depth <= pace.depth <= b.deepest
    best = best_score(groups, b, agreement, exponent)
    assert slow_score(groups, chosen, b, agreement, exponent) == pytest.approx(best, rel=1e-6)


@quick
@given(bounds.flatmap(with_measured), agreements, exponents)
def test_those_that_promise_most_by_the_measured_drops_are_chosen_or_those_in_force_kept(
    known: tuple[Bounds, list[Progress]], agreement: float, exponent: float
) -> None:
    b, groups = known
    held = tuple(g.pace for g in groups if g.pace)
    best = best_score(groups, b, agreement, exponent)
    gain = best / slow_score(groups, held, b, agreement, exponent)
    assume(abs(gain - 1.1) > 1e-6)
    chosen = choose_paces(groups, b, agreement, exponent)
    if gain < 1.1:
        assert chosen == held
    else:
        assert slow_score(groups, chosen, b, agreement, exponent) == pytest.approx(best, rel=1e-6)


def test_a_group_spends_the_bytes_that_another_would_spend_worse() -> None:
    """By itself each would train one block: (1/2)^0.5 / 1000 = 0.000707 a byte, and 1 / 1500 = 0.000667."""
    groups = [
        Progress(round_s=1.0, cohort=1, pace=Pace(frequency=1, depth=2), loss_drop=drop)
        for drop in (1.0, 0.01)
    ]
    b = Bounds(max_frequency=1, min_depth=1, payload_bytes=(1000, 1500), bytes_weight=1.0)
    # 0.714 / 2000 = 0.000357 with one block each, 1.01 / 3000 = 0.000337 with two, 1.007 / 2500 = 0.000403
    found = _Model(groups, b, 0.5, 0.5).within(10.0)
    assert [pace.depth for pace in found] == [2, 1]


points = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=20)


@quick
@given(points, st.fractions(0, 50))
def test_the_upper_left_of_a_hull_has_the_best_of_all_points_at_every_price(
    found: list[tuple[int, int]], price: Fraction
) -> None:
    x, y = (np.array(of, np.float64) for of in zip(*found, strict=True))
    hull = upper_left(x, y)
    assert max(found[i][1] - price * found[i][0] for i in hull) == max(b - price * a for a, b in found)
    slopes = [
        Fraction(found[j][1] - found[i][1], found[j][0] - found[i][0]) for i, j in itertools.pairwise(hull)
    ]
    assert all(before > after > 0 for before, after in itertools.pairwise([*slopes, Fraction(1, 10**6)]))


@quick
@given(news, bounds, agreements, agreements, exponents, st.floats(1.0, 6.0))
def test_the_better_groups_agree_the_more_rounds_they_hold_apart(
    group: Progress, b: Bounds, one: float, other: float, exponent: float, rounds: float
) -> None:
    low, high = sorted((one, other))
    period_s = rounds * group.round_s
    frequencies = [_Model([group], b, q, exponent).within(period_s)[0].frequency for q in (low, high)]
    assert frequencies[0] <= frequencies[1]


@quick
@given(news, bounds, agreements, exponents, exponents, st.floats(1.0, 6.0))
def test_the_more_depth_brings_the_deeper_a_group_trains(
    group: Progress, b: Bounds, agreement: float, one: float, other: float, rounds: float
) -> None:
    low, high = sorted((one, other))
    depths = [_Model([group], b, agreement, e).within(rounds * group.round_s)[0].depth for e in (low, high)]
    assert depths[0] <= depths[1]


@quick
@given(news, bounds, agreements, exponents, st.floats(0.0, 1.0), st.floats(1.0, 6.0))
def test_the_more_bytes_count_the_fewer_are_sent(
    group: Progress, b: Bounds, agreement: float, exponent: float, beta: float, rounds: float
) -> None:
    sent = []
    for weight in sorted((b.bytes_weight, beta)):
        model = _Model([group], replace(b, bytes_weight=weight), agreement, exponent)
        pace = model.within(rounds * group.round_s)[0]
        sent.append(pace.frequency * b.payload_bytes[pace.depth - 1])
    assert sent[0] >= sent[1]


def test_the_longest_period_allowed_is_used_only_as_far_as_rounds_apart_are_worth_it() -> None:
    groups = [Progress(round_s=10.0, cohort=5), Progress(round_s=40.0, cohort=5)]
    apart = choose_paces(groups, BOUNDS, agreement=0.0)
    together = choose_paces(groups, BOUNDS, agreement=0.95)
    assert all(pace.frequency == 1 for pace in apart)
    assert (
        together[0].frequency > together[1].frequency
    )  # the fast group does more before the slow one is done


def test_a_slow_group_trains_shallower_than_a_fast_one_where_time_alone_counts() -> None:
    groups = [Progress(round_s=10.0, cohort=5), Progress(round_s=30.0, cohort=5)]
    fast, slow = choose_paces(groups, replace(BOUNDS, bytes_weight=0.0, max_frequency=1), agreement=0.5)
    assert slow.depth < fast.depth


def test_small_promises_do_not_change_what_is_in_force() -> None:
    pace = Pace(frequency=1, depth=6)
    groups = [Progress(round_s=s, cohort=5, pace=pace, loss_drop=0.5) for s in (10.0, 11.0)]
    free = choose_paces([replace(g, pace=None, loss_drop=None) for g in groups], BOUNDS, agreement=0.2)
    assert free != (pace, pace)
    model = _Model(groups, BOUNDS, 0.2, 0.5)
    kept = choose_paces(groups, BOUNDS, agreement=0.2)
    assert (kept == (pace, pace)) == (model.score(free) < 1.1 * model.score([pace, pace]))
    settled = [replace(g, pace=p) for g, p in zip(groups, free, strict=True)]
    nearly = [replace(g, round_s=g.round_s * 1.02) for g in settled]
    assert choose_paces(nearly, BOUNDS, agreement=0.2) == free


@pytest.mark.parametrize("pace", [Pace(frequency=9, depth=1), Pace(frequency=1, depth=7)])
def test_a_pace_that_is_allowed_no_more_is_left(pace: Pace) -> None:
    groups = [Progress(round_s=10.0, cohort=5, pace=pace, loss_drop=0.5)]
    (found,) = choose_paces(groups, BOUNDS)
    assert found.frequency <= 4
    assert found.depth <= 6


def test_the_exponent_follows_how_much_more_the_deeper_groups_lost() -> None:
    def groups(exponent: float) -> list[Progress]:
        return [
            Progress(
                round_s=1.0,
                cohort=1,
                pace=Pace(frequency=tau, depth=d),
                loss_drop=0.3 * rounds_worth(tau, 0.5) * (d / 6) ** exponent,
            )
            for tau, d in ((1, 1), (2, 3), (3, 6))
        ]

    found = [fitted_exponent(groups(e), 6, 0.5) for e in (0.2, 0.5, 1.0, 1.5)]
    assert found == sorted(found)
    assert found[1] == pytest.approx(0.5)  # what was expected is what is found
    for exponent, fitted in zip((0.2, 1.0, 1.5), (found[0], *found[2:]), strict=True):
        assert min(0.5, exponent) < fitted < max(0.5, exponent)  # between what was thought and what is seen


def test_the_exponent_stays_where_depths_are_equal_or_nothing_was_learned() -> None:
    alike = [
        Progress(round_s=1.0, cohort=1, pace=Pace(frequency=1, depth=3), loss_drop=x) for x in (0.1, 0.9)
    ]
    assert fitted_exponent(alike, 6, 0.5, earlier=0.7) == pytest.approx(0.7)
    idle = [replace(group, loss_drop=None) for group in alike]
    worse = [replace(group, loss_drop=-1.0) for group in alike]
    assert fitted_exponent([*idle, *worse], 6, 0.5, earlier=0.7) == 0.7


@pytest.mark.parametrize(("frequency", "agreement", "worth"), [(3, 0.0, 1.0), (3, 0.5, 1.75), (2, 0.9, 1.9)])
def test_rounds_apart_are_worth_a_geometric_sum(frequency: int, agreement: float, worth: float) -> None:
    assert rounds_worth(frequency, agreement) == pytest.approx(worth)  # 1 + q + q²


def test_of_very_many_periods_some_thousands_are_looked_at_and_little_is_lost() -> None:
    b = replace(BOUNDS, max_frequency=64, payload_bytes=tuple(400 + 300 * d for d in range(24)))
    groups = [Progress(round_s=1.0 + 7.3**0.5 * k, cohort=1 + k % 5) for k in range(8)]
    model = _Model(groups, b, agreement=0.9, exponent=0.7)
    shares = [depth_share(depth, 24) for depth in range(1, 25)]
    ends = {g.round_s * tau * share for g in groups for tau in range(1, 65) for share in shares}
    first = max(g.round_s for g in groups) * shares[0]
    ends = {end for end in ends if end >= first}
    assert len(ends) > 5000
    assert len(model.periods()) <= 4097
    best = max(model.score(model.within(end)) for end in ends)
    found = model.score(choose_paces(groups, b, agreement=0.9, exponent=0.7))
    assert 0.998 * best < found <= best * (1 + 1e-9)
