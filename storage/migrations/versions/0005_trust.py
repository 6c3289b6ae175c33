"""Replays and revoked keys are known by the device's row; people have tokens with roles, and an audit log."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

COUNT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("devices", sa.Column("last_nonce", COUNT, nullable=False, server_default="0"))
    op.add_column("devices", sa.Column("revoked_at", sa.Double(), nullable=True))
    op.create_table(
        "admin_tokens",
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("sha256"),
        sa.UniqueConstraint("name"),
        sa.CheckConstraint("length(sha256) = 64", name="sha256_is_sha256"),
        sa.CheckConstraint("role IN ('viewer', 'operator', 'admin')", name="known_state"),
    )
    op.create_table(
        "audit",
        sa.Column("sequence", COUNT, nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("actor", sa.String(63), nullable=False),
        sa.Column("action", sa.String(63), nullable=False),
        sa.Column("subject", sa.String(100), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("previous", sa.String(64), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("sequence"),
        sa.UniqueConstraint("previous"),
        sa.CheckConstraint("sequence > 0", name="sequence_starts_at_one"),
        sa.CheckConstraint("length(previous) = 64", name="previous_is_sha256"),
        sa.CheckConstraint("length(sha256) = 64", name="sha256_is_sha256"),
    )
    for statement in _APPEND_ONLY[op.get_bind().dialect.name]:
        op.execute(statement)


def downgrade() -> None:
    op.drop_table("audit")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION fedtt_append_only")
    op.drop_table("admin_tokens")
    op.drop_column("devices", "revoked_at")
    op.drop_column("devices", "last_nonce")


_APPEND_ONLY = {
    "sqlite": [
        f"CREATE TRIGGER audit_no_{change.lower()} BEFORE {change} ON audit "
        "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
        for change in ("UPDATE", "DELETE")
    ],
    "postgresql": [
        "CREATE FUNCTION fedtt_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$",
        "CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE ON audit "
        "FOR EACH STATEMENT EXECUTE FUNCTION fedtt_append_only()",
    ],
}
