"""Versions that are judged before devices train from them, held, and brought back."""

from __future__ import annotations

from typing import Any

import pytest

from aggregator.coordinator import Coordinator
from aggregator.lifecycle import Fold
from aggregator.releases import Releases
from aggregator.uploads import Admission, Upload
from fedtt.evaluation import EvaluationSpec
from fedtt.messages import CheckIn, Code, Enroll, Judge, Judged, Problem, Verdict, Wait, Work
from fedtt.task import RoundSpec, TaskSpec
from fedtt.wire import UpdateHeader
from storage.memory import MemoryStore
from storage.records import MAIN, RoundState, Task, TaskState, Token, UpdateState, Version, VersionState
from tests.support.ledger import sha256
from tests.support.tiny import add_task

HEADER = UpdateHeader(layout=b"\0" * 8, examples=1, steps=1, loss_first=1.0, loss_last=0.5)
BETTER = Verdict(examples=10, before=Judged(loss=1.0, right=5), after=Judged(loss=0.9, right=6))
WORSE = Verdict(examples=10, before=Judged(loss=1.0, right=5), after=Judged(loss=1.2, right=3))


def upload_of(admission: Admission) -> Upload:
    return Upload(admission=admission, digest="0" * 64, header=HEADER, payload=b"payload")


class Server:
    """A coordinator over an in-memory store, whose versions are judged from outside."""

    def __init__(self, evaluation: EvaluationSpec | None, **rounds: Any) -> None:
        self.store, self.lifecycle = MemoryStore(), Releases()
        self.coordinator = Coordinator(self.lifecycle)
        settings = {"count": 9, "cohort": 1, "deadline_s": 60.0} | rounds
        spec = TaskSpec(name="t", rounds=RoundSpec(**settings), evaluation=evaluation)
        with self.store.transaction() as tx:
            add_task(tx, spec)
            tx.put_token(Token(sha256="many", uses_left=None, expires_at=None))
        self.devices = [self._enroll(number) for number in (1, 2, 3, 4)]

    def _enroll(self, number: int) -> str:
        message = Enroll(public_key=bytes([number]) * 32, token="…", client="test")
        with self.store.transaction() as tx:
            enrolled = self.coordinator.enroll(tx, 0.0, message, "many")
        assert not isinstance(enrolled, Problem)
        return enrolled.device

    def task(self) -> Task:
        with self.store.reading() as tx:
            found = tx.task("t")
        assert found is not None
        return found

    def versions(self) -> list[Version]:
        with self.store.reading() as tx:
            return [version for version in tx.versions(1) if version.branch == MAIN]

    def check_in(self, device: int = 0, now: float = 0.0, *, judges: bool = False) -> object:
        message = CheckIn(client="test", runtimes=("onnxruntime",), examples=1, judges=judges)
        with self.store.transaction() as tx:
            return self.coordinator.check_in(tx, now, self.devices[device], message)

    def train(self, now: float = 0.0) -> None:
        """A device trains, and its update makes the next version."""
        work = self.check_in(now=now)
        assert isinstance(work, Work)
        with self.store.transaction() as tx:
            admission = self.coordinator.admit(tx, self.devices[0], work.lease, "0" * 64)
            assert isinstance(admission, Admission)
            self.coordinator.accept(tx, now, upload_of(admission))
        self.fold(now)

    def fold(self, now: float) -> Version | None:
        with self.store.transaction() as tx:
            (round_,) = self.lifecycle.advance(tx, now)
            updates = tx.updates(1, MAIN, round_.number, UpdateState.ACCEPTED)
            fold = Fold(
                task_id=1,
                round_number=round_.number,
                sha256=sha256(f"fold of round {round_.number}"),
                updates=tuple(update.lease_id for update in updates),
                examples=1,
                loss_first=1.0,
                loss_last=1.0,
                variants={},
                server_state=sha256(f"state of round {round_.number}"),
                report={"kept": 1.0},
            )
            return self.lifecycle.publish(tx, now, fold)

    def judge(self, number: int, verdict: Verdict, now: float = 1.0) -> Version | Problem:
        with self.store.transaction() as tx:
            return self.lifecycle.judge(tx, now, "t", number, verdict)

    def roll_back(self, number: int) -> Version | Problem:
        with self.store.transaction() as tx:
            return self.lifecycle.roll_back(tx, 2.0, "t", number)

    def set_active(self, now: float, state: TaskState) -> None:
        with self.store.transaction() as tx:
            self.lifecycle.set_active(tx, now, "t", state, "operator")


FILE = EvaluationSpec(by="file")


