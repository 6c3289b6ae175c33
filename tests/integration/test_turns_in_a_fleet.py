"""Devices that are told when their turn may come, from end to end: client, server and virtual time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from msgspec.structs import replace

from aggregator import rules
from aggregator.metrics import totals
from edge_client.runtime import Runtimes
from fedtt.algorithms import HierFedTT, Method
from fedtt.evaluation import EvaluationSpec
from fleet.availability import Window
from fleet.profiles import Profile
from storage.records import TaskState
from tests.support.edge import MeanTarget
from tests.support.fleets import SmallFleet, small_task

DEVICES, ROUNDS, COHORT = 400, 30, 8
ALIKE = (Profile(name="alike", step_s=5.0),)
UNLIKE = (Profile(name="quick", step_s=1.0), Profile(name="slow", step_s=20.0))


class OneInThree:
    """Most devices come at first and never again."""

    def window(self, index: int, now: float) -> Window | None:
        return None if index % 3 and now > 1_000_100.0 else (-math.inf, math.inf)


def run(
    directory: Path,
    profiles: tuple[Profile, ...],
    evaluation: EvaluationSpec | None = None,
    method: Method | None = None,
    **fleet: object,
) -> tuple[float, float]:
    """Check-ins a participation, and how long the fleet took in virtual seconds."""
    task = replace(small_task(rounds=ROUNDS, cohort=COHORT), evaluation=evaluation)
    task = task if method is None else replace(task, method=method)
    small = SmallFleet(directory, devices=DEVICES, task=task, profiles=profiles, **fleet)  # type: ignore[arg-type]
    small.run()
    assert small.server.task.state is TaskState.FINISHED
    answers = totals(small.server.service.metrics.check_ins, "answer")
    return sum(answers.values()) / (ROUNDS * COHORT), small.versions[-1].created_at - 1_000_000.0


def foretell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "pace_s", lambda *_: None)


@pytest.mark.parametrize("profiles", [ALIKE, UNLIKE], ids=["alike", "unlike"])
def test_devices_ask_a_fraction_as_often_and_rounds_are_no_slower(
    profiles: tuple[Profile, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, took_s = run(tmp_path / "told", profiles)
    foretell_nothing(monkeypatch)
    asked_before, took_before_s = run(tmp_path / "asking", profiles)
    assert asked < asked_before / 3
    assert took_s < 1.1 * took_before_s


def test_where_most_of_the_invited_do_not_come_all_others_go_on_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, took_s = run(tmp_path / "told", ALIKE, availability=OneInThree())
    foretell_nothing(monkeypatch)
    _, took_before_s = run(tmp_path / "asking", ALIKE, availability=OneInThree())
    assert took_s < 1.1 * took_before_s


def test_devices_that_are_to_judge_a_version_are_not_sent_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judges, evaluation = Runtimes(lambda _: MeanTarget()), EvaluationSpec(devices=10)
    _, took_s = run(tmp_path / "told", ALIKE, evaluation, judges=judges)
    foretell_nothing(monkeypatch)
    _, took_before_s = run(tmp_path / "asking", ALIKE, evaluation, judges=judges)
    assert took_s < 1.1 * took_before_s


def test_devices_that_groups_are_yet_to_be_formed_of_are_not_sent_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = HierFedTT(groups=3, warmup_rounds=3)
    _, took_s = run(tmp_path / "told", UNLIKE, method=method)
    foretell_nothing(monkeypatch)
    _, took_before_s = run(tmp_path / "asking", UNLIKE, method=method)
    assert took_s == took_before_s
