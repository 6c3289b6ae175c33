"""A state machine over the coordinator: devices, a server that crashes, and time, in any order.

Devices keep the error-feedback bookkeeping of the design with whole numbers in place of vectors: local
training yields a number, the wire carries multiples of 4, the rest is the residual. So exactness can be
asserted with ==: on every device what was trained under acknowledged leases equals what was sent under
them plus the committed residual.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aggregator.coordinator import Coordinator
from aggregator.lifecycle import Fold, Lifecycle
from aggregator.uploads import Admission, Upload
from fedtt.messages import (
    CheckIn,
    Code,
    Enroll,
    Enrolled,
    Problem,
    Receipt,
    Retired,
    UpdateState,
    Wait,
    Work,
)
from fedtt.sampling import Uniform
from fedtt.task import RoundSpec, TaskSpec
from fedtt.wire import UpdateHeader
from storage.records import MAIN, LeaseState, Round, RoundState, TaskState, Token
from storage.store import Store
from tests.support.tiny import add_task

__all__ = ["CoordinatorMachine"]

DEVICES = 6
MISHAPS = ["none", "none", "none", "answer lost", "stolen", "slow", "crash", "receipt lost", "late"]
HEADER = UpdateHeader(layout=b"\0" * 8, examples=1, steps=1, loss_first=1.0, loss_last=0.5)


class CrashError(Exception):
    """The server process dies inside a transaction."""


@dataclass
class ModelDevice:
    """One device's durable state, and what a perfect observer knows of it."""

    key: bytes
    id: str = ""
    erased: bool = False  #: at its owner's wish, and not enrolled again since
    lease: Work | None = None
    frame: bytes | None = None  #: stored before it is sent
    next_residual: int = 0
    residual: int = 0
    trained: int = 0  #: of the stored frame
    acknowledged_trained: int = 0
    acknowledged_sent: int = 0
    old_frames: dict[str, bytes] = field(default_factory=dict)


def _is(answer: object, code: Code) -> bool:
    """Whether it is a refusal of this kind."""
    return isinstance(answer, Problem) and answer.code is code


def digest_of(frame: bytes) -> str:
    return hashlib.sha256(frame).hexdigest()


