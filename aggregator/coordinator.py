"""The coordinator: what each request changes in the ledger, as short transactions over a Store.

It holds no state of its own. Every method takes an open transaction and the time, decides by `rules`, and
returns the protocol's answer or a typed Problem; a refusal changes nothing. So a crash between any two
transactions loses nothing, and any number of coordinators may share one store.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

from msgspec import Struct
from msgspec.structs import replace

from aggregator import rules
from aggregator.evaluating import Evaluations
from aggregator.grouping import group_on, hierarchical
from aggregator.lifecycle import Lifecycle
from aggregator.problems import (
    bad_token,
    busy,
    conflict,
    not_found,
    replayed,
    revoked,
    stale,
    unknown_device,
    unknown_lease,
)
from aggregator.promised import promised
from aggregator.update_check import Wanted
from fedtt.messages import (
    CheckIn,
    CheckInAnswer,
    Enroll,
    Enrolled,
    Plan,
    Problem,
    Receipt,
    Retired,
    Wait,
    Work,
    device_id,
)
from fedtt.task import TaskSpec
from fedtt.wire import UpdateHeader
from storage.records import (
    MAIN,
    Device,
    DeviceState,
    Lease,
    LeaseState,
    Participation,
    Round,
    RoundState,
    Task,
    TaskState,
    Update,
    UpdateState,
    VersionState,
    rank_branch,
)
from storage.store import Transaction

__all__ = ["NO_TASK", "Admission", "Coordinator", "Upload"]

NO_TASK = "no task is active"  #: why a device waits where there is none
IDLE_RETRY_S = 60.0  #: where no task is active
_FOLDING_RETRY_S = 1.0  #: at most
_INVITATIONS_KEPT = 16  #: rounds


class Admission(Struct, frozen=True, kw_only=True):
    """An update that may be taken if its content is what its lease's plan asks for."""

    task: Task
    lease: Lease
    wanted: Wanted


class Upload(Struct, frozen=True, kw_only=True):
    """An admitted update whose content is sound."""

    admission: Admission
    digest: str
    header: UpdateHeader
    payload: bytes


