"""The tables: their keys, CHECKs and foreign keys hold the invariants of the ledger.

Column names are those of `storage.records`, so a row is a record. Only payloads are ever deleted. A key's
columns are never updated; states move forward.
"""

from __future__ import annotations

from sqlalchemy import (
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    LargeBinary,
    MetaData,
    String,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fedtt.messages import Verdict
from fedtt.task import TaskSpec
from storage.columns import (
    Count,
    Id,
    Json,
    Number,
    Parents,
    Reason,
    Seconds,
    Sha256,
    one_of,
    sha256_check,
    sha256s_check,
)
from storage.records import (
    DeviceState,
    EvaluationState,
    Group,
    LeaseState,
    Role,
    RoundState,
    TaskState,
    UpdateState,
    VersionState,
)

__all__ = [
    "AdminTokenRow",
    "AuditRow",
    "Base",
    "BundleRow",
    "DeviceRow",
    "EvaluationRow",
    "LeaseRow",
    "MembershipRow",
    "ParticipationRow",
    "PayloadRow",
    "RoundRow",
    "TaskRow",
    "TokenRow",
    "UpdateRow",
    "VersionRow",
]

_NAMES = {
    "pk": "pk_%(table_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
}
_REPORT = Json(dict[str, float])
_GROUPS = Json(tuple[Group, ...])


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=_NAMES)


def _references(table: str, number: str) -> ForeignKeyConstraint:
    """(task_id, branch, `number`) names a row of `table`."""
    return ForeignKeyConstraint(
        ["task_id", "branch", number], [f"{table}.{name}" for name in ("task_id", "branch", "number")]
    )


class TokenRow(Base):
    """An enrolment token, known by its hash alone."""

    __tablename__ = "tokens"
    __table_args__ = (sha256_check("sha256"), CheckConstraint("uses_left >= 0", name="uses_left_counts"))

    sha256: Mapped[Sha256] = mapped_column(primary_key=True)  #: of the token
    uses_left: Mapped[Count | None]  #: enrolments it still allows; NULL for any number
    expires_at: Mapped[Seconds | None]  #: NULL for never


class DeviceRow(Base):
    """One member of the population; the row stays when it leaves, so that the ledger keeps its names."""

    __tablename__ = "devices"
    __table_args__ = (
        CheckConstraint("length(id) = 32", name="id_is_128_bits"),
        CheckConstraint("examples >= 0", name="examples_count"),
        CheckConstraint(
            "length(public_key) = CASE state WHEN 'erased' THEN 0 ELSE 32 END", name="erased_has_no_key"
        ),
        Index(None, "seen_at"),
    )

    id: Mapped[Id] = mapped_column(primary_key=True)  #: derived from the public key
    public_key: Mapped[bytes] = mapped_column(LargeBinary(32))  #: Ed25519; empty once erased
    client: Mapped[str] = mapped_column(String(100))  #: program and version, as last reported
    runtimes: Mapped[tuple[str, ...]] = mapped_column(Json(tuple[str, ...]))  #: what it can run, as JSON
    examples: Mapped[Count]  #: usable examples it last reported
    memory_mb: Mapped[Count] = mapped_column(server_default="0")  #: it last said it may use; 0 if nothing
    enrolled_at: Mapped[Seconds]  #: when it enrolled for the first time, or again after leaving
    seen_at: Mapped[Seconds]  #: when it last checked in
    state: Mapped[DeviceState] = mapped_column(one_of(DeviceState))  #: whether it takes part
    last_nonce: Mapped[Count] = mapped_column(server_default="0")  #: of the last request that changed it
    revoked_at: Mapped[Seconds | None]  #: when an operator took its key out for good


class AdminTokenRow(Base):
    """A right to the admin listener, known by its hash alone; the row stays, and its name with it."""

    __tablename__ = "admin_tokens"
    __table_args__ = (UniqueConstraint("name"), sha256_check("sha256"))

    sha256: Mapped[Sha256] = mapped_column(primary_key=True)  #: of the token
    name: Mapped[str] = mapped_column(String(63))  #: stands in the audit log
    role: Mapped[Role] = mapped_column(one_of(Role))  #: what its holder may do
    created_at: Mapped[Seconds]  #: when it was made
    expires_at: Mapped[Seconds | None]  #: NULL for never
    revoked_at: Mapped[Seconds | None]  #: when it was taken back


