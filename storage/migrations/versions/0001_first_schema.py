"""First schema: the ledger with branches, parents, gauges and states from the start.

Constraint names follow the naming convention of `storage.models.Base`.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

COUNT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
ID = sa.String(32)
SHA256 = sa.String(64)
BRANCH = sa.String(63)


def upgrade() -> None:
    _create_enrolment()
    _create_tasks()
    _create_versions()
    _create_rounds()
    _create_leases()
    _create_updates()


def downgrade() -> None:
    for table in ("updates", "leases", "rounds", "versions", "tasks", "bundles", "devices", "tokens"):
        op.drop_table(table)


def _column(name: str, kind: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=False)


def _optional(name: str, kind: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=True)


def _state(*values: str) -> sa.Column[Any]:
    known = sa.Enum(*values, name="known_state", native_enum=False, create_constraint=True, length=16)
    return _column("state", known)


def _references(table: str, number: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["task_id", "branch", number], [f"{table}.task_id", f"{table}.branch", f"{table}.number"]
    )


def _index_where(name: str, table: str, columns: list[str], condition: str, *, unique: bool) -> None:
    where = sa.text(condition)
    op.create_index(name, table, columns, unique=unique, sqlite_where=where, postgresql_where=where)


def _create_enrolment() -> None:
    op.create_table(
        "tokens",
        _column("sha256", SHA256),
        _optional("uses_left", COUNT),
        _optional("expires_at", sa.Double()),
        sa.PrimaryKeyConstraint("sha256"),
        sa.CheckConstraint("length(sha256) = 64", name="sha256_is_sha256"),
        sa.CheckConstraint("uses_left >= 0", name="uses_left_counts"),
    )
    op.create_table(
        "devices",
        _column("id", ID),
        _column("public_key", sa.LargeBinary(32)),
        _column("client", sa.String(100)),
        _column("runtimes", sa.Text()),
        _column("examples", COUNT),
        _column("enrolled_at", sa.Double()),
        _column("seen_at", sa.Double()),
        _state("active", "left", "erased"),
        sa.PrimaryKeyConstraint("id"),
        sa.CheckConstraint("length(id) = 32", name="id_is_128_bits"),
        sa.CheckConstraint("examples >= 0", name="examples_count"),
        sa.CheckConstraint(
            "length(public_key) = CASE state WHEN 'erased' THEN 0 ELSE 32 END", name="erased_has_no_key"
        ),
    )
    op.create_index("ix_devices_seen_at", "devices", ["seen_at"])


def _create_tasks() -> None:
    op.create_table(
        "bundles",
        _column("sha256", SHA256),
        _column("manifest", sa.LargeBinary()),
        _column("added_at", sa.Double()),
        sa.PrimaryKeyConstraint("sha256"),
        sa.CheckConstraint("length(sha256) = 64", name="sha256_is_sha256"),
    )
    op.create_table(
        "tasks",
        _column("id", COUNT),
        _column("name", sa.String(63)),
        _column("spec", sa.Text()),
        _column("bundle", SHA256),
        _state("active", "paused", "stopped", "finished"),
        _column("reason", sa.Text()),
        _column("created_at", sa.Double()),
        _column("resumed_after", COUNT),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name"),
        sa.CheckConstraint("resumed_after >= 0", name="resumed_after_counts"),
        sa.ForeignKeyConstraint(["bundle"], ["bundles.sha256"]),
    )


def _create_versions() -> None:
    op.create_table(
        "versions",
        _column("task_id", COUNT),
        _column("branch", BRANCH),
        _column("number", COUNT),
        _column("sha256", SHA256),
        _column("parents", sa.Text()),
        _column("gauge", sa.String(32)),
        _state("candidate", "released", "held"),
        _column("created_at", sa.Double()),
        _optional("round_number", COUNT),
        _column("updates", COUNT),
        _column("examples", COUNT),
        _optional("loss_first", sa.Double()),
        _optional("loss_last", sa.Double()),
        sa.PrimaryKeyConstraint("task_id", "branch", "number"),
        sa.UniqueConstraint("task_id", "branch", "round_number"),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"]),
        sa.CheckConstraint("length(sha256) = 64", name="sha256_is_sha256"),
        sa.CheckConstraint("number > 0 OR round_number IS NULL", name="first_has_no_round"),
        sa.CheckConstraint("parents = '[]' OR length(parents) % 67 = 1", name="parents_are_sha256"),
        sa.CheckConstraint("number = 0 OR parents <> '[]'", name="later_has_a_parent"),
        sa.CheckConstraint("updates >= 0 AND examples >= 0", name="sums_count"),
    )
    op.create_index("ix_versions_sha256", "versions", ["sha256"])


def _create_rounds() -> None:
    op.create_table(
        "rounds",
        _column("task_id", COUNT),
        _column("branch", BRANCH),
        _column("number", COUNT),
        _column("version_number", COUNT),
        _column("live", sa.Text()),
        _column("invited", sa.Text()),
        _state("open", "folding", "folded", "abandoned"),
        _column("opened_at", sa.Double()),
        _optional("deadline_at", sa.Double()),
        _optional("closed_at", sa.Double()),
        _column("reason", sa.Text()),
        sa.PrimaryKeyConstraint("task_id", "branch", "number"),
        _references("versions", "version_number"),
        sa.CheckConstraint("number > 0", name="numbers_start_at_one"),
        sa.CheckConstraint("deadline_at > opened_at", name="deadline_follows_opening"),
        sa.CheckConstraint("(closed_at IS NULL) = (state IN ('open', 'folding'))", name="ended_has_a_time"),
        sa.CheckConstraint("state <> 'abandoned' OR reason <> ''", name="abandoned_has_a_reason"),
    )
    _index_where("ix_rounds_one_open", "rounds", ["task_id", "branch"], "state = 'open'", unique=True)


def _create_leases() -> None:
    op.create_table(
        "leases",
        _column("sequence", COUNT),
        _column("id", ID),
        _column("task_id", COUNT),
        _column("branch", BRANCH),
        _column("round_number", COUNT),
        _column("version_number", COUNT),
        _column("device_id", ID),
        _column("granted_at", sa.Double()),
        _column("expires_at", sa.Double()),
        _state("active", "uploaded", "failed", "expired"),
        sa.PrimaryKeyConstraint("sequence"),
        sa.UniqueConstraint("id"),
        _references("rounds", "round_number"),
        _references("versions", "version_number"),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"]),
        sa.CheckConstraint("length(id) = 32", name="id_is_128_bits"),
        sa.CheckConstraint("expires_at > granted_at", name="expiry_follows_grant"),
    )
    op.create_index(
        "ix_leases_task_id_branch_round_number_state",
        "leases",
        ["task_id", "branch", "round_number", "state"],
    )
    op.create_index(
        "ix_leases_device_id_task_id_branch_round_number",
        "leases",
        ["device_id", "task_id", "branch", "round_number"],
    )
    _index_where("ix_leases_active_expiry", "leases", ["expires_at"], "state = 'active'", unique=False)


def _create_updates() -> None:
    op.create_table(
        "updates",
        _column("sequence", COUNT),
        _column("lease_id", ID),
        _column("task_id", COUNT),
        _column("branch", BRANCH),
        _column("round_number", COUNT),
        _column("version_number", COUNT),
        _column("device_id", ID),
        _column("digest", SHA256),
        _column("received_at", sa.Double()),
        _column("examples", COUNT),
        _column("loss_first", sa.Double()),
        _column("loss_last", sa.Double()),
        _state("accepted", "folded", "discarded"),
        _column("reason", sa.Text()),
        _optional("folded_into", COUNT),
        _column("payload", sa.LargeBinary()),
        sa.PrimaryKeyConstraint("sequence"),
        sa.UniqueConstraint("lease_id"),
        sa.ForeignKeyConstraint(["lease_id"], ["leases.id"]),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"]),
        _references("rounds", "round_number"),
        _references("versions", "version_number"),
        _references("versions", "folded_into"),
        sa.CheckConstraint("length(digest) = 64", name="digest_is_sha256"),
        sa.CheckConstraint("examples >= 0", name="examples_count"),
        sa.CheckConstraint(
            "CASE state"
            " WHEN 'accepted' THEN length(payload) > 0 AND folded_into IS NULL AND reason = ''"
            " WHEN 'folded' THEN length(payload) = 0 AND folded_into IS NOT NULL"
            " WHEN 'discarded' THEN length(payload) = 0 AND folded_into IS NULL AND reason <> ''"
            " END",
            name="one_end",
        ),
    )
    op.create_index(
        "ix_updates_task_id_branch_round_number_state_sequence",
        "updates",
        ["task_id", "branch", "round_number", "state", "sequence"],
    )
    op.create_index("ix_updates_device_id_state", "updates", ["device_id", "state"])
