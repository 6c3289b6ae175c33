"""What must hold at all times: the set algebra of the ledger."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis.stateful import invariant

from fedtt.messages import (
    Receipt,
    UpdateState,
)
from storage.records import MAIN, LeaseState, RoundState, TaskState, VersionState
from tests.property.machine_state import (
    MachineState,
)

__all__ = ["AuditedMachine"]


class AuditedMachine(MachineState):
    """The invariants."""

    @invariant()
    def the_ledger_adds_up(self) -> None:
        if not hasattr(self, "store"):
            return
        with self.store.reading() as tx:
            self._check_receipts(tx)
            self._check_versions(tx)
            self._check_rounds(tx)
            self._check_task(tx.task(self.name))
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
            if update.state is UpdateState.ACCEPTED:
                assert tx.payloads([update])[0]
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
            assert version.round_number is None or version.updates >= self.spec.rounds.quorum
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
            assert tx.version(self.task.id, MAIN, round_.version_number).state is VersionState.RELEASED
        assert all(r.state in {RoundState.FOLDED, RoundState.ABANDONED} for r in rounds[1:])

    def _check_task(self, task: Any) -> None:
        """A task that has ended stays so, and one that its operator paused waits for the operator."""
        assert not self.ended or task.state in {TaskState.STOPPED, TaskState.FINISHED}
        assert not self.paused or task.state is not TaskState.ACTIVE
        self.ended = task.state in {TaskState.STOPPED, TaskState.FINISHED}

    def _check_part(self, tx: Any, device: str) -> None:
        """No device takes part oftener or sooner again than it may; what sampling goes by is the ledger's."""
        updates = [u for state in UpdateState for u in tx.updates_of(device, state)]
        rounds = sorted(update.round_number for update in updates)
        sampling = self.spec.sampling
        assert sampling.participation_cap is None or len(rounds) <= sampling.participation_cap
        assert all(b - a >= sampling.separation for a, b in itertools.pairwise(rounds))
        part = tx.participation(self.task.id, device)
        assert (part.count, part.last_round) == (len(rounds), rounds[-1]) if rounds else part is None
