"""Verdicts on versions: what they come to together, and what liars among them cannot do."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtt.errors import ConfigError
from fedtt.evaluation import EvaluationSpec, Measure, counts, measured, middle, worse
from fedtt.messages import Judged, Verdict

GREATEST = 1e9  #: the highest loss that a message may carry
losses = st.floats(0, GREATEST)


def verdict(examples: int, before: tuple[float, int | None], after: tuple[float, int | None]) -> Verdict:
    return Verdict(
        examples=examples,
        before=Judged(loss=before[0], right=before[1]),
        after=Judged(loss=after[0], right=after[1]),
    )


def by_loss(before: float, after: float, examples: int = 8) -> Verdict:
    return verdict(examples, (before, None), (after, None))


def by_accuracy(before: int, after: int, examples: int) -> Verdict:
    return verdict(examples, (1.0, before), (1.0, after))


def held(spec: EvaluationSpec, *verdicts: Verdict) -> bool:
    return worse(spec, measured(spec, verdicts)) is not None


@st.composite
def anything(draw: st.DrawFn) -> Verdict:
    """Whatever the protocol takes, with and without an accuracy."""
    examples = draw(st.integers(1, 256))
    right = st.none() | st.integers(0, examples)
    return verdict(examples, (draw(losses), draw(right)), (draw(losses), draw(right)))


# the middle


def middle_by_hand(values: list[float]) -> Fraction:
    """One of the highest and one of the lowest are struck out, once for each three values; exactly."""
    left = [Fraction(value) for value in values]
    for _ in range(len(values) // 3):
        left.remove(max(left))
        left.remove(min(left))
    return sum(left, Fraction()) / len(left)


@given(st.lists(st.floats(-GREATEST, GREATEST), min_size=1, max_size=40))
def test_the_middle_is_what_striking_out_by_hand_leaves(values: list[float]) -> None:
    exact = middle_by_hand(values)
    assert abs(Fraction(middle(values)) - exact) <= abs(exact) * Fraction(2**-50)


@given(
    st.lists(st.floats(-1, 1), min_size=2, max_size=20),
    st.lists(st.floats(-GREATEST, GREATEST), max_size=10),
    st.randoms(),
)
def test_a_third_of_the_values_cannot_take_the_middle_out_of_what_the_others_are(
    honest: list[float], others: list[float], order: Random
) -> None:
    others = others[: len(honest) // 2]  # at most a third of all
    values = [*honest, *others]
    order.shuffle(values)
    assert min(honest) <= middle(values) <= max(honest)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7, 10, 100])
def test_one_liar_more_than_a_third_takes_the_middle_where_it_likes(count: int) -> None:
    liars = count // 3 + 1
    assert middle([0.0] * (count - liars) + [GREATEST] * liars) > 1e6


# what decides


@pytest.mark.parametrize(("loss", "is_worse"), [(0.5, False), (1.25, False), (1.2501, True)])
def test_a_loss_may_rise_by_the_bound_and_no_more(loss: float, is_worse: bool) -> None:
    assert held(EvaluationSpec(measure="loss", bound=0.25), by_loss(1.0, loss)) == is_worse


@pytest.mark.parametrize(("right", "is_worse"), [(8, False), (6, False), (5, True)])
def test_an_accuracy_may_fall_by_the_bound_and_no_more(right: int, is_worse: bool) -> None:
    spec = EvaluationSpec(measure="accuracy", bound=0.25)
    assert held(spec, verdict(8, (1.0, 8), (9.0, right))) == is_worse


def test_the_reason_states_what_decided_and_where_the_version_stood() -> None:
    spec = EvaluationSpec(bound=0.25)
    assert worse(spec, measured(spec, [by_loss(1.0, 1.5)])) == (
        "its loss rose by 0.5000 on 8 examples, more than 0.25: from 1.0000 to 1.5000"
    )
    spec = EvaluationSpec(measure="accuracy")
    three = [by_accuracy(8, 4, 8), by_accuracy(4, 3, 4), by_accuracy(2, 2, 2)]
    assert worse(spec, measured(spec, three)) == (
        "its accuracy fell by 25.0 points in the middle third of 3 verdicts on 14 examples, more than 10:"
        " from 100.0 to 75.0 %"
    )


def test_each_verdict_counts_the_same_however_many_examples_it_states() -> None:
    report = measured(EvaluationSpec(), [by_loss(1, 2, 1), by_loss(1, 2, 1), by_loss(1, 0.5, 256)])
    assert report == {
        "judged_verdicts": 3.0,
        "judged_examples": 258.0,
        "judged_worse_by": 1.0,
        "judged_loss_before": 1.0,
        "judged_loss": 2.0,
    }


def test_an_accuracy_is_reported_of_those_that_have_one() -> None:
    report = measured(EvaluationSpec(), [by_loss(1, 1), by_accuracy(1, 2, 4), by_accuracy(3, 4, 4)])
    assert (report["judged_accuracy_before"], report["judged_accuracy"]) == (0.5, 0.75)


def test_a_task_that_goes_by_accuracy_releases_nothing_that_has_none() -> None:
    spec = EvaluationSpec(measure="accuracy")
    assert worse(spec, measured(spec, [by_loss(1.0, 0.1)])) == (
        "it was judged without an accuracy, by which the task goes"
    )


# who lies


@given(st.lists(anything(), min_size=1, max_size=10), st.integers(0, 20), st.booleans(), st.randoms())
@pytest.mark.parametrize("measure", ["loss", "accuracy"])
def test_a_third_of_judges_can_neither_hold_what_the_others_find_good_nor_release_what_they_find_worse(
    measure: Measure, lies: list[Verdict], more: int, good: bool, order: Random
) -> None:
    spec = EvaluationSpec(measure=measure, bound=0.5)
    lies = [lie for lie in lies if counts(spec, lie)]
    honest = [
        verdict(128, (1.0, 80), (1.0 + change / 128, 80 - change))
        for change in ((64, 5, -40) if good else (65, 70, 80))
    ]
    judged = lies + [honest[n % 3] for n in range(max(1, 2 * len(lies)) + more)]
    order.shuffle(judged)
    assert held(spec, *judged) != good


def test_the_lie_of_one_of_ten_neither_holds_nor_releases() -> None:
    spec = EvaluationSpec()
    assert not held(spec, *[by_loss(1.0, 0.9)] * 9, by_loss(0.0, GREATEST, 1))
    assert held(spec, *[by_loss(1.0, 5.0)] * 9, by_loss(GREATEST, 0.0, 256))


def test_what_lacks_the_measure_or_is_on_more_examples_than_were_asked_for_does_not_count() -> None:
    by = EvaluationSpec(measure="accuracy", examples=8)
    assert counts(by, by_accuracy(8, 8, 8))
    assert not counts(by, by_accuracy(9, 9, 9))
    for before, after in ((None, None), (1, None), (None, 1)):
        lacking = verdict(8, (1.0, before), (1.0, after))
        assert not counts(by, lacking)
        assert counts(EvaluationSpec(), lacking)


# small shards


def falls(examples: int, share: float = 0.2) -> list[Verdict]:
    """Devices that got all right lose each answer with this probability: by the binomial, as 1000 devices."""
    odds = [math.comb(examples, k) * share**k * (1 - share) ** (examples - k) for k in range(examples + 1)]
    edges = np.rint(1000 * np.cumsum([0, *odds])).astype(int)
    lost = [k for k, (low, high) in enumerate(pairwise(edges)) for _ in range(high - low)]
    return [by_accuracy(examples, examples - k, examples) for k in lost]


@pytest.mark.parametrize(("examples", "is_seen"), [(1, False), (2, False), (3, True), (5, True), (30, True)])
def test_a_fall_by_a_fifth_is_seen_on_three_examples_a_device_and_not_on_fewer(
    examples: int, is_seen: bool
) -> None:
    assert held(EvaluationSpec(measure="accuracy"), *falls(examples)) == is_seen


def test_a_median_would_not_see_it_on_three() -> None:
    right = sorted(v.after.right for v in falls(3) if v.after.right is not None)
    assert (len(right), right[len(right) // 2]) == (1000, 3)


# settings


def test_nonsense_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"evaluation.quorum.*a number from 1 to evaluation.devices = 2"):
        EvaluationSpec(devices=2, quorum=3)
    with pytest.raises(ConfigError, match=r"after.right.*at most examples = 3"):
        verdict(3, (1.0, 3), (1.0, 4))


@pytest.mark.parametrize(("devices", "least"), [(1, 1), (2, 2), (3, 3), (10, 3)])
def test_three_verdicts_are_needed_or_all_unless_a_task_says_otherwise(devices: int, least: int) -> None:
    assert EvaluationSpec(devices=devices).least == least
    assert EvaluationSpec(devices=devices, quorum=1).least == 1