class Coordinator:
    """Answers devices; `lifecycle` moves rounds on. Stateless but for who was invited and what they train."""

    def __init__(self, lifecycle: Lifecycle, new_lease_id: Callable[[], str] | None = None) -> None:
        self.lifecycle = lifecycle
        self._invitations: dict[tuple[int, str, int, float], frozenset[str]] = {}
        self._plans: dict[
            tuple[int, str, int | None], Plan
        ] = {}  #: of a task, a branch and a rank: the newest
        self._new_lease_id = new_lease_id or (lambda: secrets.token_hex(16))
        self.evaluations = Evaluations(new_lease_id)

    # enrolment

    def enroll(
        self, tx: Transaction, now: float, message: Enroll, token_sha256: str, nonce: int | None = None
    ) -> Enrolled | Problem:
        """Take a key into the population; enrolling it again is harmless and costs no use of the token."""
        name = device_id(message.public_key)
        known = tx.device(name)
        if known and known.state is DeviceState.ACTIVE:
            return Enrolled(device=name)
        if known and known.revoked_at is not None:
            return revoked()
        if known and not _is_new(known, nonce):
            return replayed()
        token = tx.token(token_sha256)
        if token is None or token.uses_left == 0 or (token.expires_at or now) < now:
            return bad_token()
        if token.uses_left is not None:
            tx.put_token(replace(token, uses_left=token.uses_left - 1))
        tx.put_device(
            Device(
                id=name,
                public_key=message.public_key,
                client=message.client,
                runtimes=(),
                examples=0,
                enrolled_at=now,
                seen_at=now,
                state=DeviceState.ACTIVE,
                last_nonce=_newer(known, nonce),
            )
        )
        return Enrolled(device=name)

    def leave(
        self, tx: Transaction, device_name: str, *, erase: bool, nonce: int | None = None
    ) -> Problem | None:
        """Take a device out: its leases end, its updates that are not folded yet are discarded."""
        device = tx.device(device_name)
        if device is None:
            return unknown_device()
        if device.state is DeviceState.ERASED:
            return None
        if not _is_new(device, nonce):
            return replayed()
        device = replace(device, last_nonce=_newer(device, nonce))
        self._discard(tx, device_name, "its device was erased" if erase else "its device left")
        tx.put_device(_erased(device) if erase else replace(device, state=DeviceState.LEFT))
        if erase:
            tx.forget_settled(device_name)
            tx.forget_participations(device_name)
            tx.forget_evaluations(device_name)
        return None

    def revoke(self, tx: Transaction, now: float, device_name: str) -> Device | Problem:
        """Take a device out for good, on an operator's word: its key is never taken again."""
        device = tx.device(device_name)
        if device is None:
            return not_found(f"device {device_name[:32]}")
        if device.revoked_at is not None:
            return device
        self._discard(tx, device_name, "its device was revoked")
        state = DeviceState.LEFT if device.state is DeviceState.ACTIVE else device.state
        device = replace(device, state=state, revoked_at=now)
        tx.put_device(device)
        return device

    def _discard(self, tx: Transaction, device_name: str, reason: str) -> None:
        """What a device leaves unfinished: its leases end, its updates that no fold has claimed go."""
        discarded = self._not_claimed(tx, tx.updates_of(device_name, UpdateState.ACCEPTED))
        tx.settle(discarded, UpdateState.DISCARDED, reason=reason)
        self._free_seats(tx, device_name, discarded)

    @staticmethod
    def _free_seats(tx: Transaction, device_name: str, discarded: list[str]) -> None:
        """Of leases that will bring their rounds nothing any more."""
        unused = (LeaseState.ACTIVE, LeaseState.EXPIRED)
        leases = [lease for state in unused for lease in tx.leases_of(device_name, state)]
        leases += [promised(tx.lease(lease_id), "an update's lease") for lease_id in discarded]
        for lease in leases:
            tx.put_lease(replace(lease, state=LeaseState.FAILED))

    @staticmethod
    def _not_claimed(tx: Transaction, updates: list[Update]) -> list[str]:
        """Those no fold has claimed: the set being summed is fixed, so that a repeated sum is the same."""
        rounds = {(u.task_id, u.branch, u.round_number) for u in updates}
        claimed = {key for key in rounds if (r := tx.round(*key)) and r.state is RoundState.FOLDING}
        return [u.lease_id for u in updates if (u.task_id, u.branch, u.round_number) not in claimed]

    # work

    def check_in(
        self, tx: Transaction, now: float, device_name: str, message: CheckIn, nonce: int | None = None
    ) -> CheckInAnswer | Problem:
        """Offer work of the first task that has a seat, or whose newest version this device is to judge; the
        same lease again where one is still held.
        """
        device = _known(tx, device_name)
        if device is None:
            return unknown_device()
        if device.state is DeviceState.LEFT:
            return Retired(reason="this device has left; enrol again to take part")
        if not _is_new(device, nonce):
            return replayed()
        seen = replace(
            device,
            client=message.client,
            runtimes=message.runtimes,
            examples=message.examples,
            memory_mb=message.memory_mb,
            seen_at=now,
            last_nonce=_newer(device, nonce),
        )
        tx.put_device(seen)
        waits: list[Wait] = []
        for task in sorted(tx.tasks(), key=lambda task: -task.spec.priority):
            if task.state is TaskState.ACTIVE:
                if question := self.evaluations.offer(tx, now, seen, message, task):
                    return question
                answer = self._offer(tx, now, seen, task)
                if isinstance(answer, Work):
                    return answer
                waits.append(answer)
        if not waits:
            return self._idle(now, device_name, NO_TASK)
        return min(waits, key=lambda wait: wait.retry_after_s)

    def _offer(self, tx: Transaction, now: float, device: Device, task: Task) -> Work | Wait:
        spec = task.spec
        if self.lifecycle.manifest(tx, task).graphs.keys().isdisjoint(device.runtimes):
            return self._idle(now, device.id, "the task's bundle has no graph for your runtime")
        if device.examples < spec.min_examples:
            few = f"the task needs {spec.min_examples} examples, you have {device.examples}"
            return self._idle(now, device.id, few)
        if 0 < device.memory_mb < (needed := spec.budget.memory_mb or 0):
            little = f"the task may use {needed} MiB of memory, you have {device.memory_mb}"
            return self._idle(now, device.id, little)
        branch = self.lifecycle.branch_of(tx, task, device.id)
        round_ = self.lifecycle.ensure_round(tx, now, task, branch)
        if round_ is None:
            return self._wait_for_round(tx, task, branch, device)
        held = tx.lease_of(device.id, task.id, branch, round_.number)
        if held is not None and held.state is LeaseState.ACTIVE and now < held.expires_at:
            return self._work(tx, now, task, round_, held)
        if held is None and (why := self._sits_out(tx, device, task, round_)):
            return self._wait(spec, round_, device, why)
        if held is not None or not self._has_seat(tx, now, device, task, round_):
            return self._wait(spec, round_, device, "not needed in this round")
        return self._grant(tx, now, device, task, round_)

    def _wait_for_round(self, tx: Transaction, task: Task, branch: str, device: Device) -> Wait:
        group, last = group_on(task, branch), tx.latest_round(task.id, branch)
        if group is not None and group.waits and last is not None:
            return self._wait(task.spec, last, device, "its group waits for the others")
        if last is not None and self._is_judged(tx, task):
            return self._wait(task.spec, last, device, "the newest version is being judged")
        spec, number = task.spec, last.number if last is not None else 0
        soon_s = rules.retry_after_s(spec.rounds, spec.seed, number, device.id)
        return Wait(retry_after_s=min(_FOLDING_RETRY_S, soon_s), reason="the round is being folded")

    @staticmethod
    def _is_judged(tx: Transaction, task: Task) -> bool:
        """Whether the newest version waits for its verdict."""
        newest = tx.latest_version(task.id, MAIN) if task.spec.evaluation else None
        return newest is not None and newest.state is VersionState.CANDIDATE

    @staticmethod
    def _idle(now: float, device_name: str, reason: str) -> Wait:
        return Wait(retry_after_s=rules.idle_retry_s(IDLE_RETRY_S, now, device_name), reason=reason)

    @staticmethod
    def _wait(spec: TaskSpec, round_: Round, device: Device, reason: str) -> Wait:
        again_s = rules.retry_after_s(spec.rounds, spec.seed, round_.number, device.id)
        return Wait(retry_after_s=again_s, reason=reason)

    def _has_seat(self, tx: Transaction, now: float, device: Device, task: Task, round_: Round) -> bool:
        spec = self.lifecycle.seats(task, round_.branch)
        if rules.free_seats(spec, tx.count_leases(task.id, round_.branch, round_.number)) <= 0:
            return False
        return rules.seat_open_to_all(spec, round_, now) or device.id in self._invited(round_)

    def _invited(self, round_: Round) -> frozenset[str]:
        """The devices sampled for a round, which never change."""
        key = (round_.task_id, round_.branch, round_.number, round_.opened_at)
        if key not in self._invitations:
            while len(self._invitations) >= _INVITATIONS_KEPT:
                del self._invitations[next(iter(self._invitations))]
            self._invitations[key] = frozenset(round_.invited)
        return self._invitations[key]

    @staticmethod
    def _sits_out(tx: Transaction, device: Device, task: Task, round_: Round) -> str | None:
        """Why a device's earlier updates keep it out of a round, invited or not; None where they do not."""
        sampling = task.spec.sampling
        part = tx.participation(task.id, device.id) if sampling.is_limited else None
        return sampling.refusal(part.count, part.last_round, round_.number) if part else None

    @staticmethod
    def _end_older_leases(tx: Transaction, device: Device, task: Task) -> None:
        """A device whose part is limited holds one lease, so that no two updates of it are on the way."""
        for state in (LeaseState.ACTIVE, LeaseState.EXPIRED):
            for lease in tx.leases_of(device.id, state):
                if lease.task_id == task.id:
                    tx.put_lease(replace(lease, state=LeaseState.FAILED))

    def _grant(self, tx: Transaction, now: float, device: Device, task: Task, round_: Round) -> Work:
        lease = Lease(
            id=self._new_lease_id(),
            task_id=task.id,
            branch=round_.branch,
            round_number=round_.number,
            version_number=round_.version_number,
            device_id=device.id,
            granted_at=now,
            expires_at=now + task.spec.rounds.lease_lasts_s,
            state=LeaseState.ACTIVE,
            rank=task.spec.method.rank_for(device.memory_mb),
        )
        if task.spec.sampling.is_limited and task.spec.rounds.max_staleness:
            self._end_older_leases(tx, device, task)
        tx.put_lease(lease)
        if round_.deadline_at is None:
            round_ = replace(round_, deadline_at=now + task.spec.rounds.deadline_s)
            tx.put_round(round_)
        return self._work(tx, now, task, round_, lease)

    def _work(self, tx: Transaction, now: float, task: Task, round_: Round, lease: Lease) -> Work:
        ends_at = round_.deadline_at
        return Work(
            lease=lease.id,
            expires_in_s=max(0.0, lease.expires_at - now),
            plan=self._plan(tx, task, round_, lease),
            round_ends_in_s=None if ends_at is None else max(0.0, ends_at - now),
        )

    def _plan(self, tx: Transaction, task: Task, round_: Round, lease: Lease) -> Plan:
        """What a lease's round trains: the same for nearly all of its devices, so made once for them."""
        branch = lease.branch if lease.rank is None else rank_branch(lease.rank)
        version = promised(tx.version(task.id, branch, lease.version_number), "a lease's version")
        label_epsilon = _label_epsilon(tx, task, lease.device_id)
        place = (task.id, lease.branch, lease.rank)
        known = self._plans.get(place)
        if known is not None and (known.round, known.live, known.version, known.label_epsilon) == (
            round_.number,
            round_.live,
            version.sha256,
            label_epsilon,
        ):
            return known
        self._plans[place] = plan = Plan(
            task=task.spec.name,
            seed=task.spec.seed,
            bundle=task.bundle,
            version=version.sha256,
            version_number=version.number,
            round=round_.number,
            rank=lease.rank,
            live=round_.live,
            training=task.spec.training_in(round_.number),
            codec=task.spec.codec,
            method=task.spec.method,
            min_examples=task.spec.min_examples,
            label_epsilon=label_epsilon,
            budget=task.spec.budget,
            privacy=task.spec.privacy,
        )
        return plan

    # updates

    def admit(
        self, tx: Transaction, device_name: str, lease_id: str, digest: str
    ) -> Admission | Receipt | Problem:
        """Look at the digest first: the same bytes get their receipt whatever has happened since."""
        device, lease = _known(tx, device_name), tx.lease(lease_id)
        if device is None:
            return unknown_device()
        if lease is None or lease.device_id != device_name:
            return unknown_lease(lease_id)
        if known := tx.update(lease_id):
            return receipt_of(known) if known.digest == digest else conflict(lease_id)
        task = promised(tx.task_by_id(lease.task_id), "a lease's task")
        current = promised(tx.latest_round(lease.task_id, lease.branch), "a lease's round")
        granted = promised(tx.round(lease.task_id, lease.branch, lease.round_number), "a lease's round")
        if task.state in {TaskState.STOPPED, TaskState.FINISHED}:
            return stale(f"task {task.spec.name!r} is {task.state.value}")
        if device.state is DeviceState.LEFT:
            return stale("this device has left")
        if current.state is RoundState.FOLDING and task.spec.rounds.max_staleness:
            return busy("a round is being folded")
        if (
            current.state is RoundState.FOLDED
            and task.spec.rounds.max_staleness
            and self._is_judged(tx, task)
        ):
            return busy("the newest version is being judged")
        if why := rules.refusal(task.spec, granted, current, lease):
            return stale(why)
        labels = self.lifecycle.labels(tx, task)
        layout = self.lifecycle.adapter(tx, task, lease.rank).layout
        wanted = Wanted(layout, granted.live, task.spec.codec, labels)
        return Admission(task=task, lease=lease, wanted=wanted)

    def accept(self, tx: Transaction, now: float, upload: Upload) -> Receipt | Problem:
        """Append a checked update to the ledger. Admission is looked at again: time may have passed."""
        lease = upload.admission.lease
        again = self.admit(tx, lease.device_id, lease.id, upload.digest)
        if not isinstance(again, Admission):
            return again
        return self.append(tx, now, replace(upload, admission=again))

    def append(self, tx: Transaction, now: float, upload: Upload) -> Receipt:
        """Append an update that was admitted in this very transaction."""
        admission, header = upload.admission, upload.header
        lease = admission.lease
        current = promised(tx.latest_round(lease.task_id, lease.branch), "a lease's round")
        update = tx.add_update(
            Update(
                sequence=0,
                lease_id=lease.id,
                task_id=lease.task_id,
                branch=lease.branch,
                round_number=current.number,
                version_number=lease.version_number,
                device_id=lease.device_id,
                digest=upload.digest,
                received_at=now,
                examples=header.examples,
                loss_first=header.loss_first,
                loss_last=header.loss_last,
                payload=upload.payload,
                state=UpdateState.ACCEPTED,
                reason="",
                folded_into=None,
                rank=lease.rank,
            )
        )
        tx.put_lease(replace(lease, state=LeaseState.UPLOADED))
        known = tx.participation(lease.task_id, lease.device_id)
        tx.put_participation(
            Participation(
                task_id=lease.task_id,
                device_id=lease.device_id,
                count=1 + (known.count if known else 0),
                last_round=current.number,
                last_loss=header.loss_first,
                duration_s=max(0.0, now - lease.granted_at),
                work=self.lifecycle.work(tx, admission.task, admission.wanted.live),
                label_counts=header.label_counts or (known.label_counts if known else None),
            )
        )
        if current.deadline_at is None:
            tx.put_round(replace(current, deadline_at=now + admission.task.spec.rounds.deadline_s))
        return receipt_of(update)

    def accept_all(self, tx: Transaction, now: float, uploads: Sequence[Upload]) -> list[Receipt | Problem]:
        """Append many, each as `accept` does."""
        with tx.together([upload.admission.lease.id for upload in uploads]):
            return [self.accept(tx, now, upload) for upload in uploads]

    def receipt(self, tx: Transaction, device_name: str, lease_id: str) -> Receipt | Problem:
        """What has become of an acknowledged update."""
        update = tx.update(lease_id)
        if update is None or update.device_id != device_name:
            return unknown_lease(lease_id)
        return receipt_of(update)

    def fail(self, tx: Transaction, device_name: str, lease_id: str) -> Problem | None:
        """Take a lease back from a device that cannot fulfil it; its seat is free again."""
        lease = tx.lease(lease_id)
        if lease is None:
            return self.evaluations.fail(tx, device_name, lease_id)
        if lease.device_id != device_name:
            return unknown_lease(lease_id)
        if lease.state in {LeaseState.ACTIVE, LeaseState.EXPIRED}:
            tx.put_lease(replace(lease, state=LeaseState.FAILED))
        return None


