"""Who is invited: drawn as the papers say, alike for alike candidates, and never past a device's bounds."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fedtt.errors import ConfigError
from fedtt.sampling import (
    FORETOLD_ROUNDS,
    ByExamples,
    Candidate,
    Oort,
    PowerOfChoice,
    Sampling,
    Uniform,
    invite,
    next_turn,
    uniformly,
)

POPULATION = [f"{n:016x}" * 2 for n in range(50)]
STRATEGIES: list[Sampling] = [Uniform(), ByExamples(), PowerOfChoice(candidates=20), Oort()]
each = pytest.mark.parametrize("sampling", STRATEGIES, ids=lambda s: type(s).__name__)
measures = st.floats(allow_nan=False, allow_infinity=False)


def key(seed: int) -> str:
    return hashlib.sha256(b"%d" % seed).hexdigest()[:32]


def device(number: int, **known: Any) -> Candidate:
    """One that has sent updates where its loss is given."""
    plain: dict[str, Any] = {"examples": 10}
    if "last_loss" in known:
        plain |= {"count": 1, "last_round": 1, "duration_s": 1.0}
    return Candidate(device_id=POPULATION[number], **plain | known)


@st.composite
def populations(draw: st.DrawFn, least: int = 0) -> list[Candidate]:
    """Some known, some new, with anything a device may report."""
    found = []
    for number in range(draw(st.integers(least, 12))):
        known: dict[str, Any] = {"examples": draw(st.integers(1, 2**53))}
        if draw(st.booleans()):
            known |= {
                "count": draw(st.integers(1, 5)),
                "last_round": draw(st.integers(1, 9)),
                "last_loss": draw(measures),
                "duration_s": draw(st.floats(0, 1e9)),
            }
        found.append(device(number, **known))
    return found


def shares(sampling: Sampling, candidates: list[Candidate], seats: int, rounds: int = 3000) -> list[float]:
    """The share of rounds that invite each candidate; the seed goes on, the round stays the tenth."""
    counts = Counter(
        name for seed in range(rounds) for name in invite(sampling, key(seed), 10, candidates, seats)
    )
    return [counts[c.device_id] / rounds for c in candidates]


def close(found: list[float], expected: list[float], rounds: int = 3000) -> None:
    """Within five standard deviations of the binomial, √(p (1 - p) / n)."""
    for share, p in zip(found, expected, strict=True):
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / rounds) + 1e-9, (found, expected)


# what holds for all


@each
@settings(deadline=None)
@given(
    candidates=populations(), seats=st.integers(1, 12), seed=st.integers(0, 2**53), number=st.integers(1, 99)
)
def test_a_cohort_is_as_large_as_it_can_be_and_the_same_for_the_same_candidates(
    sampling: Sampling, candidates: list[Candidate], seats: int, seed: int, number: int
) -> None:
    found = invite(sampling, key(seed), number, candidates, seats)
    names = [c.device_id for c in candidates]
    assert len(found) == len(set(found)) == min(seats, len(candidates))
    assert list(found) == [name for name in names if name in set(found)]  # in the order they came in
    assert invite(sampling, key(seed), number, list(candidates), seats) == found


@each
def test_another_round_and_another_seed_invite_others(sampling: Sampling) -> None:
    candidates = [device(n, last_loss=1.0 + n % 3) if n % 2 else device(n) for n in range(50)]
    first = invite(sampling, key(1), 5, candidates, 10)
    assert first != invite(sampling, key(1), 6, candidates, 10)
    assert first != invite(sampling, key(2), 5, candidates, 10)


@each
@given(
    population=populations(least=4),
    seats=st.integers(1, 6),
    separation=st.integers(0, 4),
    cap=st.none() | st.integers(1, 3),
)
@settings(deadline=None, max_examples=30)
def test_over_many_rounds_no_device_is_invited_past_its_cap_or_before_its_time(
    sampling: Sampling, population: list[Candidate], seats: int, separation: int, cap: int | None
) -> None:
    limited = replace(sampling, separation=separation, participation_cap=cap)
    candidates = [replace(c, count=0, last_round=None, last_loss=None, duration_s=None) for c in population]
    invited: dict[str, list[int]] = {c.device_id: [] for c in candidates}
    for number in range(1, 15):
        for name in invite(limited, key(3), number, candidates, seats):
            invited[name].append(number)
        candidates = [_after(c, invited[c.device_id]) for c in candidates]
    for rounds in invited.values():
        assert cap is None or len(rounds) <= cap
        assert all(b - a >= separation for a, b in itertools.pairwise(rounds))
    if cap is not None and separation <= 1 and len(candidates) <= seats:
        assert all(len(rounds) == cap for rounds in invited.values())


def _after(c: Candidate, rounds: list[int]) -> Candidate:
    if not rounds:
        return c
    return replace(c, count=len(rounds), last_round=rounds[-1], last_loss=1.0, duration_s=1.0)


@pytest.mark.parametrize(
    ("sampling", "count", "number", "why"),
    [
        (Uniform(), 10**6, 2, None),
        (Uniform(separation=1), 1, 1, "it may send its next update in round 2"),
        (Uniform(separation=1), 1, 2, None),
        (Uniform(separation=5), 1, 5, "it may send its next update in round 6"),
        (Uniform(separation=5), 1, 6, None),
        (Uniform(participation_cap=3), 2, 1, None),
        (Uniform(participation_cap=3), 3, 1000, "it has sent 3 updates, the task takes 3 of a device"),
    ],
)
def test_a_device_sits_out_for_one_reason(
    sampling: Uniform, count: int, number: int, why: str | None
) -> None:
    assert sampling.refusal(count, 1, number) == why


def test_only_a_plain_draw_needs_no_candidates() -> None:
    assert Uniform().is_plain
    assert not any(s.is_plain for s in STRATEGIES[1:])
    assert not Uniform(separation=1).is_plain
    assert not Uniform(participation_cap=9).is_plain


# uniform


def test_a_small_population_is_invited_whole() -> None:
    assert uniformly(key(1), 1, POPULATION[:10], 10) == tuple(POPULATION[:10])


def test_a_plain_draw_by_name_is_the_draw_of_candidates() -> None:
    for number in range(1, 20):
        candidates = [device(n) for n in range(50)]
        assert uniformly(key(7), number, POPULATION, 10) == invite(Uniform(), key(7), number, candidates, 10)


def test_every_device_is_invited_as_often_as_the_others() -> None:
    rounds = 2000
    counts = Counter(name for number in range(rounds) for name in uniformly(key(7), number, POPULATION, 10))
    close([counts[name] / rounds for name in POPULATION], [10 / 50] * 50, rounds)


def test_who_is_drawn_does_not_depend_on_who_else_is_not() -> None:
    for number in range(1, 30):
        drawn = uniformly(key(7), number, POPULATION, 10)
        fewer = [name for name in POPULATION if name in drawn or name < POPULATION[25]]
        assert uniformly(key(7), number, fewer, 10) == drawn
        without = uniformly(key(7), number, [name for name in POPULATION if name != drawn[4]], 10)
        assert set(drawn) - {drawn[4]} < set(without)


@pytest.mark.parametrize(("seats", "missed"), [(1, 0.02), (10, 0.004), (200, 0.001)])
def test_a_turn_is_foretold_before_nearly_every_round_that_draws_the_device(
    seats: int, missed: float
) -> None:
    """Each drawn device is asked about at the round before; sooner turns only make it come in vain."""
    population = [f"{n:032x}" for n in range(20 * seats)]
    late = drawn = 0
    for number in range(1, 1 + 4000 // seats):
        for name in uniformly(key(3), number, population, seats):
            drawn += 1
            late += next_turn(key(3), name, number - 1, seats, len(population)) != number
    assert late <= missed * drawn


def test_turns_come_about_as_often_as_a_device_is_drawn() -> None:
    """With slack for what is not known: of 10 seats 2.26 times, of 1,000 1.13 times."""
    for seats, slack in ((10, 1 + 4 / 10**0.5), (1000, 1 + 4 / 1000**0.5)):
        turns, number = 0, 0
        while number < 20_000:
            number = next_turn(key(5), POPULATION[3], number, seats, 20 * seats)
            turns += 1
        # of gaps longer than FORETOLD_ROUNDS there are few
        assert turns / number == pytest.approx(slack / 20, rel=0.15)


def test_a_turn_is_at_the_latest_the_last_that_is_looked_at() -> None:
    assert next_turn(key(1), POPULATION[0], 5, 1, 10**9) == 5 + FORETOLD_ROUNDS
    assert next_turn(key(1), POPULATION[0], 5, 10, 10) == 6
    assert next_turn(key(1), POPULATION[0], 5, 10, 0) == 6


# by examples


def drawn_in_turn(weights: list[int], seats: int) -> list[float]:
    """The probability that each is among `seats` drawn one by one by weight, all orders added up."""
    total = [0.0] * len(weights)
    for order in itertools.permutations(range(len(weights)), seats):
        p, left = 1.0, float(sum(weights))
        for i in order:
            p, left = p * weights[i] / left, left - weights[i]
        for i in order:
            total[i] += p
    return total


@pytest.mark.parametrize("seats", [1, 2, 3])
def test_a_device_is_invited_by_its_share_of_the_examples(seats: int) -> None:
    weights = [1, 2, 4, 8, 16]
    candidates = [device(n, examples=w) for n, w in enumerate(weights)]
    close(shares(ByExamples(), candidates, seats), drawn_in_turn(weights, seats))


def test_examples_beyond_the_bound_are_worth_nothing() -> None:
    candidates = [device(n, examples=10) for n in range(4)] + [device(4, examples=2**53)]
    found = shares(ByExamples(max_examples=20), candidates, 1)
    close(found, [1 / 6] * 4 + [2 / 6])  # 10 each of 60, and 20


# power of choice


@given(populations(least=2), st.data())
def test_with_all_as_candidates_those_of_the_highest_loss_are_chosen(
    candidates: list[Candidate], data: st.DataObject
) -> None:
    """New devices first, as their loss is infinite; ties are the draw's."""
    seats = data.draw(st.integers(1, len(candidates)))
    known = sorted(min(max(c.last_loss, 0.0), 1e6) for c in candidates if c.last_loss is not None)
    bound = known[int(0.95 * (len(known) - 1))] if known else math.inf

    def loss(c: Candidate) -> float:
        return math.inf if c.last_loss is None else min(max(c.last_loss, 0.0), bound)

    found = set(invite(PowerOfChoice(candidates=12), key(3), 4, candidates, seats))
    chosen = [loss(c) for c in candidates if c.device_id in found]
    left = [loss(c) for c in candidates if c.device_id not in found]
    assert not left or min(chosen) >= max(left)