class AuditRow(Base):
    """Each change a person made, chained by hashes; triggers refuse to change or delete a row."""

    __tablename__ = "audit"
    __table_args__ = (
        UniqueConstraint("previous"),  # the chain has no branches
        CheckConstraint("sequence > 0", name="sequence_starts_at_one"),
        sha256_check("previous"),
        sha256_check("sha256"),
    )

    sequence: Mapped[Count] = mapped_column(primary_key=True, autoincrement=False)  #: from 1, no gaps
    at: Mapped[Seconds]  #: when the change was made
    actor: Mapped[str] = mapped_column(String(63))  #: name of the admin token
    action: Mapped[str] = mapped_column(String(63))  #: what was done
    subject: Mapped[str] = mapped_column(String(100))  #: to what
    detail: Mapped[Reason]  #: JSON, "{}" where there is no more to say
    previous: Mapped[Sha256]  #: hash of the entry before; 64 zeros for the first
    sha256: Mapped[Sha256]  #: of all the others


class BundleRow(Base):
    """A bundle whose files all lie in the blob store."""

    __tablename__ = "bundles"
    __table_args__ = (sha256_check("sha256"),)

    sha256: Mapped[Sha256] = mapped_column(primary_key=True)  #: of its manifest
    manifest: Mapped[bytes] = mapped_column(LargeBinary)  #: the manifest's own bytes
    added_at: Mapped[Seconds]  #: when its last file had come


class TaskRow(Base):
    """One federated task."""

    __tablename__ = "tasks"
    __table_args__ = (
        UniqueConstraint("name"),
        CheckConstraint("resumed_after >= 0", name="resumed_after_counts"),
    )

    id: Mapped[Count] = mapped_column(primary_key=True)  #: given by the database, in order of creation
    name: Mapped[str] = mapped_column(String(63))  #: the name within the spec, to find it by
    spec: Mapped[TaskSpec] = mapped_column(Json(TaskSpec))  #: all its settings, as JSON
    bundle: Mapped[Sha256] = mapped_column(ForeignKey("bundles.sha256"))  #: what its devices run
    state: Mapped[TaskState] = mapped_column(one_of(TaskState))  #: whether rounds are opened
    reason: Mapped[Reason]  #: why it is in this state
    created_at: Mapped[Seconds]  #: when an operator made it
    resumed_after: Mapped[Count]  #: newest round when it was last resumed or rolled back; 0 where never
    resumed_at: Mapped[Seconds] = mapped_column(server_default="0")  #: when it was last resumed
    groups: Mapped[tuple[Group, ...]] = mapped_column(_GROUPS, server_default="[]")  #: as JSON
    draw_key: Mapped[str] = mapped_column(String(32), server_default="")  #: secret, of its cohorts; hex


class VersionRow(Base):
    """One bit-identical set of factors; the key is the fence that lets only one fold make a version."""

    __tablename__ = "versions"
    __table_args__ = (
        UniqueConstraint("task_id", "branch", "round_number"),  # a round makes at most one version
        sha256_check("sha256"),
        CheckConstraint("number > 0 OR round_number IS NULL", name="first_has_no_round"),
        sha256s_check("parents"),
        CheckConstraint("number = 0 OR parents <> '[]'", name="later_has_a_parent"),
        CheckConstraint("updates >= 0 AND examples >= 0", name="sums_count"),
        Index(None, "sha256"),
    )

    task_id: Mapped[Count] = mapped_column(ForeignKey("tasks.id"), primary_key=True)  #: whose version it is
    branch: Mapped[str] = mapped_column(String(63), primary_key=True)  #: the line of versions it continues
    number: Mapped[Count] = mapped_column(primary_key=True)  #: from 0, without gaps on a branch
    sha256: Mapped[Sha256]  #: of theta's canonical bytes; a roll-back may repeat an earlier one
    parents: Mapped[Parents]  #: the versions it was made from, as JSON
    gauge: Mapped[str] = mapped_column(String(32))  #: the form the cores are in
    state: Mapped[VersionState] = mapped_column(one_of(VersionState))  #: whether devices train from it
    created_at: Mapped[Seconds]  #: when it was published
    round_number: Mapped[Count | None]  #: the round that made it (no foreign key: rounds refer to versions)
    updates: Mapped[Count]  #: how many were folded into it
    examples: Mapped[Count]  #: reported by them in total
    loss_first: Mapped[Number | None]  #: mean training loss of their first local steps
    loss_last: Mapped[Number | None]  #: and of their last
    server_state: Mapped[Sha256 | None]  #: blob with what the next fold needs of this one
    report: Mapped[dict[str, float]] = mapped_column(_REPORT, server_default="{}")  #: what it measured
    reason: Mapped[Reason] = mapped_column(server_default="")  #: why it was held, or what it brings back


