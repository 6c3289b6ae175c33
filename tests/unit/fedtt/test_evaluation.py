"""Verdicts on versions: put together, and what they come to."""

from __future__ import annotations

import pytest

from fedtt.errors import ConfigError
from fedtt.evaluation import EvaluationSpec, total, worse
from fedtt.messages import Judged, Verdict


def verdict(examples: int, before: tuple[float, int | None], after: tuple[float, int | None]) -> Verdict:
    return Verdict(
        examples=examples,
        before=Judged(loss=before[0], right=before[1]),
        after=Judged(loss=after[0], right=after[1]),
    )


def test_verdicts_are_weighted_by_their_examples_up_to_a_bound() -> None:
    found = total([verdict(10, (1.0, 5), (2.0, 4)), verdict(1000, (4.0, 500), (3.0, 1000))], most_examples=30)
    assert found.examples == 40  # 10 + 30
    assert found.before.loss == (10 * 1.0 + 30 * 4.0) / 40
    assert found.after.loss == (10 * 2.0 + 30 * 3.0) / 40
    assert (found.before.right, found.after.right) == (20, 34)  # 5 + 30/2, 4 + 30


def test_one_without_an_accuracy_leaves_all_without() -> None:
    found = total([verdict(1, (1.0, 1), (1.0, 1)), verdict(1, (1.0, None), (1.0, None))], most_examples=9)
    assert (found.before.right, found.after.right) == (None, None)


@pytest.mark.parametrize(("loss", "is_worse"), [(0.5, False), (1.25, False), (1.2501, True)])
def test_a_loss_may_rise_by_the_bound_and_no_more(loss: float, is_worse: bool) -> None:
    spec = EvaluationSpec(measure="loss", bound=0.25)
    assert (worse(spec, verdict(8, (1.0, None), (loss, None))) is not None) == is_worse


@pytest.mark.parametrize(("right", "is_worse"), [(8, False), (6, False), (5, True)])
def test_an_accuracy_may_fall_by_the_bound_and_no_more(right: int, is_worse: bool) -> None:
    spec = EvaluationSpec(measure="accuracy", bound=0.25)
    assert (worse(spec, verdict(8, (1.0, 8), (9.0, right))) is not None) == is_worse


def test_a_task_that_goes_by_accuracy_releases_nothing_that_has_none() -> None:
    why = worse(EvaluationSpec(measure="accuracy"), verdict(8, (1.0, None), (0.1, None)))
    assert why == "it was judged without an accuracy, by which the task goes"


def test_nonsense_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"evaluation.quorum.*a number from 1 to evaluation.devices = 2"):
        EvaluationSpec(devices=2, quorum=3)
    with pytest.raises(ConfigError, match=r"after.right.*at most examples = 3"):
        verdict(3, (1.0, 3), (1.0, 4))
