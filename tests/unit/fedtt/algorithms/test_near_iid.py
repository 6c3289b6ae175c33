"""Groups of devices against a slow oracle that computes every cost from the formula, and their laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedtt.algorithms.near_iid import Member, divergence, near_iid, place

quick = settings(deadline=None, max_examples=60)


def slow_divergence(counts: list[float], population: list[float]) -> float:
    """½ Σ p log₂(p / m) + ½ Σ q log₂(q / m), m = (p + q) / 2; 1 where there are no counts."""
    p, q = [max(0.0, c) for c in counts], [max(0.0, c) for c in population]
    if not sum(p):
        return 1.0
    p, q = [c / sum(p) for c in p], [c / max(sum(q), 1e-300) for c in q]
    total = 0.0
    for a, b in zip(p, q, strict=True):
        middle = (a + b) / 2
        total += sum(0.5 * x * math.log2(x / middle) for x in (a, b) if x)
    return min(max(total, 0.0), 1.0)


def slow_groups(members: list[Member], groups: int, weight: float) -> list[int]:
    """Greedy, each time with the cost of the whole partition before and after."""
    labels = [None if m.labels is None else scaled(m.labels.tolist()) for m in members]
    told = [counts for counts in labels if counts is not None]
    population = [max(0.0, sum(column)) for column in zip(*told, strict=True)]
    everything = max(sum(population), 1e-300)
    logs = [None if m.time_s is None else math.log(max(m.time_s, 1e-3)) for m in members]
    known = [x for x in logs if x is not None]
    mean = sum(known) / len(known) if known else 0.0
    deviation = math.sqrt(sum((x - mean) ** 2 for x in known) / len(known)) if known else 1.0
    times = [None if x is None else (x - mean) / (deviation if deviation > 1e-9 else 1.0) for x in logs]
    centres = [0.0] * groups
    if len(known) >= groups:
        parts = np.array_split(sorted(x for x in times if x is not None), groups)
        centres = [float(sum(part) / len(part)) for part in parts]

    def cost(chosen: dict[int, int]) -> float:
        total = 0.0
        for g in range(groups):
            inside = [i for i, group in chosen.items() if group == g]
            mine = [counts for i in inside if (counts := labels[i]) is not None]
            for c, of_all in enumerate(population):
                if of_all:
                    has = sum(counts[c] for counts in mine) * groups / of_all
                    total += len(members) / groups * of_all / everything * (has - 1) ** 2
            total += weight * sum((t - centres[g]) ** 2 for i in inside if (t := times[i]) is not None)
        return total

    def large(i: int) -> float:
        counts = labels[i]
        if counts is None:
            return 0.0
        pairs = [(h, n) for h, n in zip(counts, population, strict=True) if n]
        return float(sum(len(members) / groups * n / everything * (h * groups / n) ** 2 for h, n in pairs))

    def slowness(i: int) -> float:
        found = times[i]
        return -math.inf if found is None else found

    least, more = divmod(len(members), groups)
    chosen: dict[int, int] = {}
    for i in sorted(range(len(members)), key=lambda i: (-large(i), -slowness(i), i)):
        sizes = [list(chosen.values()).count(g) for g in range(groups)]
        larger = sum(size > least for size in sizes)
        free = [g for g in range(groups) if sizes[g] < least or (sizes[g] == least and larger < more)]
        before = cost(chosen)
        chosen[i] = min(free, key=lambda g: (round(cost(chosen | {i: g}) - before, 9), sizes[g], g))
    return [chosen[i] for i in range(len(members))]


def scaled(counts: list[int]) -> list[float]:
    total = sum(max(0, c) for c in counts)
    return [c * min(1.0, 1000 / max(total, 1)) for c in counts]


def skewed(count: int, classes: int, alpha: float, seed: int) -> list[Member]:
    """Devices with Dirichlet labels and log-normal times."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet([alpha] * classes, count)
    return [
        Member(labels=rng.multinomial(40, share).astype(np.int64), time_s=float(np.exp(rng.normal())))
        for share in shares
    ]


counts = st.lists(st.integers(-3, 30), min_size=3, max_size=3).map(lambda c: np.array(c, np.int64))
members = st.builds(Member, labels=st.none() | counts, time_s=st.none() | st.floats(0.1, 1000.0))


@quick
@given(counts, counts)
def test_divergence_is_the_sum_of_its_definition(a: NDArray[np.int64], b: NDArray[np.int64]) -> None:
    found = divergence(a.astype(float), b.astype(float))
    assert float(found) == pytest.approx(slow_divergence(a.tolist(), b.tolist()), abs=1e-9)


