"""What accepted updates hold lies in a table of its own, so that settling them does not write it again."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

COUNT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
ID = sa.String(32)
KEPT = (
    "sequence, lease_id, task_id, branch, round_number, version_number, device_id, digest, received_at, "
    "examples, loss_first, loss_last, state, reason, folded_into, rank"
)
ONE_END = (
    "CASE state WHEN 'accepted' THEN folded_into IS NULL AND reason = ''"
    " WHEN 'folded' THEN folded_into IS NOT NULL"
    " WHEN 'discarded' THEN folded_into IS NULL AND reason <> '' END"
)
ONE_END_AND_PAYLOAD = (
    "CASE state WHEN 'accepted' THEN length(payload) > 0 AND folded_into IS NULL AND reason = ''"
    " WHEN 'folded' THEN length(payload) = 0 AND folded_into IS NOT NULL"
    " WHEN 'discarded' THEN length(payload) = 0 AND folded_into IS NULL AND reason <> '' END"
)


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        _set_updates_aside()
        _create_updates(ONE_END)
        op.execute(f"INSERT INTO updates ({KEPT}) SELECT {KEPT} FROM updates_before")  # noqa: S608
        _create_payloads("updates_before")
        op.drop_table("updates_before")
    else:
        _create_payloads("updates")
        op.drop_constraint(op.f("ck_updates_one_end"), "updates")
        op.drop_column("updates", "payload")
        op.create_check_constraint("one_end", "updates", ONE_END)


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.execute("CREATE TABLE payloads_before (sequence INTEGER PRIMARY KEY, payload BLOB)")
        op.execute("INSERT INTO payloads_before SELECT * FROM payloads")
        op.drop_table("payloads")
        _set_updates_aside()
        _create_updates(ONE_END_AND_PAYLOAD, sa.Column("payload", sa.LargeBinary(), nullable=False))
        op.execute(
            f"INSERT INTO updates ({KEPT}, payload) SELECT {KEPT}, CASE state WHEN 'accepted' THEN "  # noqa: S608
            "(SELECT payload FROM payloads_before AS p WHERE p.sequence = u.sequence) ELSE x'' END "
            "FROM updates_before AS u"
        )
        op.drop_table("payloads_before")
        op.drop_table("updates_before")
    else:
        op.add_column("updates", sa.Column("payload", sa.LargeBinary(), nullable=False, server_default=""))
        op.execute(
            "UPDATE updates SET payload = payloads.payload FROM payloads "
            "WHERE payloads.sequence = updates.sequence AND state = 'accepted'"
        )
        op.alter_column("updates", "payload", server_default=None)
        op.drop_constraint(op.f("ck_updates_one_end"), "updates")
        op.create_check_constraint("one_end", "updates", ONE_END_AND_PAYLOAD)
        op.drop_table("payloads")


def _create_payloads(held_in: str) -> None:
    op.create_table(
        "payloads",
        sa.Column("sequence", COUNT, nullable=False, autoincrement=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("sequence"),
        sa.ForeignKeyConstraint(["sequence"], ["updates.sequence"]),
        sa.CheckConstraint("length(payload) > 0", name="holds_something"),
    )
    held = f"SELECT sequence, payload FROM {held_in} WHERE state = 'accepted'"  # noqa: S608
    op.execute(f"INSERT INTO payloads {held}")


def _set_updates_aside() -> None:
    """SQLite changes no CHECK: the table is made again."""
    op.rename_table("updates", "updates_before")
    op.drop_index("ix_updates_task_id_branch_round_number_state_sequence", "updates_before")
    op.drop_index("ix_updates_device_id_state", "updates_before")


def _create_updates(one_end: str, *more: sa.Column[bytes]) -> None:
    states = sa.Enum(
        "accepted",
        "folded",
        "discarded",
        name="known_state",
        native_enum=False,
        create_constraint=True,
        length=16,
    )
    op.create_table(
        "updates",
        *(sa.Column(name, COUNT, nullable=False) for name in ("sequence", "task_id", "round_number")),
        *(sa.Column(name, COUNT, nullable=False) for name in ("version_number", "examples")),
        *(sa.Column(name, COUNT, nullable=True) for name in ("folded_into", "rank")),
        *(sa.Column(name, ID, nullable=False) for name in ("lease_id", "device_id")),
        *(
            sa.Column(name, sa.Double(), nullable=False)
            for name in ("received_at", "loss_first", "loss_last")
        ),
        sa.Column("branch", sa.String(63), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("state", states, nullable=False),
        *more,
        sa.PrimaryKeyConstraint("sequence"),
        sa.UniqueConstraint("lease_id"),
        sa.ForeignKeyConstraint(["lease_id"], ["leases.id"]),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"]),
        *(_references(*place) for place in (("rounds", "round_number"), ("versions", "version_number"))),
        _references("versions", "folded_into"),
        sa.CheckConstraint("length(digest) = 64", name="digest_is_sha256"),
        sa.CheckConstraint("examples >= 0", name="examples_count"),
        sa.CheckConstraint(one_end, name="one_end"),
    )
    op.create_index(None, "updates", ["task_id", "branch", "round_number", "state", "sequence"])
    op.create_index(None, "updates", ["device_id", "state"])


def _references(table: str, number: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["task_id", "branch", number], [f"{table}.{name}" for name in ("task_id", "branch", "number")]
    )
