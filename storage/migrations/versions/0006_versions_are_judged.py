"""Why a version was held or what it brings back, and the devices that were asked to judge it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

COUNT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("versions", sa.Column("reason", sa.Text(), nullable=False, server_default=""))
    state = sa.Enum(
        "active", "done", "failed", name="known_state", native_enum=False, create_constraint=True, length=16
    )
    op.create_table(
        "evaluations",
        sa.Column("lease_id", sa.String(32), nullable=False),
        sa.Column("task_id", COUNT, nullable=False),
        sa.Column("branch", sa.String(63), nullable=False),
        sa.Column("version_number", COUNT, nullable=False),
        sa.Column("device_id", sa.String(32), nullable=False),
        sa.Column("granted_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("state", state, nullable=False),
        sa.Column("verdict", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("lease_id"),
        sa.UniqueConstraint("task_id", "branch", "version_number", "device_id"),
        sa.ForeignKeyConstraint(
            ["task_id", "branch", "version_number"],
            ["versions.task_id", "versions.branch", "versions.number"],
        ),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"]),
        sa.CheckConstraint("length(lease_id) = 32", name="lease_id_is_128_bits"),
        sa.CheckConstraint("expires_at > granted_at", name="expiry_follows_grant"),
        sa.CheckConstraint("verdict IS NULL OR state = 'done'", name="a_verdict_is_done"),
    )
    op.create_index(None, "evaluations", ["device_id"])


def downgrade() -> None:
    op.drop_table("evaluations")
    op.drop_column("versions", "reason")
