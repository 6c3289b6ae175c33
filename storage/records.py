"""The rows of the store as immutable values, and the states they pass through."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from fedtt.messages import UpdateState, Verdict
from fedtt.task import TaskSpec

__all__ = [
    "MAIN",
    "AdminToken",
    "Audit",
    "Bundle",
    "Device",
    "DeviceState",
    "Evaluation",
    "EvaluationState",
    "Group",
    "Lease",
    "LeaseState",
    "Participation",
    "Payload",
    "Role",
    "Round",
    "RoundState",
    "Task",
    "TaskState",
    "Token",
    "Update",
    "UpdateState",
    "Version",
    "VersionState",
    "group_branch",
    "rank_branch",
]

MAIN = "main"  #: the branch every task has


def group_branch(number: int) -> str:
    """The branch on which a group of devices goes on by itself between two versions of `MAIN`."""
    return f"group-{number}"


def rank_branch(rank: int) -> str:
    """The branch of a task's versions at another rank; numbers are those of `MAIN`."""
    return f"rank-{rank}"


class DeviceState(StrEnum):
    ACTIVE = "active"  #: enrolled and welcome
    LEFT = "left"  #: its owner took it out; it may enrol again
    ERASED = "erased"  #: key, client and all counts and losses are gone; name, times and receipts stay


class TaskState(StrEnum):
    ACTIVE = "active"  #: rounds are open and leases are given
    PAUSED = "paused"  #: no new leases; updates under old ones are still taken
    STOPPED = "stopped"  #: ended by an operator
    FINISHED = "finished"  #: all rounds are folded


class VersionState(StrEnum):
    CANDIDATE = "candidate"  #: published, not yet judged
    RELEASED = "released"  #: devices train from it
    HELD = "held"  #: judged worse than allowed; nothing folds onto it


class RoundState(StrEnum):
    OPEN = "open"  #: leases are given and updates taken
    FOLDING = "folding"  #: its accepted updates are fixed and being summed
    FOLDED = "folded"  #: its updates are part of a version
    ABANDONED = "abandoned"  #: too few updates by the deadline, or the task ended


class LeaseState(StrEnum):
    ACTIVE = "active"  #: the device is at work
    UPLOADED = "uploaded"  #: an update was acknowledged under it
    FAILED = "failed"  #: the device gave it back, asked for another where it may hold one, or left
    EXPIRED = "expired"  #: its time is over; an update is still taken while its round is open


class EvaluationState(StrEnum):
    ACTIVE = "active"  #: the device was asked; past its expiry it is asked no more
    DONE = "done"  #: it has sent its verdict
    FAILED = "failed"  #: it gave the question back


class Token(Struct, frozen=True, kw_only=True):
    """An enrolment token, known by its hash alone."""

    sha256: str
    uses_left: int | None  #: None for any number
    expires_at: float | None


class Device(Struct, frozen=True, kw_only=True):
    """One member of the population."""

    id: str  #: 128 bits of sha256 over its public key
    public_key: bytes  #: Ed25519, 32 bytes; empty once erased
    client: str  #: program and version, as last reported
    runtimes: tuple[str, ...]
    examples: int
    enrolled_at: float
    seen_at: float
    state: DeviceState
    memory_mb: int = 0  #: it may use, as last reported; 0 where it did not say
    last_nonce: int = 0  #: of the signature of the last request that changed this row
    revoked_at: float | None = None  #: when an operator took its key out for good


class Role(StrEnum):
    """What whoever holds an admin token may do; each may do all that those before it may."""

    VIEWER = "viewer"  #: look at everything
    OPERATOR = "operator"  #: bring bundles, make and steer tasks, make and revoke enrolment tokens
    ADMIN = "admin"  #: make and revoke admin tokens, revoke devices


class AdminToken(Struct, frozen=True, kw_only=True):
    """A person's or program's right to the admin listener, known by its hash alone."""

    sha256: str  #: of the token
    name: str  #: whose it is: stands in the audit log
    role: Role
    created_at: float
    expires_at: float | None = None  #: None for never
    revoked_at: float | None = None


class Audit(Struct, frozen=True, kw_only=True):
    """One change that a person made, chained to the one before it."""

    sequence: int  #: from 1, without gaps
    at: float
    actor: str  #: name of the admin token
    action: str  #: such as "task.create"
    subject: str  #: name of what was changed
    detail: str  #: JSON
    previous: str  #: sha256 of the entry before, 64 zeros for the first
    sha256: str  #: of all of the above, see `storage.audit`


class Bundle(Struct, frozen=True, kw_only=True):
    """A bundle whose files all lie in the blob store."""

    sha256: str  #: of its manifest
    manifest: bytes
    added_at: float