class CoordinatorMachine(RuleBasedStateMachine):
    """Subclasses name the store."""

    make_store: Callable[[], Store]
    drop_store: Callable[[Store], None] = staticmethod(lambda store: store.close())

    @initialize(
        cohort=st.integers(1, 5),
        buffer=st.integers(1, 5),
        quorum=st.integers(1, 5),
        staleness=st.integers(0, 2),
        count=st.integers(1, 8),
        separation=st.sampled_from([0, 0, 1, 2]),
        cap=st.sampled_from([None, None, 1, 2]),
    )
    def start(
        self,
        cohort: int,
        buffer: int,
        quorum: int,
        staleness: int,
        count: int,
        separation: int,
        cap: int | None,
    ) -> None:
        self.now = 1000.0
        self.store = type(self).make_store()
        buffer = min(buffer, cohort)
        rounds = RoundSpec(
            count=count,
            cohort=cohort,
            buffer=buffer,
            quorum=min(quorum, buffer),
            deadline_s=60.0,
            lease_s=20.0,
            max_staleness=staleness,
            give_up_after=3,
        )
        sampling = Uniform(separation=separation, participation_cap=cap)
        self.spec = TaskSpec(name="machine", rounds=rounds, sampling=sampling)
        self.devices = [ModelDevice(key=bytes([i]) * 32) for i in range(DEVICES)]
        self.receipts: dict[str, Receipt] = {}
        self.lease_ids = 0
        with self.store.transaction() as tx:
            self.task = add_task(tx, self.spec, self.now)
            tx.put_token(Token(sha256=digest_of(b"secret"), uses_left=None, expires_at=None))
        self.restart()
        for i in range(DEVICES - 1):
            self.enroll(i, crash=False)

    @rule()
    def restart(self) -> None:
        """A new process over the same store: the coordinator keeps nothing in memory."""
        self.coordinator = Coordinator(Lifecycle(), self._next_lease_id)

    def _next_lease_id(self) -> str:
        self.lease_ids += 1
        return f"{self.lease_ids:032x}"

    def teardown(self) -> None:
        if hasattr(self, "store"):
            type(self).drop_store(self.store)

    def _transact(self, change: Callable[[Any], Any], *, crash: bool = False) -> Any:
        try:
            with self.store.transaction() as tx:
                answer = change(tx)
                if crash:
                    raise CrashError
        except CrashError:
            self.restart()
            return None
        return answer

    # devices

    @rule(i=st.integers(0, DEVICES - 1), crash=st.booleans())
    def enroll(self, i: int, crash: bool) -> None:
        device = self.devices[i]
        message = Enroll(public_key=device.key, token="secret", client="machine")
        answer = self._transact(
            lambda tx: self.coordinator.enroll(tx, self.now, message, digest_of(b"secret")), crash=crash
        )
        if answer is not None:
            assert isinstance(answer, Enrolled)
            device.id, device.erased = answer.device, False

    @rule(
        change=st.integers(-50, 50),
        mishaps=st.lists(st.sampled_from(MISHAPS), min_size=DEVICES, max_size=DEVICES),
        sleepers=st.integers(0, 2),
        wait_s=st.sampled_from([0.0, 16.0, 70.0]),
        between=st.sampled_from(["", "", "leave", "erase", "restart"]),
        fold=st.sampled_from(["once", "once", "twice", "crash", "later"]),
    )
    def go_round(
        self, change: int, mishaps: list[str], sleepers: int, wait_s: float, between: str, fold: str
    ) -> None:
        """A whole round with what can go wrong in it; a walk of single steps would seldom reach a fold."""
        self.pause_or_resume(TaskState.ACTIVE)
        for i, mishap in enumerate(mishaps):
            self.check_in(i, crash=False, lost=mishap == "answer lost")
            if mishap == "stolen":
                self.send_under_anothers_lease((i + 1) % DEVICES, i)
            self.train(i, change + i)
            if mishap != "slow" and i >= sleepers:
                self.upload(i, crash=mishap == "crash", lost=mishap == "receipt lost", late=mishap == "late")
        self.let_time_pass(wait_s)
        self.advance(crash=False)
        if between in {"leave", "erase"}:
            self.leave(0, erase=between == "erase")
        elif between == "restart":
            self.restart()
        if fold != "later":
            self.fold(crash=fold == "crash", twice=fold == "twice")

    @rule(i=st.integers(0, DEVICES - 1), crash=st.booleans(), lost=st.booleans())
    def check_in(self, i: int, crash: bool, lost: bool) -> None:
        device = self.devices[i]
        if not device.id or device.lease is not None:
            return
        message = CheckIn(client="machine", runtimes=("onnxruntime",), examples=3)
        answer = self._transact(
            lambda tx: self.coordinator.check_in(tx, self.now, device.id, message), crash=crash
        )
        if isinstance(answer, Work) and not lost:
            device.lease = answer
        elif answer is not None and not isinstance(answer, Work):
            assert _is(answer, Code.UNKNOWN_DEVICE) if device.erased else isinstance(answer, Wait | Retired)

    @rule(i=st.integers(0, DEVICES - 1), change=st.integers(-50, 50))
    def train(self, i: int, change: int) -> None:
        device = self.devices[i]
        if device.lease is None or device.frame is not None:
            return
        target = change + device.residual
        sent = 4 * round(target / 4)
        device.trained, device.next_residual = change, target - sent
        device.frame = f"{device.lease.lease} {sent}".encode()

    @rule(i=st.integers(0, DEVICES - 1), crash=st.booleans(), lost=st.booleans(), late=st.booleans())
    def upload(self, i: int, crash: bool, lost: bool, late: bool) -> None:
        """Send the stored frame; the server may die, the answer may be lost, a fold may come between."""
        device = self.devices[i]
        if device.lease is None or device.frame is None:
            return
        answer = self._send(device, device.lease.lease, device.frame, crash=crash, late=late)
        if answer is None or lost:
            if isinstance(answer, Receipt):
                self.receipts.setdefault(answer.lease, answer)
            return  # the outcome is unknown: the device keeps frame and both residuals
        if isinstance(answer, Receipt):
            self._commit(device, answer)
        elif answer.code is not Code.BUSY:
            self._drop(device)

    def _send(
        self, device: ModelDevice, lease: str, frame: bytes, *, crash: bool, late: bool
    ) -> Receipt | Problem | None:
        digest = digest_of(frame)
        with self.store.reading() as tx:
            admission = self.coordinator.admit(tx, device.id, lease, digest)
        if late:
            self.advance(crash=False)
            self.fold(crash=False, twice=False)
        if not isinstance(admission, Admission):
            return admission
        upload = Upload(admission=admission, digest=digest, header=HEADER, payload=frame)
        answer: Receipt | Problem | None = self._transact(
            lambda tx: self.coordinator.accept(tx, self.now, upload), crash=crash
        )
        return answer

    def _commit(self, device: ModelDevice, receipt: Receipt) -> None:
        assert device.frame is not None
        assert receipt.digest == digest_of(device.frame)
        self.receipts.setdefault(receipt.lease, receipt)
        device.acknowledged_trained += device.trained
        device.acknowledged_sent += int(device.frame.split()[1])
        device.residual = device.next_residual
        device.old_frames[receipt.lease] = device.frame
        self._drop(device)

    @staticmethod
    def _drop(device: ModelDevice) -> None:
        device.lease = device.frame = None

    @rule(i=st.integers(0, DEVICES - 1), data=st.data())
    def send_an_acknowledged_frame_again(self, i: int, data: st.DataObject) -> None:
        device = self.devices[i]
        if not device.old_frames:
            return
        lease = data.draw(st.sampled_from(sorted(device.old_frames)))
        answer = self._send(device, lease, device.old_frames[lease], crash=False, late=False)
        assert _is(answer, Code.UNKNOWN_DEVICE) if device.erased else isinstance(answer, Receipt)

    @rule(i=st.integers(0, DEVICES - 1), data=st.data())
    def send_other_bytes_under_an_acknowledged_lease(self, i: int, data: st.DataObject) -> None:
        device = self.devices[i]
        if not device.old_frames:
            return
        lease = data.draw(st.sampled_from(sorted(device.old_frames)))
        answer = self._send(device, lease, b"other 0", crash=False, late=False)
        assert _is(answer, Code.UNKNOWN_DEVICE if device.erased else Code.CONFLICT)

    @rule(i=st.integers(0, DEVICES - 1), j=st.integers(0, DEVICES - 1))
    def send_under_anothers_lease(self, i: int, j: int) -> None:
        thief, owner = self.devices[i], self.devices[j]
        if i == j or not thief.id or owner.lease is None:
            return
        answer = self._send(thief, owner.lease.lease, b"stolen 0", crash=False, late=False)
        assert _is(answer, Code.UNKNOWN_DEVICE if thief.erased else Code.UNKNOWN_LEASE)

    @rule(i=st.integers(0, DEVICES - 1), crash=st.booleans())
    def give_the_lease_back(self, i: int, crash: bool) -> None:
        device = self.devices[i]
        if device.lease is None:
            return
        lease = device.lease.lease
        self._transact(lambda tx: self.coordinator.fail(tx, device.id, lease), crash=crash)
        if not crash:
            self._drop(device)

    @rule(i=st.integers(0, DEVICES - 1), erase=st.booleans())
    def leave(self, i: int, erase: bool) -> None:
        device = self.devices[i]
        if device.id:
            self._transact(lambda tx: self.coordinator.leave(tx, device.id, erase=erase))
            device.erased |= erase

    # time and the server's own work

    @rule(seconds=st.sampled_from([0.5, 10.0, 25.0, 70.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.now += seconds

    @rule(crash=st.booleans())
    def advance(self, crash: bool) -> None:
        self._transact(lambda tx: self.coordinator.lifecycle.advance(tx, self.now), crash=crash)

    @rule(crash=st.booleans(), twice=st.booleans())
    def fold(self, crash: bool, twice: bool) -> None:
        """Sum what is claimed and publish it; repeated after a crash, and by a second server."""
        with self.store.reading() as tx:
            round_ = tx.latest_round(self.task.id, MAIN)
            if round_ is None or round_.state is not RoundState.FOLDING:
                return
            fold = self._sum(tx, round_)
        for attempt in range(1 + twice):
            version = self._transact(
                lambda tx: self.coordinator.lifecycle.publish(tx, self.now, fold), crash=crash
            )
            assert (version is not None) == (attempt == 0 and not crash)

    def _sum(self, tx: Any, round_: Round) -> Fold:
        updates = list(tx.updates(self.task.id, MAIN, round_.number, UpdateState.ACCEPTED))
        total = sum(int(update.payload.split()[1]) for update in updates)
        return Fold(
            task_id=self.task.id,
            round_number=round_.number,
            sha256=hashlib.sha256(f"{round_.version_number} {total}".encode()).hexdigest(),
            updates=tuple(update.lease_id for update in updates),
            examples=len(updates),
            loss_first=1.0,
            loss_last=0.5,
            variants={},
            server_state=hashlib.sha256(b"state").hexdigest(),
            report={},
        )

    @rule(state=st.sampled_from([TaskState.ACTIVE, TaskState.ACTIVE, TaskState.PAUSED]))
    def pause_or_resume(self, state: TaskState) -> None:
        lifecycle = self.coordinator.lifecycle
        self._transact(lambda tx: lifecycle.set_active(tx, self.now, self.name, state, "operator"))

    @precondition(lambda self: self.now > 1400)
    @rule()
    def stop(self) -> None:
        self._transact(lambda tx: self.coordinator.lifecycle.stop(tx, self.now, self.name, "operator"))

    @property
    def name(self) -> str:
        return self.spec.name

    # what must hold at all times

    @invariant()
    def the_ledger_adds_up(self) -> None:
        if not hasattr(self, "store"):
            return
        with self.store.reading() as tx:
            self._check_receipts(tx)
            self._check_versions(tx)
            self._check_rounds(tx)
            for device in self.devices:
                self._check_part(tx, device.id)
        for device in self.devices:
            assert device.acknowledged_trained == device.acknowledged_sent + device.residual

    def _check_receipts(self, tx: Any) -> None:
        """No acknowledged update is lost or changed; a terminal state is final."""
        for lease, receipt in self.receipts.items():
            update = tx.update(lease)
            assert update is not None
            assert update.digest == receipt.digest
            assert (update.payload == b"") == (update.state is not UpdateState.ACCEPTED)
            assert (update.folded_into is not None) == (update.state is UpdateState.FOLDED)
            if receipt.state is not UpdateState.ACCEPTED:
                assert (update.state, update.folded_into) == (receipt.state, receipt.version_number)
            self.receipts[lease] = Receipt(
                lease=lease,
                digest=update.digest,
                state=update.state,
                reason=update.reason,
                version_number=update.folded_into,
            )

    def _check_versions(self, tx: Any) -> None:
        """Versions have no gaps, and each is made of exactly the updates that say so."""
        versions = tx.versions(self.task.id)
        assert [v.number for v in versions] == list(range(len(versions)))
        folded = [r.version_number for r in self.receipts.values() if r.state is UpdateState.FOLDED]
        for version in versions:
            # receipts whose answer was lost on the way are in `receipts` too, so the counts are equal
            assert folded.count(version.number) == version.updates
            assert version.number == 0 or version.updates >= self.spec.rounds.quorum
        for lease, receipt in self.receipts.items():
            if receipt.version_number is not None:
                base = tx.lease(lease).version_number
                assert 0 <= receipt.version_number - 1 - base <= self.spec.rounds.max_staleness

    def _check_rounds(self, tx: Any) -> None:
        """Seats are never oversold, and at most one round is not closed."""
        rounds = tx.rounds(self.task.id)
        for round_ in rounds:
            leases = tx.count_leases(self.task.id, MAIN, round_.number)
            seated = sum(n for state, n in leases.items() if state is not LeaseState.FAILED)
            assert seated <= self.spec.rounds.cohort
            accepted = tx.count_updates(self.task.id, MAIN, round_.number, UpdateState.ACCEPTED)
            if round_.state in {RoundState.FOLDED, RoundState.ABANDONED}:
                assert accepted == 0
        assert all(r.state in {RoundState.FOLDED, RoundState.ABANDONED} for r in rounds[1:])

    def _check_part(self, tx: Any, device: str) -> None:
        """No device takes part oftener or sooner again than it may; what sampling goes by is the ledger's."""
        updates = [u for state in UpdateState for u in tx.updates_of(device, state)]
        rounds = sorted(update.round_number for update in updates)
        sampling = self.spec.sampling
        assert sampling.participation_cap is None or len(rounds) <= sampling.participation_cap
        assert all(b - a >= sampling.separation for a, b in itertools.pairwise(rounds))
        part = tx.participation(self.task.id, device)
        assert (part.count, part.last_round) == (len(rounds), rounds[-1]) if rounds else part is None