class RoundRow(Base):
    """One attempt to make the next version; at most one is open on a branch."""

    __tablename__ = "rounds"
    __table_args__ = (
        _references("versions", "version_number"),
        CheckConstraint("number > 0", name="numbers_start_at_one"),
        CheckConstraint("deadline_at > opened_at", name="deadline_follows_opening"),
        CheckConstraint("(closed_at IS NULL) = (state IN ('open', 'folding'))", name="ended_has_a_time"),
        CheckConstraint("state <> 'abandoned' OR reason <> ''", name="abandoned_has_a_reason"),
        Index(
            "ix_rounds_one_open",
            "task_id",
            "branch",
            unique=True,
            sqlite_where=text("state = 'open'"),
            postgresql_where=text("state = 'open'"),
        ),
    )

    task_id: Mapped[Count] = mapped_column(primary_key=True)  #: the task it belongs to
    branch: Mapped[str] = mapped_column(String(63), primary_key=True)  #: where its version will go
    number: Mapped[Count] = mapped_column(primary_key=True)  #: from 1; abandoned rounds count
    version_number: Mapped[Count]  #: the base its leases train from
    live: Mapped[tuple[int, ...]] = mapped_column(Json(tuple[int, ...]))  #: trained factors, as JSON
    invited: Mapped[tuple[str, ...]] = mapped_column(Json(tuple[str, ...]))  #: sampled devices, as JSON
    state: Mapped[RoundState] = mapped_column(one_of(RoundState))  #: how far it has come
    opened_at: Mapped[Seconds]  #: when its cohort was sampled
    deadline_at: Mapped[Seconds | None]  #: set when the first lease is given
    closed_at: Mapped[Seconds | None]  #: when it was folded or abandoned
    reason: Mapped[Reason]  #: why it was abandoned
    drawn_from: Mapped[Count] = mapped_column(server_default="0")  #: devices that could have been sampled


class LeaseRow(Base):
    """One device's permission to train one update."""

    __tablename__ = "leases"
    __table_args__ = (
        UniqueConstraint("id"),
        _references("rounds", "round_number"),
        _references("versions", "version_number"),
        CheckConstraint("length(id) = 32", name="id_is_128_bits"),
        CheckConstraint("expires_at > granted_at", name="expiry_follows_grant"),
        Index(None, "task_id", "branch", "round_number", "state"),
        Index(None, "device_id", "task_id", "branch", "round_number"),
        Index(
            "ix_leases_active_expiry",
            "expires_at",
            sqlite_where=text("state = 'active'"),
            postgresql_where=text("state = 'active'"),
        ),
    )

    sequence: Mapped[Count] = mapped_column(primary_key=True)  #: the order leases were given in
    id: Mapped[Id]  #: 128 random bits, known to the device alone
    task_id: Mapped[Count]  #: the task it trains for
    branch: Mapped[str] = mapped_column(String(63))  #: the branch it trains for
    round_number: Mapped[Count]  #: the round it was given in
    version_number: Mapped[Count]  #: the base it trains from
    rank: Mapped[Count | None]  #: of the variant it trains; NULL for the adapter's own
    device_id: Mapped[Id] = mapped_column(ForeignKey("devices.id"))  #: the one device that may use it
    granted_at: Mapped[Seconds]  #: when it was given
    expires_at: Mapped[Seconds]  #: when the device's time is over
    state: Mapped[LeaseState] = mapped_column(one_of(LeaseState))  #: what the device has made of it


class UpdateRow(Base):
    """The ledger of acknowledged updates; one lease has one, so a retry is a no-op."""

    __tablename__ = "updates"
    __table_args__ = (
        UniqueConstraint("lease_id"),
        _references("rounds", "round_number"),
        _references("versions", "version_number"),
        _references("versions", "folded_into"),
        sha256_check("digest"),
        CheckConstraint("examples >= 0", name="examples_count"),
        CheckConstraint(
            "CASE state"
            " WHEN 'accepted' THEN folded_into IS NULL AND reason = ''"
            " WHEN 'folded' THEN folded_into IS NOT NULL"
            " WHEN 'discarded' THEN folded_into IS NULL AND reason <> ''"
            " END",
            name="one_end",
        ),
        Index(None, "task_id", "branch", "round_number", "state", "sequence"),
        Index(None, "device_id", "state"),
    )

    sequence: Mapped[Count] = mapped_column(primary_key=True)  #: given by the database: the ledger's order
    lease_id: Mapped[Id] = mapped_column(ForeignKey("leases.id"))  #: the permission it was trained under
    task_id: Mapped[Count]  #: the task it belongs to
    branch: Mapped[str] = mapped_column(String(63))  #: the branch it belongs to
    round_number: Mapped[Count]  #: the round it was accepted into
    version_number: Mapped[Count]  #: the base it was trained from
    rank: Mapped[Count | None]  #: its lease's
    device_id: Mapped[Id] = mapped_column(ForeignKey("devices.id"))  #: who trained it
    digest: Mapped[Sha256]  #: of the frame, so that the same bytes get the same receipt
    received_at: Mapped[Seconds]  #: when it came
    examples: Mapped[Count]  #: the device says its delta stands for; 0 once settled for an erased device
    loss_first: Mapped[Number]  #: training loss of its first local step
    loss_last: Mapped[Number]  #: and of its last
    state: Mapped[UpdateState] = mapped_column(one_of(UpdateState))  #: where it stands
    reason: Mapped[Reason]  #: why it was discarded
    folded_into: Mapped[Count | None]  #: number of the version it became part of


