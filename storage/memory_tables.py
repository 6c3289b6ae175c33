"""What the in-memory store holds: rows by their keys, and what is asked of them often."""

from __future__ import annotations

from heapq import heapify

from storage.records import (
    AdminToken,
    Audit,
    Bundle,
    Device,
    Evaluation,
    Lease,
    LeaseState,
    Participation,
    Round,
    Task,
    Token,
    Update,
    UpdateState,
    Version,
)

__all__ = ["BranchKey", "RoundKey", "Tables", "round_key"]

RoundKey = tuple[int, str, int]
BranchKey = tuple[int, str]


class Tables:
    """Rows by their keys, and what is asked of them often counted as they change."""

    def __init__(self) -> None:
        self.tokens: dict[str, Token] = {}
        self.devices: dict[str, Device] = {}
        self.admin_tokens: dict[str, AdminToken] = {}
        self.audit: dict[int, Audit] = {}  #: by sequence, in order
        self.participations: dict[str, dict[int, Participation]] = {}  #: device -> task -> its part in it
        self.groups: dict[str, dict[int, int]] = {}  #: device -> task -> its group
        self.bundles: dict[str, Bundle] = {}
        self.tasks: dict[int, Task] = {}
        self.versions: dict[RoundKey, Version] = {}
        self.version_names: dict[str, None] = {}
        self.latest_versions: dict[BranchKey, Version] = {}
        self.evaluations: dict[str, Evaluation] = {}
        self.evaluations_of: dict[RoundKey, dict[str, str]] = {}  #: version -> device -> lease
        self.rounds: dict[RoundKey, Round] = {}
        self.latest_rounds: dict[BranchKey, Round] = {}
        self.leases: dict[str, Lease] = {}
        self.leases_in: dict[RoundKey, dict[str, str]] = {}  #: round -> device -> its newest lease
        self.leases_by: dict[str, dict[str, None]] = {}  #: device -> its leases, in order
        self.lease_counts: dict[RoundKey, dict[LeaseState, int]] = {}
        self.expiries: list[tuple[float, str]] = []  #: heap; an entry may be out of date
        self.updates: dict[str, Update] = {}
        self.payloads: dict[str, bytes] = {}  #: by lease, of updates that are accepted
        self.updates_in: dict[RoundKey, dict[str, None]] = {}  #: round -> lease ids, in ledger order
        self.update_counts: dict[RoundKey, dict[UpdateState, int]] = {}
        self.sequence: dict[str, int] = {}  #: of the newest update
        self.oldest_kept: dict[BranchKey, int] = {}  #: the first round whose leases and updates are there

    def forget_rounds(self, keep: int) -> None:
        for branch, newest in self.latest_rounds.items():
            first = self.oldest_kept.get(branch, 1)
            for number in range(first, newest.number - keep):
                self._forget_round((*branch, number))
            self.oldest_kept[branch] = max(first, newest.number - keep)

    def _forget_round(self, key: RoundKey) -> None:
        for name in self.updates_in.pop(key, ()):
            del self.updates[name]
            self.payloads.pop(name, None)
        for device, newest in self.leases_in.pop(key, {}).items():
            mine = self.leases_by[device]
            for name in [name for name in mine if name == newest or round_key(self.leases[name]) == key]:
                del mine[name], self.leases[name]
            if not mine:
                del self.leases_by[device]
        self.lease_counts.pop(key, None)
        self.update_counts.pop(key, None)
        self.expiries = [entry for entry in self.expiries if self._may_expire(entry[1])]
        heapify(self.expiries)

    def _may_expire(self, name: str) -> bool:
        lease = self.leases.get(name)
        return lease is not None and lease.state is LeaseState.ACTIVE


def round_key(row: Lease | Update) -> RoundKey:
    return (row.task_id, row.branch, row.round_number)