def test_the_highest_loss_is_chosen_whenever_it_is_a_candidate() -> None:
    """d of N are drawn by their data: the one with the highest loss is among them in d / N of the rounds."""
    candidates = [device(n, last_loss=float(n // 2)) for n in range(20)]  # 18 and 19 are equal
    found = shares(PowerOfChoice(candidates=5), candidates, 1)
    both = 1 - (15 * 14) / (20 * 19)  # neither of two among 5 of 20
    close([found[18] + found[19]], [both])
    assert sum(found[:4]) == 0  # never those that three others always beat


def test_candidates_are_drawn_by_their_data() -> None:
    candidates = [device(n, examples=1 + 3 * (n % 2), last_loss=1.0) for n in range(4)]
    close(shares(PowerOfChoice(candidates=1), candidates, 1), [0.1, 0.4, 0.1, 0.4])


# oort


def utility(oort: Oort, candidates: list[Candidate], c: Candidate, number: int) -> float:
    """Algorithm 1: (U / U_max + √(0.1 ln R / L)) · min(1, T / t)^α, U and t bounded."""

    def statistical(x: Candidate) -> float:
        assert x.last_loss is not None
        return min(x.examples, oort.max_examples) * min(max(x.last_loss, 0.0), 1e6)

    ordered = sorted(statistical(x) for x in candidates)
    bound = ordered[int(0.95 * (len(ordered) - 1))]
    durations = [max(x.duration_s or 0.0, 1e-3) for x in candidates]
    preferred = float(np.quantile(durations, oort.prompt_share))
    assert c.last_round is not None
    score = min(statistical(c), bound) / bound if bound else 0.0
    score += math.sqrt(0.1 * math.log(number) / c.last_round)
    return float(score * min(1.0, preferred / max(c.duration_s or 0.0, 1e-3)) ** oort.penalty)


def known_devices() -> list[Candidate]:
    rng = np.random.default_rng(2)
    return [
        device(
            n,
            examples=int(rng.integers(1, 2000)),
            last_loss=float(rng.exponential()),
            last_round=int(rng.integers(1, 10)),
            duration_s=float(rng.exponential(20)),
        )
        for n in range(30)
    ]


@pytest.mark.parametrize("oort", [Oort(), Oort(penalty=0.5, prompt_share=0.1), Oort(max_examples=5)])
def test_utilities_are_those_of_the_paper(oort: Oort) -> None:
    candidates = known_devices()
    expected = [utility(oort, candidates, c, 10) for c in candidates]
    np.testing.assert_allclose(oort.utilities(candidates, 10), expected, rtol=1e-12)


def test_only_devices_near_the_best_are_exploited_each_by_its_utility() -> None:
    oort, candidates = Oort(exploration=0, least_exploration=0, cutoff=0.5), known_devices()
    scores = sorted(((utility(oort, candidates, c, 10), c.device_id) for c in candidates), reverse=True)
    admitted = {name for score, name in scores if score >= 0.5 * scores[2][0]}
    assert 3 < len(admitted) < 30
    found = dict(zip([c.device_id for c in candidates], shares(oort, candidates, 3), strict=True))
    assert {name for name, share in found.items() if share > 0} == admitted
    best, last = scores[0][1], scores[len(admitted) - 1][1]
    assert found[best] > found[last]


@pytest.mark.parametrize(
    ("number", "explored"),
    # seats less ⌊20 (1 - max(0.2, 0.9 · 0.98^(R - 1)))⌋
    [(1, 18), (20, 13), (1000, 4)],
)
def test_exploration_falls_from_round_to_round_to_its_least(number: int, explored: int) -> None:
    candidates = [device(n, last_loss=1.0) if n < 25 else device(n) for n in range(50)]
    for seed in range(20):
        found = set(invite(Oort(), key(seed), number, candidates, 20))
        assert len(found & set(POPULATION[25:])) == explored


def test_seats_that_one_side_cannot_fill_go_to_the_other() -> None:
    few_new = [device(n, last_loss=1.0) if n < 48 else device(n) for n in range(50)]
    assert set(POPULATION[48:]) <= set(invite(Oort(), key(1), 1, few_new, 20))
    few_known = [device(n, last_loss=1.0) if n < 2 else device(n) for n in range(50)]
    assert set(POPULATION[:2]) <= set(invite(Oort(), key(1), 1000, few_known, 20))


def test_new_devices_are_explored_alike() -> None:
    candidates = [device(n, examples=1 + 100 * n) for n in range(10)]
    close(shares(Oort(), candidates, 3), [0.3] * 10)


def test_whoever_is_slow_is_invited_less_and_whoever_was_not_asked_for_long_more() -> None:
    oort = Oort(exploration=0, least_exploration=0, cutoff=0)
    speeds = [device(n, last_loss=1.0, duration_s=1.0 if n else 3.0) for n in range(10)]
    assert oort.utilities(speeds, 10)[0] == pytest.approx(oort.utilities(speeds, 10)[1] / 9)  # (1/3)²
    ages = [device(n, last_loss=1.0, last_round=9 if n else 1) for n in range(10)]
    assert oort.utilities(ages, 10)[0] > oort.utilities(ages, 10)[1]


def test_exploration_cannot_fall_below_where_it_begins() -> None:
    with pytest.raises(
        ConfigError, match=r"sampling\.least_exploration = 0\.5 is not allowed: at most .* 0\.3"
    ):
        Oort(exploration=0.3, least_exploration=0.5)


# who lies


@pytest.mark.parametrize(
    "sampling",
    [PowerOfChoice(candidates=10), Oort(exploration=0, least_exploration=0)],
    ids=["power of choice", "oort"],
)
@pytest.mark.parametrize("claimed", [50.0, 1e308])
def test_a_device_that_claims_any_loss_is_taken_for_the_worst_of_the_honest_and_no_more(
    sampling: Sampling, claimed: float
) -> None:
    honest = [device(n, last_loss=2.0 if n == 0 else 1.0 + n / 100) for n in range(39)]
    liar = device(39, last_loss=claimed, examples=2**53)
    equal = device(39, last_loss=2.0, examples=1000)
    lied = shares(sampling, [*honest, liar], 2, 1000)
    told = shares(sampling, [*honest, equal], 2, 1000)
    close([lied[39]], [told[39]], 1000)
    assert all(math.isfinite(share) for share in lied)


@pytest.mark.parametrize("loss", [-1e308, 0.0, 1e308])
def test_losses_at_the_ends_of_what_a_float_holds_are_no_trouble(loss: float) -> None:
    candidates = [device(n, last_loss=loss, examples=2**53, duration_s=0.0) for n in range(10)]
    for sampling in STRATEGIES:
        close(shares(sampling, candidates, 2, 500), [0.2] * 10, 500)
