"""Single decisions of the coordinator, where the state machine would need luck to meet them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from msgspec.structs import replace

from aggregator.coordinator import Coordinator
from aggregator.lifecycle import Fold, Lifecycle
from aggregator.uploads import Admission, Upload
from fedtt.adapter import AdapterSpec
from fedtt.algorithms import ExactFedTT, FedTT, Method, RoLoRA
from fedtt.manifest import Manifest
from fedtt.messages import (
    CheckIn,
    CheckInAnswer,
    Code,
    Enroll,
    Enrolled,
    Problem,
    Receipt,
    Wait,
    Work,
)
from fedtt.sampling import Sampling, Uniform
from fedtt.server_optimiser import ServerState
from fedtt.task import RoundSpec, TaskSpec
from fedtt.wire import UpdateHeader
from storage.memory import MemoryStore
from storage.records import MAIN, LeaseState, RoundState, Task, TaskState, Token, UpdateState
from tests.support.ranks import lora_adapter
from tests.support.tiny import add_task, tiny_manifest

HEADER = UpdateHeader(layout=b"\0" * 8, examples=1, steps=1, loss_first=1.0, loss_last=0.5)

#: What a first fold leaves: here it is only looked at for whether there is one.
FOLDED = ServerState(
    first=np.zeros(0, np.float32), second=np.zeros(0, np.float32), norms=np.ones(9, np.float32)
)


class Server:
    """A coordinator over an in-memory store with one task, driven by hand."""

    def __init__(
        self,
        method: Method | None = None,
        sampling: Sampling | None = None,
        adapter: AdapterSpec | None = None,
        **rounds: float,
    ) -> None:
        self.store = MemoryStore()
        self.coordinator = Coordinator(Lifecycle(lambda version: FOLDED if version.number else None))
        settings = {"count": 9, "cohort": 2, "deadline_s": 60.0} | rounds
        spec = TaskSpec(
            name="t",
            rounds=RoundSpec(**settings),  # type: ignore[arg-type]
            method=method or FedTT(),
            sampling=sampling or Uniform(),
        )
        with self.store.transaction() as tx:
            self.task: Task = add_task(tx, spec, described=_with(adapter) if adapter else None)
            tx.put_token(Token(sha256="once", uses_left=1, expires_at=100.0))
            tx.put_token(Token(sha256="many", uses_left=None, expires_at=None))

    def enroll(self, number: int, token: str = "many", now: float = 0.0) -> Enrolled | Problem:
        message = Enroll(public_key=bytes([number]) * 32, token="…", client="test")
        with self.store.transaction() as tx:
            return self.coordinator.enroll(tx, now, message, token)

    def device(self, number: int) -> str:
        enrolled = self.enroll(number)
        assert isinstance(enrolled, Enrolled)
        return enrolled.device

    def check_in(self, device: str, now: float = 0.0, examples: int = 1) -> CheckInAnswer | Problem:
        message = CheckIn(client="test", runtimes=("onnxruntime",), examples=examples)
        with self.store.transaction() as tx:
            return self.coordinator.check_in(tx, now, device, message)

    def work(self, device: str, now: float = 0.0) -> Work:
        answer = self.check_in(device, now)
        assert isinstance(answer, Work)
        return answer

    def admit(self, device: str, lease: str, frame: bytes = b"frame") -> Admission | Receipt | Problem:
        with self.store.reading() as tx:
            return self.coordinator.admit(tx, device, lease, hashlib.sha256(frame).hexdigest())

    def accept(
        self, admission: Admission, frame: bytes = b"frame", now: float = 0.0, loss: float = 1.0
    ) -> Receipt | Problem:
        digest, header = hashlib.sha256(frame).hexdigest(), replace(HEADER, loss_first=loss)
        with self.store.transaction() as tx:
            upload = Upload(admission=admission, digest=digest, header=header, payload=frame)
            return self.coordinator.accept(tx, now, upload)

    def upload(self, device: str, lease: str, now: float = 0.0, loss: float = 1.0) -> Receipt | Problem:
        admission = self.admit(device, lease)
        return self.accept(admission, now=now, loss=loss) if isinstance(admission, Admission) else admission

    def fold(self, now: float = 0.0) -> None:
        with self.store.transaction() as tx:
            (round_,) = self.coordinator.lifecycle.advance(tx, now)
            leases = tuple(
                u.lease_id for u in tx.updates(self.task.id, MAIN, round_.number, UpdateState.ACCEPTED)
            )
            fold = Fold(
                task_id=self.task.id,
                round_number=round_.number,
                sha256="0" * 64,
                updates=leases,
                examples=len(leases),
                loss_first=1.0,
                loss_last=1.0,
                variants={},
                server_state=hashlib.sha256(b"state").hexdigest(),
                report={},
            )
            assert self.coordinator.lifecycle.publish(tx, now, fold) is not None


def _with(adapter: AdapterSpec) -> Manifest:
    labels = tuple("abcde"[: adapter.head.labels] if adapter.head else "")
    return replace(tiny_manifest(), adapter=adapter, layout_sha256=adapter.layout.digest, labels=labels)


def code_of(answer: object) -> Code:
    assert isinstance(answer, Problem)
    return answer.code


def test_an_update_admitted_before_its_round_closed_is_refused_after_it() -> None:
    server = Server(cohort=2, buffer=1)
    first, second = server.device(1), server.device(2)
    early, late = server.work(first), server.work(second)
    admission = server.admit(second, late.lease)
    assert isinstance(admission, Admission)
    assert isinstance(server.upload(first, early.lease), Receipt)
    server.fold()
    assert code_of(server.accept(admission)) is Code.STALE


@pytest.mark.parametrize(
    ("max_staleness", "folds", "taken"), [(1, 1, True), (1, 2, False), (2, 2, True), (0, 1, False)]
)
def test_a_base_may_be_just_so_many_versions_old(max_staleness: int, folds: int, taken: bool) -> None:
    server = Server(cohort=2, buffer=1, max_staleness=max_staleness)
    slow, quick = server.device(1), server.device(2)
    lease = server.work(slow).lease
    for _ in range(folds):
        assert isinstance(server.upload(quick, server.work(quick).lease), Receipt)
        server.fold()
    assert isinstance(server.upload(slow, lease), Receipt) == taken


def stale_after(server: Server, folds: int) -> Problem | None:
    """What an update is refused with whose round was folded, and others after it, before it came."""
    slow, quick = server.device(1), server.device(2)
    lease = server.work(slow).lease
    for _ in range(folds):
        assert isinstance(server.upload(quick, server.work(quick).lease), Receipt)
        server.fold()
    answer = server.upload(slow, lease)
    return answer if isinstance(answer, Problem) else None


@pytest.mark.parametrize("orthogonal", [False, True])
def test_an_update_of_another_live_set_is_stale_however_old_its_base_may_be(orthogonal: bool) -> None:
    method = ExactFedTT(epoch_rounds=2, orthogonal=orthogonal)
    same = Server(method, cohort=2, buffer=1, max_staleness=9)
    assert stale_after(same, folds=1) is None
    other = stale_after(Server(method, cohort=2, buffer=1, max_staleness=9), folds=2)
    assert other is not None
    assert other.code is Code.STALE
    assert "its round 1 trained other factors than round 3" in other.detail


def test_an_update_of_the_same_live_set_is_stale_where_the_others_have_moved_since() -> None:
    # trains of two cores: after two rounds the first core's turn has come again
    again = stale_after(Server(ExactFedTT(), cohort=2, buffer=1, max_staleness=9), folds=2)
    assert again is not None
    assert again.code is Code.STALE
    assert "what surrounds its factors has been trained since its round 1" in again.detail


@pytest.mark.parametrize(
    ("epoch_rounds", "folds", "complaint"),
    [
        (3, 1, None),
        (3, 2, None),
        (3, 3, "its round 1 trained other factors than round 4"),  # B, and now it is the turn of A
        (1, 1, "its round 1 trained other factors than round 2"),
        (
            1,
            2,
            "what surrounds its factors has been trained since its round 1",
        ),  # B's turn again, A has moved
    ],
)
def test_an_update_of_one_of_loras_factors_is_taken_within_its_turn_alone(
    epoch_rounds: int, folds: int, complaint: str | None
) -> None:
    method = RoLoRA(epoch_rounds=epoch_rounds)
    server = Server(method, adapter=lora_adapter(), cohort=2, buffer=1, max_staleness=9)
    refused = stale_after(server, folds)
    if complaint is None:
        assert refused is None
    else:
        assert refused is not None
        assert refused.code is Code.STALE
        assert complaint in refused.detail


def test_the_same_bytes_get_the_same_receipt_after_the_fold_and_other_bytes_a_conflict() -> None:
    server = Server(cohort=1)
    device = server.device(1)
    lease = server.work(device).lease
    assert isinstance(server.upload(device, lease), Receipt)
    server.fold()
    again = server.admit(device, lease)
    assert isinstance(again, Receipt)
    assert (again.state, again.version_number) == (UpdateState.FOLDED, 1)
    assert code_of(server.admit(device, lease, b"other")) is Code.CONFLICT


def test_a_device_that_lost_the_answer_gets_the_same_lease_again() -> None:
    server = Server()
    device = server.device(1)
    assert server.work(device, now=0.0).lease == server.work(device, now=5.0).lease


def test_an_expired_lease_is_taken_while_its_round_is_open() -> None:
    server = Server(cohort=2, lease_s=10.0)
    device = server.device(1)
    lease = server.work(device).lease
    with server.store.transaction() as tx:
        server.coordinator.lifecycle.advance(tx, 20.0)
    assert isinstance(server.upload(device, lease, now=20.0), Receipt)


def test_a_lease_that_was_given_back_takes_no_update_and_frees_its_seat() -> None:
    server = Server(cohort=1)
    first, second = server.device(1), server.device(2)
    lease = server.work(first).lease
    assert isinstance(server.check_in(second), Wait)
    with server.store.transaction() as tx:
        server.coordinator.fail(tx, first, lease)
    assert code_of(server.upload(first, lease)) is Code.STALE
    assert isinstance(server.check_in(second, now=30.0), Work)


def test_a_token_is_used_up_and_expires_but_enrolling_again_costs_nothing() -> None:
    server = Server()
    assert isinstance(server.enroll(1, "once"), Enrolled)
    assert isinstance(server.enroll(1, "once"), Enrolled)
    assert code_of(server.enroll(2, "once")) is Code.BAD_TOKEN
    assert code_of(Server().enroll(1, "once", now=101.0)) is Code.BAD_TOKEN
    assert code_of(server.enroll(3, "never given")) is Code.BAD_TOKEN


def test_a_task_pauses_itself_after_abandoned_rounds_in_a_row_and_says_why() -> None:
    server = Server(cohort=1, give_up_after=2)
    device = server.device(1)
    now = 0.0
    for _ in range(2):
        server.work(device, now)
        now += 61.0
        with server.store.transaction() as tx:
            assert server.coordinator.lifecycle.advance(tx, now) == []
    with server.store.reading() as tx:
        task = tx.task("t")
        assert task is not None
        assert task.state is TaskState.PAUSED
        assert "0 of at least 1 updates" in task.reason
        assert [r.state for r in tx.rounds(task.id)] == [RoundState.ABANDONED] * 2


def test_a_plan_has_the_learning_rate_of_its_round() -> None:
    server = Server(cohort=1, give_up_after=9, final_rate=0.25)
    device, now, rates = server.device(1), 0.0, []
    for _ in range(2):
        rates.append(server.work(device, now).plan.training.learning_rate)
        now += 61.0
        with server.store.transaction() as tx:
            server.coordinator.lifecycle.advance(tx, now)
    assert rates == pytest.approx([5e-3, 5e-3 * (1 - 0.75 / (server.task.spec.rounds.count - 1))])


def test_a_task_that_is_resumed_gives_up_only_after_as_many_rounds_as_at_first() -> None:
    server = Server(cohort=1, give_up_after=2)
    device = server.device(1)
    lifecycle = server.coordinator.lifecycle
    states, now = [], 0.0
    for attempt in range(4):
        server.work(device, now)
        now += 61.0
        with server.store.transaction() as tx:
            lifecycle.advance(tx, now)
            states.append(tx.tasks()[0].state)
            if attempt == 1:
                lifecycle.set_active(tx, 0.0, "t", TaskState.ACTIVE, "")
    assert states == [TaskState.ACTIVE, TaskState.PAUSED] * 2


def test_the_updates_of_an_abandoned_round_are_discarded_with_the_reason() -> None:
    server = Server(cohort=2, quorum=2)
    device = server.device(1)
    lease = server.work(device).lease
    assert isinstance(server.upload(device, lease), Receipt)
    with server.store.transaction() as tx:
        server.coordinator.lifecycle.advance(tx, 61.0)
        receipt = server.coordinator.receipt(tx, device, lease)
    assert isinstance(receipt, Receipt)
    assert receipt.state is UpdateState.DISCARDED
    assert "1 of at least 2 updates" in receipt.reason


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("far", ["at work", "too late", "uploaded"])
def test_a_device_that_leaves_frees_its_seat(far: str, erase: bool) -> None:
    server = Server(cohort=2, lease_s=10.0)
    first, second, third = (server.device(n) for n in (1, 2, 3))
    lease = server.work(first).lease
    server.work(second, now=15.0)
    if far == "uploaded":
        assert isinstance(server.upload(first, lease), Receipt)
    now = 20.0 if far == "too late" else 5.0
    assert isinstance(server.check_in(third, now), Wait)
    with server.store.transaction() as tx:
        server.coordinator.lifecycle.advance(tx, now)
        server.coordinator.leave(tx, first, erase=erase)
        assert tx.count_leases(1, MAIN, 1)[LeaseState.FAILED] == 1
    assert isinstance(server.check_in(third, now), Work)


def test_a_device_that_cannot_run_the_bundle_is_not_invited() -> None:
    server = Server(cohort=1)
    able, unable = server.device(1), server.device(2)
    with server.store.transaction() as tx:
        for device, runtimes in ((able, ("torch", "onnxruntime")), (unable, ("executorch",))):
            row = tx.device(device)
            assert row is not None
            tx.put_device(replace(row, examples=1, runtimes=runtimes))
        round_ = server.coordinator.lifecycle.ensure_round(tx, 0.0, server.task)
    assert round_ is not None
    assert round_.invited == (able,)


def test_a_version_names_its_parent_and_the_first_has_none() -> None:
    server = Server(cohort=1)
    device = server.device(1)
    server.upload(device, server.work(device).lease)
    server.fold()
    with server.store.reading() as tx:
        first, second = tx.versions(server.task.id)
    assert (first.parents, second.parents) == ((), (first.sha256,))


def test_a_device_with_too_few_examples_waits_and_is_told_why() -> None:
    server = Server()
    answer = server.check_in(server.device(1), examples=0)
    assert isinstance(answer, Wait)
    assert answer.reason == "the task needs 1 examples, you have 0"