def test_no_device_trains_from_a_version_before_it_is_released() -> None:
    server = Server(FILE)
    server.train()
    assert [v.state for v in server.versions()] == [VersionState.RELEASED, VersionState.CANDIDATE]
    wait = server.check_in()
    assert isinstance(wait, Wait)
    assert wait.reason == "the newest version is being judged"
    released = server.judge(1, BETTER)
    assert isinstance(released, Version)
    assert released.state is VersionState.RELEASED
    assert released.report == {
        "kept": 1.0,
        "judged_verdicts": 1.0,
        "judged_examples": 10.0,
        "judged_worse_by": 0.9 - 1.0,
        "judged_loss_before": 1.0,
        "judged_loss": 0.9,
        "judged_accuracy_before": 0.5,
        "judged_accuracy": 0.6,
    }
    work = server.check_in()
    assert isinstance(work, Work)
    assert work.plan.version_number == 1


def test_without_an_evaluation_a_version_is_released_as_it_is_folded() -> None:
    server = Server(None)
    server.train()
    assert [v.state for v in server.versions()] == [VersionState.RELEASED, VersionState.RELEASED]


def test_what_stood_before_a_held_version_follows_it_and_the_next_round_folds_onto_that() -> None:
    server = Server(FILE)
    server.train()
    server.judge(1, BETTER)
    server.train()
    held = server.judge(2, WORSE)
    assert isinstance(held, Version)
    assert held.state is VersionState.HELD
    assert held.reason == "its loss rose by 0.2000 on 10 examples, more than 0.1: from 1.0000 to 1.2000"
    first, good, bad, again = server.versions()
    assert (again.number, again.sha256, again.state) == (3, good.sha256, VersionState.RELEASED)
    assert again.server_state == good.server_state
    assert again.reason.startswith("version 2 was held: its loss rose")
    assert (first.number, bad.number) == (0, 2)
    server.train()
    assert server.versions()[-1].parents == (good.sha256,)
    assert server.versions()[-1].number == 4


def test_a_version_that_nobody_judges_in_time_is_held() -> None:
    server = Server(EvaluationSpec(by="file", deadline_s=30.0))
    server.train(now=5.0)
    with server.store.transaction() as tx:
        server.lifecycle.advance(tx, 34.9)
    assert server.versions()[1].state is VersionState.CANDIDATE
    with server.store.transaction() as tx:
        server.lifecycle.advance(tx, 35.0)
    assert server.versions()[1].state is VersionState.HELD
    assert server.versions()[1].reason == "nobody had judged it 30 s after its fold"


def test_a_candidate_loses_no_time_while_its_task_is_paused() -> None:
    server = Server(EvaluationSpec(devices=1, deadline_s=30.0))
    server.train(now=5.0)
    question = asked(server, 1, now=6.0)
    server.set_active(7.0, TaskState.PAUSED)
    server.set_active(100.0, TaskState.ACTIVE)
    advance(server, 129.9)
    assert server.versions()[1].state is VersionState.CANDIDATE
    again = asked(server, 1, now=120.0)
    assert (again.lease, again.expires_in_s) == (question.lease, 10.0)  # 100 + 30 - 120
    assert answer(server, 1, again.lease, BETTER, now=121.0) is None
    server.set_active(122.0, TaskState.ACTIVE)  # it was active, so no time is given
    advance(server, 130.0)
    assert server.versions()[1].state is VersionState.RELEASED


def test_a_candidate_that_nobody_judges_after_its_task_was_resumed_is_held() -> None:
    server = Server(EvaluationSpec(by="file", deadline_s=30.0))
    server.train()
    server.set_active(7.0, TaskState.PAUSED)
    server.set_active(100.0, TaskState.ACTIVE)
    advance(server, 130.0)
    assert server.versions()[1].reason == "nobody had judged it 30 s after the task was resumed"


def test_a_task_whose_versions_are_held_again_and_again_pauses_itself_and_says_why() -> None:
    server = Server(FILE, give_up_after=2)
    server.train()
    server.judge(1, WORSE)
    assert server.task().state is TaskState.ACTIVE
    server.train()
    server.judge(3, WORSE)
    assert server.task().state is TaskState.PAUSED
    assert server.task().reason.startswith("2 versions in a row were held, the last because its loss rose")


def test_a_released_version_between_two_held_ones_keeps_the_task_going() -> None:
    server = Server(FILE, give_up_after=2)
    server.train()
    server.judge(1, WORSE)
    server.train()
    server.judge(3, BETTER)
    server.train()
    server.judge(4, WORSE)
    assert server.task().state is TaskState.ACTIVE


def test_a_task_ends_when_its_last_version_is_released_and_not_before() -> None:
    server = Server(FILE, count=1)
    server.train()
    assert server.task().state is TaskState.ACTIVE
    server.judge(1, BETTER)
    assert server.task().state is TaskState.FINISHED


@pytest.mark.parametrize("number", [0, 1])
def test_a_version_that_has_its_verdict_takes_no_other(number: int) -> None:
    server = Server(FILE)
    server.train()
    server.judge(1, BETTER)
    answer = server.judge(number, WORSE)
    assert isinstance(answer, Problem)
    assert answer.code is Code.CONFLICT
    assert answer.detail == f"version {number} of task 't' is released already"