class Group(Struct, frozen=True, kw_only=True):
    """A group of devices between two global folds: what it was told to do and how far it has come."""

    number: int  #: from 1; names its branch
    version_number: int  #: on its branch: what it began from, the same factors as the newest of `MAIN`
    frequency: int  #: rounds of its own until the next global fold
    depth: int  #: adapted blocks it trains, from the last
    cohort: int  #: its part of the task's cohort
    buffer: int  #: and of the updates that close a round at once
    quorum: int  #: and of those with which the deadline may close it
    round_s: float  #: what a round at full depth is thought to last
    ended: int = 0  #: rounds that are over, folded or abandoned

    @property
    def branch(self) -> str:
        return group_branch(self.number)

    @property
    def waits(self) -> bool:
        """Whether it has held its rounds and waits for the others."""
        return self.ended >= self.frequency


class Task(Struct, frozen=True, kw_only=True):
    """One federated task."""

    id: int
    spec: TaskSpec
    bundle: str
    state: TaskState
    reason: str  #: why it is in this state, for people
    created_at: float
    resumed_after: int  #: newest round when it was last resumed or rolled back; later ones count as failures
    draw_key: str  #: 16 secret bytes by which cohorts are drawn, hexadecimal
    resumed_at: float = 0.0  #: when it was last resumed
    groups: tuple[Group, ...] = ()  #: in which its devices train now; none while all train together


class Version(Struct, frozen=True, kw_only=True):
    """One bit-identical set of factors."""

    task_id: int
    branch: str
    number: int  #: from 0, without gaps on a branch
    sha256: str  #: of theta's canonical bytes; its name in the blob store
    parents: tuple[str, ...]  #: sha256 of the versions it was made from; none for a task's first
    gauge: str  #: the form the cores are in; "plain" unless a method says otherwise
    state: VersionState
    created_at: float
    round_number: int | None  #: the round that made it; None for number 0
    updates: int  #: how many were folded
    examples: int  #: reported by them in total
    loss_first: float | None  #: mean training loss of their first local steps
    loss_last: float | None  #: and of their last
    server_state: str | None = None  #: sha256 of the blob with what the next fold needs of this one
    report: dict[str, float] = {}  #: what the method measured while folding, units in the names
    reason: str = ""  #: why it was held, or what it brings back


class Round(Struct, frozen=True, kw_only=True):
    """One attempt to make the next version."""

    task_id: int
    branch: str
    number: int  #: from 1; abandoned rounds count, and no two branches of groups share one
    version_number: int  #: the base its leases train from
    live: tuple[int, ...]  #: indices of the factors that are trained
    invited: tuple[str, ...]  #: the devices sampled at its opening
    state: RoundState
    opened_at: float
    deadline_at: float | None  #: set when the first lease is given
    closed_at: float | None
    reason: str
    drawn_from: int = 0  #: devices that could have been sampled; 0 of a round of before


class Lease(Struct, frozen=True, kw_only=True):
    """One device's permission to train one update."""

    id: str  #: 128 random bits
    task_id: int
    branch: str
    round_number: int
    version_number: int
    device_id: str
    granted_at: float
    expires_at: float
    state: LeaseState
    rank: int | None = None  #: of the variant it trains; None for the adapter's own


class Update(Struct, frozen=True, kw_only=True):
    """One acknowledged update: a row of the ledger; its coded delta lies apart while it waits."""

    sequence: int  #: the ledger's order; 0 before the store has given it one
    lease_id: str
    task_id: int
    branch: str
    round_number: int  #: the round it was accepted into
    version_number: int  #: the base it was trained from
    device_id: str
    digest: str  #: sha256 of the frame
    received_at: float
    examples: int  #: 0, like both losses, once settled for a device that was erased
    loss_first: float
    loss_last: float
    state: UpdateState
    reason: str
    folded_into: int | None  #: number of the version it became part of
    rank: int | None = None  #: its lease's


class Payload(Struct, frozen=True, kw_only=True):
    """What an accepted update holds."""

    sequence: int  #: of its update
    payload: bytes  #: the coded delta


class Evaluation(Struct, frozen=True, kw_only=True):
    """One device that was asked to judge a candidate of `MAIN`."""

    lease_id: str  #: 128 random bits
    task_id: int
    branch: str
    version_number: int
    device_id: str
    granted_at: float
    expires_at: float
    state: EvaluationState
    verdict: Verdict | None = None  #: what it found; None until then, and once its device was erased


class Participation(Struct, frozen=True, kw_only=True):
    """What a task knows of one device's updates to it; none before the first is acknowledged."""

    task_id: int
    device_id: str
    count: int  #: acknowledged updates, whatever has become of them
    last_round: int  #: that took its last
    last_loss: float | None  #: of the first local step of its last, as reported; None once forgotten
    duration_s: float | None  #: from the lease of its last to the receipt; None once forgotten
    work: float = 1.0  #: of its last, over that of a training at full depth
    label_counts: bytes | None = None  #: as told, with noise, or as estimated; None where unknown

    @property
    def full_s(self) -> float | None:
        """What its last would have taken at full depth; None where nothing is known of it."""
        return None if self.duration_s is None else self.duration_s / self.work
