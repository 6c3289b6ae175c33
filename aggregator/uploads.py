"""Updates on their way into the ledger: admitted by their lease, appended once their content is sound."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import replace

from aggregator import rules
from aggregator.evaluating import is_judged
from aggregator.lifecycle import Lifecycle
from aggregator.population import known_device
from aggregator.problems import busy, conflict, stale, unknown_device, unknown_lease
from aggregator.promised import promised
from aggregator.update_check import Wanted
from fedtt.messages import Problem, Receipt
from fedtt.wire import UpdateHeader
from storage.records import (
    DeviceState,
    Lease,
    LeaseState,
    Participation,
    RoundState,
    Task,
    TaskState,
    Update,
    UpdateState,
)
from storage.store import Transaction

__all__ = ["Admission", "Upload", "Uploads"]


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


class Uploads:
    """The coordinator's calls about updates; stateless but for what `lifecycle` keeps."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self.lifecycle = lifecycle

    def admit(
        self, tx: Transaction, device_name: str, lease_id: str, digest: str
    ) -> Admission | Receipt | Problem:
        """Look at the digest first: the same bytes get their receipt whatever has happened since."""
        device, lease = known_device(tx, device_name), tx.lease(lease_id)
        if device is None:
            return unknown_device()
        if lease is None or lease.device_id != device_name:
            return unknown_lease(lease_id)
        if known := tx.update(lease_id):
            return _receipt_of(known) if known.digest == digest else conflict(lease_id)
        task = promised(tx.task_by_id(lease.task_id), "a lease's task")
        current = promised(tx.latest_round(lease.task_id, lease.branch), "a lease's round")
        granted = promised(tx.round(lease.task_id, lease.branch, lease.round_number), "a lease's round")
        if task.state in {TaskState.STOPPED, TaskState.FINISHED}:
            return stale(f"task {task.spec.name!r} is {task.state.value}")
        if device.state is DeviceState.LEFT:
            return stale("this device has left")
        if current.state is RoundState.FOLDING and task.spec.rounds.max_staleness:
            return busy("a round is being folded")
        if current.state is RoundState.FOLDED and task.spec.rounds.max_staleness and is_judged(tx, task):
            return busy("the newest version is being judged")
        if why := rules.refusal(task.spec, granted, current, lease):
            return stale(why)
        labels, estimate = self.lifecycle.labels(tx, task), self.lifecycle.estimate(tx, task, granted)
        layout = self.lifecycle.adapter(tx, task, lease.rank).layout
        wanted = Wanted(layout, granted.live, task.spec.codec, labels, estimate)
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
                state=UpdateState.ACCEPTED,
                reason="",
                folded_into=None,
                rank=lease.rank,
            ),
            upload.payload,
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
            tx.put_round(rules.with_deadline(admission.task.spec.rounds, current, now))
        return _receipt_of(update)

    def accept_all(self, tx: Transaction, now: float, uploads: Sequence[Upload]) -> list[Receipt | Problem]:
        """Append many, each as `accept` does."""
        with tx.together([upload.admission.lease.id for upload in uploads]):
            return [self.accept(tx, now, upload) for upload in uploads]

    def receipt(self, tx: Transaction, device_name: str, lease_id: str) -> Receipt | Problem:
        """What has become of an acknowledged update."""
        update = tx.update(lease_id)
        if update is None or update.device_id != device_name:
            return unknown_lease(lease_id)
        return _receipt_of(update)


def _receipt_of(update: Update) -> Receipt:
    return Receipt(
        lease=update.lease_id,
        digest=update.digest,
        state=update.state,
        reason=update.reason,
        version_number=update.folded_into,
    )