def test_a_roll_back_publishes_the_old_content_under_a_new_number_and_leaves_open_work_behind() -> None:
    server = Server(None)
    server.train()
    server.train()
    work = server.check_in()
    assert isinstance(work, Work)
    again = server.roll_back(1)
    assert isinstance(again, Version)
    old = server.versions()[1]
    assert (again.number, again.sha256, again.server_state) == (3, old.sha256, old.server_state)
    with server.store.reading() as tx:
        left, next_ = tx.round(1, MAIN, 3), tx.latest_round(1, MAIN)
    assert left is not None
    assert next_ is not None
    assert (left.state, left.reason) == (RoundState.ABANDONED, "an operator brought version 1 back")
    assert (next_.state, next_.version_number) == (RoundState.OPEN, 3)
    with server.store.reading() as tx:
        late = server.coordinator.admit(tx, server.devices[0], work.lease, "1" * 64)
    assert isinstance(late, Problem)
    assert late.code is Code.STALE


def test_a_fold_under_way_comes_to_nothing_when_its_base_is_rolled_back() -> None:
    server = Server(None)
    server.train()
    work = server.check_in()
    assert isinstance(work, Work)
    with server.store.transaction() as tx:
        admission = server.coordinator.admit(tx, server.devices[0], work.lease, "0" * 64)
        assert isinstance(admission, Admission)
        server.coordinator.accept(tx, 0.0, upload_of(admission))
        (claimed,) = server.lifecycle.advance(tx, 0.0)
    server.roll_back(0)
    fold = Fold(
        task_id=1,
        round_number=claimed.number,
        sha256=sha256("late"),
        updates=(work.lease,),
        examples=1,
        loss_first=1.0,
        loss_last=1.0,
        variants={},
        server_state=sha256("state"),
        report={},
    )
    with server.store.transaction() as tx:
        assert server.lifecycle.publish(tx, 3.0, fold) is None
        update = tx.update(work.lease)
    assert update is not None
    assert update.state is UpdateState.DISCARDED
    assert [v.number for v in server.versions()] == [0, 1, 2]


def test_a_roll_back_holds_a_version_that_waits_for_its_verdict() -> None:
    server = Server(FILE)
    server.train()
    server.judge(1, BETTER)
    server.train()
    assert isinstance(server.roll_back(1), Version)
    assert [v.state.value for v in server.versions()] == ["released", "released", "held", "released"]
    assert isinstance(server.check_in(), Work)


def test_a_version_that_was_held_is_brought_back_only_once_it_is_released() -> None:
    server = Server(FILE)
    server.train()
    server.judge(1, WORSE)
    refusal = server.roll_back(1)
    assert isinstance(refusal, Problem)
    assert (refusal.code, refusal.detail) == (Code.CONFLICT, "version 1 of task 't' is held")
    assert refusal.remedy == "if it is good after all, run `fedtt version release t 1` first"
    assert len(server.versions()) == 3
    with server.store.transaction() as tx:
        assert isinstance(server.lifecycle.release(tx, 2.0, "t", 1), Version)
    again = server.roll_back(1)
    assert isinstance(again, Version)
    assert (again.number, again.sha256) == (3, server.versions()[1].sha256)


def test_rounds_that_a_roll_back_ends_are_no_failures() -> None:
    server = Server(None, give_up_after=2, deadline_s=10.0)
    server.train()
    assert isinstance(server.check_in(), Work)
    server.roll_back(0)
    assert isinstance(server.check_in(now=2.0), Work)
    advance(server, 20.0)  # nobody sent anything: the first failure of two
    assert server.task().state is TaskState.ACTIVE
    assert isinstance(server.check_in(now=20.0), Work)
    advance(server, 40.0)
    assert server.task().state is TaskState.PAUSED


def test_what_stands_there_now_or_never_stood_is_not_brought_back() -> None:
    server = Server(None)
    server.train()
    for number, code in ((1, Code.CONFLICT), (7, Code.NOT_FOUND)):
        answer = server.roll_back(number)
        assert isinstance(answer, Problem)
        assert answer.code is code
    assert len(server.versions()) == 2


def test_tasks_with_more_priority_are_offered_first() -> None:
    server = Server(None)
    with server.store.transaction() as tx:
        urgent = TaskSpec(name="urgent", rounds=RoundSpec(count=9, cohort=1), priority=1)
        add_task(tx, urgent)
    first, second = server.check_in(0), server.check_in(1)
    assert isinstance(first, Work)
    assert isinstance(second, Work)
    assert (first.plan.task, second.plan.task) == ("urgent", "t")


def asked(server: Server, device: int, now: float = 1.0) -> Judge:
    question = server.check_in(device, now, judges=True)
    assert isinstance(question, Judge)
    return question


def answer(server: Server, device: int, lease: str, verdict: Verdict, now: float = 2.0) -> Problem | None:
    with server.store.transaction() as tx:
        return server.coordinator.evaluations.accept(tx, now, server.devices[device], lease, verdict)


def advance(server: Server, now: float) -> None:
    with server.store.transaction() as tx:
        server.lifecycle.advance(tx, now)
