"""Devices that judge versions: who is asked, which verdicts count, and what they decide."""

from __future__ import annotations

import pytest

from fedtt.evaluation import EvaluationSpec
from fedtt.messages import CheckIn, Code, Judge, Judged, Problem, Verdict, Wait, Work
from storage.records import MAIN, VersionState
from tests.unit.aggregator.test_releases import (
    BETTER,
    WORSE,
    Server,
    advance,
    answer,
    asked,
)

DEVICES = EvaluationSpec(devices=2, quorum=1, deadline_s=30.0)


def test_devices_that_did_not_train_a_version_judge_it_beside_the_one_before() -> None:
    server = Server(DEVICES)
    server.train()
    before, candidate = server.versions()
    question = asked(server, 1)
    assert (question.version, question.before) == (candidate.sha256, before.sha256)
    assert (question.version_number, question.examples, question.expires_in_s) == (1, 256, 29.0)
    assert asked(server, 1, now=2.0).lease == question.lease  # the same question again
    assert isinstance(server.check_in(0, 1.0, judges=True), Wait)  # it trained the version
    assert isinstance(server.check_in(3, 1.0), Wait)  # it does not judge
    other = asked(server, 2)
    assert isinstance(server.check_in(3, 1.0, judges=True), Wait)  # two were to be asked
    assert answer(server, 1, question.lease, BETTER) is None
    advance(server, 3.0)
    assert server.versions()[1].state is VersionState.CANDIDATE
    assert answer(server, 2, other.lease, BETTER) is None
    advance(server, 3.0)
    released = server.versions()[1]
    assert (released.state, released.report["judged_examples"]) == (VersionState.RELEASED, 20.0)
    assert any(isinstance(server.check_in(device, 4.0), Work) for device in range(4))


def test_a_device_that_tells_nothing_new_is_asked_to_judge_only_if_it_says_that_it_would() -> None:
    server = Server(DEVICES)
    server.train()
    device = server.devices[1]
    assert isinstance(server.check_in(1, 1.0), Wait)
    for judges, kind in ((False, Wait), (True, Judge)):
        message = CheckIn(client="test", runtimes=("onnxruntime",), examples=1, judges=judges).as_told()
        with server.store.transaction() as tx:
            assert type(server.coordinator.check_in(tx, 1.0, device, message)) is kind


def test_what_devices_find_worse_is_held() -> None:
    server = Server(DEVICES)
    server.train()
    for device in (1, 2):
        assert answer(server, device, asked(server, device).lease, WORSE) is None
    advance(server, 3.0)
    assert [v.state.value for v in server.versions()] == ["released", "held", "released"]


def test_at_the_deadline_three_are_needed_unless_the_task_says_otherwise() -> None:
    server = Server(EvaluationSpec(deadline_s=30.0))
    server.train()
    for device in (1, 2):
        assert answer(server, device, asked(server, device).lease, BETTER) is None
    advance(server, 30.0)
    assert server.versions()[1].reason == "2 of at least 3 devices had judged it 30 s after its fold"


@pytest.mark.parametrize(
    "useless",
    [
        Verdict(examples=1, before=Judged(loss=1.0), after=Judged(loss=1.0)),
        Verdict(examples=257, before=Judged(loss=1.0, right=0), after=Judged(loss=1.0, right=0)),
    ],
    ids=["without the measure", "on more examples than asked"],
)
def test_the_place_of_a_device_whose_verdict_does_not_count_goes_to_another(useless: Verdict) -> None:
    server = Server(EvaluationSpec(devices=2, measure="accuracy"))
    server.train()
    one, other = asked(server, 1), asked(server, 2)
    assert isinstance(server.check_in(3, 1.0, judges=True), Wait)
    assert answer(server, 1, one.lease, useless) is None
    assert answer(server, 2, other.lease, BETTER) is None
    advance(server, 3.0)
    assert server.versions()[1].state is VersionState.CANDIDATE
    assert isinstance(server.check_in(1, 3.0, judges=True), Wait)  # it was asked
    assert answer(server, 3, asked(server, 3).lease, BETTER) is None
    advance(server, 3.0)
    released = server.versions()[1]
    assert (released.state, released.report["judged_verdicts"]) == (VersionState.RELEASED, 2.0)


@pytest.mark.parametrize(("verdicts", "state"), [(0, VersionState.HELD), (1, VersionState.RELEASED)])
def test_at_the_deadline_a_quorum_of_verdicts_is_enough(verdicts: int, state: VersionState) -> None:
    server = Server(DEVICES)
    server.train()
    for device in range(1, 1 + verdicts):
        assert answer(server, device, asked(server, device).lease, BETTER) is None
    advance(server, 29.9)
    assert server.versions()[1].state is VersionState.CANDIDATE
    advance(server, 30.0)
    assert server.versions()[1].state is state
    if state is VersionState.HELD:
        assert server.versions()[1].reason == "0 of at least 1 devices had judged it 30 s after its fold"


def test_a_question_that_is_given_back_goes_to_another_device() -> None:
    server = Server(EvaluationSpec(devices=1))
    server.train()
    question = asked(server, 1)
    assert isinstance(server.check_in(2, 1.0, judges=True), Wait)
    with server.store.transaction() as tx:
        assert server.coordinator.fail(tx, server.devices[1], question.lease) is None
    assert isinstance(server.check_in(1, 1.0, judges=True), Wait)
    assert asked(server, 2).lease != question.lease


def test_a_verdict_is_taken_once_in_time_and_from_the_device_that_was_asked() -> None:
    server = Server(DEVICES)
    server.train()
    question = asked(server, 1)
    for device, lease, code in ((2, question.lease, Code.UNKNOWN_LEASE), (1, "0" * 32, Code.UNKNOWN_LEASE)):
        refusal = answer(server, device, lease, BETTER)
        assert isinstance(refusal, Problem)
        assert refusal.code is code
    assert answer(server, 1, question.lease, BETTER) is None
    assert answer(server, 1, question.lease, BETTER) is None  # the same again
    refusal = answer(server, 1, question.lease, WORSE)
    assert isinstance(refusal, Problem)
    assert refusal.code is Code.CONFLICT
    late = asked(server, 2)
    server.judge(1, BETTER)
    refusal = answer(server, 2, late.lease, WORSE)
    assert isinstance(refusal, Problem)
    assert refusal.code is Code.STALE


def test_a_device_that_is_erased_leaves_no_verdict_and_counts_no_more() -> None:
    server = Server(DEVICES)
    server.train()
    assert answer(server, 1, asked(server, 1).lease, WORSE) is None
    with server.store.transaction() as tx:
        server.coordinator.leave(tx, server.devices[1], erase=True)
        (evaluation,) = tx.evaluations(1, MAIN, 1)
    assert evaluation.verdict is None
    advance(server, 30.0)
    assert server.versions()[1].reason == "0 of at least 1 devices had judged it 30 s after its fold"