def _is_new(device: Device, nonce: int | None) -> bool:
    """Whether a request is later than all that have changed this device; None needs no proof."""
    return nonce is None or nonce > device.last_nonce


def _newer(device: Device | None, nonce: int | None) -> int:
    return max(device.last_nonce if device else 0, nonce or 0)


def _known(tx: Transaction, device_name: str) -> Device | None:
    """None also where it was erased: nothing is left that could tell it from a stranger."""
    device = tx.device(device_name)
    return None if device is None or device.state is DeviceState.ERASED else device


def _label_epsilon(tx: Transaction, task: Task, device_id: str) -> float | None:
    """Of the label counts a device is asked for, as long as it has not told them."""
    method = hierarchical(task)
    if method is None or method.label_epsilon is None:
        return None
    part = tx.participation(task.id, device_id)
    return method.label_epsilon if part is None or part.label_counts is None else None


def _erased(device: Device) -> Device:
    """What stays of it: name, times and state."""
    return replace(
        device, state=DeviceState.ERASED, public_key=b"", client="", runtimes=(), examples=0, memory_mb=0
    )


def receipt_of(update: Update) -> Receipt:
    return Receipt(
        lease=update.lease_id,
        digest=update.digest,
        state=update.state,
        reason=update.reason,
        version_number=update.folded_into,
    )
