"""What durable state offers: the Store protocol that SQL and the in-memory twin both keep.

A transaction is serialisable against all others and durable when its block has ended without an error;
after an error nothing of it remains. Calls are short and synchronous: the aggregator runs them on one
writer thread and groups many requests into one commit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from fedtt.sampling import Candidate
from storage.records import (
    AdminToken,
    Audit,
    Bundle,
    Device,
    DeviceState,
    Evaluation,
    Lease,
    LeaseState,
    Participation,
    Round,
    RoundState,
    Task,
    Token,
    Update,
    UpdateState,
    Version,
)

__all__ = ["Store", "Transaction"]


class Transaction(Protocol):
    """Reads and writes that happen together or not at all. `put_` inserts or replaces by key."""

    @property
    def moved(self) -> Mapping[UpdateState, int]:
        """How many updates it has brought into each state; those into which it has brought none may lack."""
        ...

    def together(
        self, leases: Collection[str], devices: Collection[str] = ()
    ) -> AbstractContextManager[None]:
        """A block in which many like things happen to these leases and devices; it changes no answer.

        What they need is read at its beginning, all at once, and what is written may wait for its end.
        """
        ...

    # enrolment
    def put_token(self, token: Token) -> None: ...
    def token(self, sha256: str) -> Token | None: ...
    def put_device(self, device: Device) -> None: ...
    def device(self, device_id: str) -> Device | None: ...
    def devices(self, *, after: str = "", limit: int = 1000) -> list[Device]:
        """In order of their ids, starting behind `after`."""
        ...

    def active_devices(
        self,
        *,
        seen_since: float,
        min_examples: int,
        runtimes: Collection[str],
        memory_mb: int = 0,
        member_of: tuple[int, int] | None = None,
    ) -> list[str]:
        """Ids, sorted, of active devices seen since then, with examples enough and one of the runtimes.

        memory_mb: that training needs; a device that said it has less is left out.

        member_of: (task, group) whose devices alone are meant.
        """
        ...

    def candidates(
        self,
        task_id: int,
        *,
        seen_since: float,
        min_examples: int,
        runtimes: Collection[str],
        memory_mb: int = 0,
        group: int | None = None,
    ) -> list[Candidate]:
        """The same devices with what their updates to a task have shown, in order of their ids.

        group: of the task, whose devices alone are meant.
        """
        ...

    def count_devices(self, *, seen_since: float = 0.0) -> dict[DeviceState, int]:
        """How many devices seen since then are in each state; states without any may be missing."""
        ...

    # people
    def put_admin_token(self, token: AdminToken) -> None: ...
    def admin_token(self, sha256: str) -> AdminToken | None: ...
    def admin_tokens(self) -> list[AdminToken]:
        """In order of their names, which are unique."""
        ...

    def add_audit(self, entry: Audit) -> None:
        """Append; its sequence must be new (StorageError), and no entry is ever changed."""
        ...

    def last_audit(self) -> Audit | None: ...
    def audits(self, *, after: int = 0, limit: int = 1000) -> list[Audit]:
        """In order of their sequence, starting behind `after`."""
        ...

    # participation
    def put_participation(self, participation: Participation) -> None: ...
    def participation(self, task_id: int, device_id: str) -> Participation | None: ...
    def forget_participations(self, device_id: str) -> int:
        """Drop what was measured of a device in every task, and its groups; how often and when it took part
        stays. Returns in how many tasks it did.
        """
        ...

    def participants(self, task_id: int) -> list[Participation]:
        """Of the devices that are active, in order of their ids."""
        ...

    # groups
    def put_members(self, task_id: int, groups: Mapping[str, int]) -> None:
        """Put devices into groups of a task, each into one: device -> number."""
        ...

    def group_of(self, task_id: int, device_id: str) -> int | None: ...
    def members(self, task_id: int, *, seen_since: float = 0.0) -> dict[str, int]:
        """The group of each active device seen since then that is in one, in order of their ids."""
        ...

    # bundles and tasks
    def put_bundle(self, bundle: Bundle) -> None: ...
    def bundle(self, sha256: str) -> Bundle | None: ...
    def add_task(self, task: Task) -> Task:
        """Insert a task, giving it the next id; its spec's name must be new (StorageError)."""
        ...

    def put_task(self, task: Task) -> None: ...
    def task(self, name: str) -> Task | None: ...
    def task_by_id(self, task_id: int) -> Task | None: ...
    def tasks(self) -> list[Task]:
        """In order of creation."""
        ...

    # versions and rounds
    def add_version(self, version: Version) -> None:
        """Insert; (task, branch, number) must be new: the fence against two folds (StorageError)."""
        ...

    def put_version(self, version: Version) -> None:
        """Replace one that is there: its state and its report alone ever change."""
        ...

    def latest_version(self, task_id: int, branch: str) -> Version | None: ...
    def version(self, task_id: int, branch: str, number: int) -> Version | None: ...
    def versions(self, task_id: int) -> list[Version]:
        """In order of branch and number."""
        ...

    def has_version(self, sha256: str) -> bool: ...
    def put_round(self, round_: Round) -> None: ...
    def latest_round(self, task_id: int, branch: str) -> Round | None: ...
    def round(self, task_id: int, branch: str, number: int) -> Round | None: ...
    def rounds(self, task_id: int, *, limit: int = 1000) -> list[Round]:
        """The newest `limit` rounds of all branches: the highest numbers first, then the last branches."""
        ...

    def count_rounds(self, task_id: int) -> dict[RoundState, int]:
        """How many rounds of a task are in each state, on all branches; without any it may be missing."""
        ...

    # verdicts
    def put_evaluation(self, evaluation: Evaluation) -> None: ...
    def evaluation(self, lease_id: str) -> Evaluation | None: ...
    def evaluations(self, task_id: int, branch: str, version_number: int) -> list[Evaluation]:
        """Of one version, in order of their devices' ids."""
        ...

    def forget_evaluations(self, device_id: str) -> None:
        """Drop what a device has found of any version; that it was asked stays."""
        ...

    # leases
    def put_lease(self, lease: Lease) -> None:
        """Insert, or move one that is there to another state: nothing else of a lease ever changes."""
        ...

    def lease(self, lease_id: str) -> Lease | None: ...
    def lease_of(self, device_id: str, task_id: int, branch: str, round_number: int) -> Lease | None:
        """The newest lease this device was given in a round."""
        ...

    def leases_of(self, device_id: str, state: LeaseState) -> list[Lease]:
        """All leases of one device in one state, in the order they were given."""
        ...

    def count_leases(self, task_id: int, branch: str, round_number: int) -> dict[LeaseState, int]:
        """How many leases of a round are in each state; states without any may be missing."""
        ...

    def expire_leases(self, now: float) -> int:
        """Mark active leases whose time is over; returns how many."""
        ...

    # the ledger
    def add_update(self, update: Update, payload: bytes) -> Update:
        """Append to the ledger, giving it the next sequence; the lease must be new (StorageError).

        payload: the coded delta, at least one byte (StorageError); there until the update is settled.
        """
        ...

    def update(self, lease_id: str) -> Update | None: ...
    def count_updates(self, task_id: int, branch: str, round_number: int, state: UpdateState) -> int: ...
    def updates(self, task_id: int, branch: str, round_number: int, state: UpdateState) -> Iterator[Update]:
        """Of one round, in ledger order, without holding them all in memory."""
        ...

    def payloads(self, updates: Sequence[Update]) -> list[bytes]:
        """What a few accepted updates hold, in their order; raises StorageError where one holds nothing.

        Of one that is settled it may be there until it is wiped.
        """
        ...

    def updates_of(self, device_id: str, state: UpdateState) -> list[Update]:
        """All updates of one device in one state."""
        ...

    def settle(
        self,
        updates: Iterable[str],
        state: UpdateState,
        *,
        reason: str = "",
        folded_into: int | None = None,
    ) -> int:
        """Move accepted updates, named by lease, into a terminal state; then their payloads may be wiped.

        Rows that are not accepted are left alone. Those of erased devices lose examples and losses too, for
        a fold that had claimed them needs them until now. Returns how many moved.
        """
        ...

    def forget_settled(self, device_id: str) -> int:
        """Zero examples and losses of a device's updates in a terminal state; returns how many it has."""
        ...


class Store(Protocol):
    """Where a server keeps what must survive it."""

    @property
    def is_shared(self) -> bool:
        """Whether other servers may use it at the same time."""
        ...

    def transaction(self) -> AbstractContextManager[Transaction]:
        """Read and write; commits when the block ends, rolls back when it raises."""
        ...

    def reading(self) -> AbstractContextManager[Transaction]:
        """Read one consistent state; writing is an error."""
        ...

    def wipe(self) -> bool:
        """Delete payloads of a few settled updates, in a transaction of its own; False once none is left.

        Cheap where nothing was settled since then.
        """
        ...

    def maintain(self) -> bool:
        """Wipe what was deleted or forgotten from the logs too, outside any transaction.

        Cheap where nothing was since it last returned True. Returns False where a reader was in the way, or
        there is more to `wipe`: call again later.
        """
        ...

    def close(self) -> None: ...