@quick
@given(st.lists(members, min_size=1, max_size=24), st.integers(1, 6), st.sampled_from([0.0, 0.3, 2.0]))
def test_every_device_is_in_one_group_sizes_differ_by_one_and_the_same_devices_give_the_same(
    devices: list[Member], groups: int, weight: float
) -> None:
    found = near_iid(devices, groups, weight)
    sizes = [found.count(g) for g in range(groups)]
    assert sum(sizes) == len(devices)
    assert max(sizes) - min(sizes) <= 1
    assert found == near_iid(devices, groups, weight)


@pytest.mark.parametrize("seed", range(12))
def test_the_groups_are_those_of_the_slow_greedy_rule(seed: int) -> None:
    rng = np.random.default_rng(seed)
    devices = [
        Member(
            labels=member.labels if rng.random() < 0.8 else None,
            time_s=member.time_s if rng.random() < 0.8 else None,
        )
        for member in skewed(17, 5, 0.4, seed)
    ]
    assert near_iid(devices, 3, 0.3) == slow_groups(devices, 3, 0.3)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_groups_diverge_less_from_the_population_than_random_ones(alpha: float, weight: float) -> None:
    ours, random = [], []
    for seed in range(8):
        devices, rng = skewed(60, 10, alpha, seed), np.random.default_rng(seed)
        ours.append(mean_divergence(devices, near_iid(devices, 4, weight)))
        shuffled = rng.permutation(np.arange(60) % 4).tolist()
        random.append(mean_divergence(devices, shuffled))
    assert np.mean(ours) < (0.6 if weight == 0 else 0.85) * np.mean(random)


def mean_divergence(devices: list[Member], groups: list[int]) -> float:
    rows = [np.zeros(10) for _ in range(4)]
    for member, group in zip(devices, groups, strict=True):
        assert member.labels is not None
        rows[group] += member.labels
    return float(np.mean(divergence(np.array(rows), np.sum(rows, axis=0))))


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_devices_of_a_group_are_of_like_speed_where_that_counts(weight: float) -> None:
    devices = skewed(60, 10, 0.3, 1)
    logs = np.log([member.time_s for member in devices if member.time_s])

    def within(groups: list[int]) -> float:
        return float(sum(logs[np.array(groups) == g].var() for g in range(4)) / 4 / logs.var())

    assert within(near_iid(devices, 4, weight)) < 0.8 * within(near_iid(devices, 4, 0.0))
    means = [float(logs[np.array(near_iid(devices, 4, 1.0)) == g].mean()) for g in range(4)]
    assert means == sorted(means)  # the first group is the fastest


def test_a_device_that_lies_about_how_much_it_has_bends_no_group() -> None:
    honest = skewed(20, 4, 0.5, 3)
    liar = Member(labels=np.array([32767, 0, 0, 0], np.int64), time_s=1.0)
    bounded = Member(labels=np.array([1000, 0, 0, 0], np.int64), time_s=1.0)
    assert near_iid([*honest, liar], 3, 0.3) == near_iid([*honest, bounded], 3, 0.3)


def test_a_newcomer_joins_the_group_that_lacks_its_labels_and_an_unknown_one_the_smallest() -> None:
    def of(*labels: int) -> Member:
        return Member(labels=np.array(labels, np.int64))

    known = [of(9, 0), of(9, 0), of(0, 9), of(9, 0)]
    assert place([of(0, 9)], known, [0, 0, 1, 1], 2, 0.3) == [0]
    full = place([of(0, 9)], [*known, of(9, 0)], [0, 0, 1, 1, 0], 2, 0.3)
    assert full == [1]  # the other one has no room
    assert place([Member()], known, [0, 0, 0, 1], 2, 0.3) == [1]
    assert place([Member()], known, [0, 1, 0, 1], 2, 0.3) == [0]


def test_a_newcomer_may_join_a_group_in_which_nobody_is_known() -> None:
    known = [Member(time_s=1.0), Member(time_s=1.1)]
    assert place([Member(time_s=9.0)], known, [0, 1], 3, 0.3) == [2]


@pytest.mark.parametrize("seed", range(6))
def test_newcomers_among_no_members_are_grouped_as_all_devices_are(seed: int) -> None:
    devices = skewed(17, 5, 0.4, seed)
    assert place(devices, [], [], 3, 0.3) == near_iid(devices, 3, 0.3) == slow_groups(devices, 3, 0.3)


def test_newcomers_come_to_the_groups_of_their_own_speed() -> None:
    times = [1.0, 1.1, 5.0, 5.5, 20.0, 22.0]
    members = [Member(time_s=t) for t in times]
    late = [Member(time_s=t) for t in (21.0, 5.2, 1.05, 19.0, 1.2, 4.8)]
    assert place(late, members, [0, 0, 1, 1, 2, 2], 3, 0.3) == [2, 1, 0, 2, 0, 1]