class PayloadRow(Base):
    """What an accepted update holds; of all tables the one whose rows go, some time after the update's end.

    Apart from the ledger's rows, so that these are moved without writing the payloads again.
    """

    __tablename__ = "payloads"
    __table_args__ = (
        ForeignKeyConstraint(["sequence"], ["updates.sequence"]),
        CheckConstraint("length(payload) > 0", name="holds_something"),
    )

    sequence: Mapped[Count] = mapped_column(primary_key=True, autoincrement=False)  #: of its update
    payload: Mapped[bytes] = mapped_column(LargeBinary)  #: the coded delta


class EvaluationRow(Base):
    """A device that was asked to judge a candidate; each is asked once about a version."""

    __tablename__ = "evaluations"
    __table_args__ = (
        UniqueConstraint("task_id", "branch", "version_number", "device_id"),
        _references("versions", "version_number"),
        CheckConstraint("length(lease_id) = 32", name="lease_id_is_128_bits"),
        CheckConstraint("expires_at > granted_at", name="expiry_follows_grant"),
        CheckConstraint("verdict IS NULL OR state = 'done'", name="a_verdict_is_done"),
        Index(None, "device_id"),
    )

    lease_id: Mapped[Id] = mapped_column(primary_key=True)  #: 128 random bits, known to the device alone
    task_id: Mapped[Count]  #: whose version it is
    branch: Mapped[str] = mapped_column(String(63))  #: and on which branch
    version_number: Mapped[Count]  #: the candidate
    device_id: Mapped[Id] = mapped_column(ForeignKey("devices.id"))  #: who was asked
    granted_at: Mapped[Seconds]  #: when it was asked
    expires_at: Mapped[Seconds]  #: when its time is over
    state: Mapped[EvaluationState] = mapped_column(one_of(EvaluationState))  #: what came of it
    verdict: Mapped[Verdict | None] = mapped_column(Json(Verdict))  #: as JSON; NULL until then, or erased


class ParticipationRow(Base):
    """What a task knows of one device's updates to it: what sampling goes by."""

    __tablename__ = "participations"
    __table_args__ = (
        CheckConstraint("count > 0", name="count_counts"),
        CheckConstraint("last_round > 0", name="rounds_start_at_one"),
        CheckConstraint("duration_s >= 0", name="time_goes_forward"),
        CheckConstraint("(last_loss IS NULL) = (duration_s IS NULL)", name="forgotten_together"),
    )

    # the device first, so that all it has left in any task is found by it
    device_id: Mapped[Id] = mapped_column(ForeignKey("devices.id"), primary_key=True)  #: whose updates
    task_id: Mapped[Count] = mapped_column(ForeignKey("tasks.id"), primary_key=True)  #: and to which task
    count: Mapped[Count]  #: its acknowledged updates
    last_round: Mapped[Count]  #: the round that took its last
    last_loss: Mapped[Number | None]  #: of that update's first local step; NULL once forgotten
    duration_s: Mapped[Number | None]  #: from that update's lease to its receipt; NULL once forgotten
    work: Mapped[Number] = mapped_column(server_default="1")  #: of that update, over one at full depth
    label_counts: Mapped[bytes | None] = mapped_column(LargeBinary)  #: int16, with its noise; NULL unknown


class MembershipRow(Base):
    """The group of a device in a task whose method trains in groups."""

    __tablename__ = "memberships"
    __table_args__ = (
        CheckConstraint("group_number > 0", name="groups_start_at_one"),
        Index(None, "task_id", "group_number"),
    )

    device_id: Mapped[Id] = mapped_column(ForeignKey("devices.id"), primary_key=True)  #: whose it is
    task_id: Mapped[Count] = mapped_column(ForeignKey("tasks.id"), primary_key=True)  #: and in which task
    group_number: Mapped[Count | None]  #: names a branch; NULL once forgotten
