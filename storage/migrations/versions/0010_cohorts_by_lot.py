"""Cohorts are drawn by a secret of their task, and rounds know how many devices theirs was drawn from."""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

COUNT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_TASKS = sa.table("tasks", sa.column("id", COUNT), sa.column("draw_key", sa.String()))


def upgrade() -> None:
    op.add_column("tasks", sa.Column("draw_key", sa.String(32), nullable=False, server_default=""))
    op.add_column("rounds", sa.Column("drawn_from", COUNT, nullable=False, server_default="0"))
    known = op.get_bind().execute(sa.select(_TASKS.c.id)).scalars().all()
    for task_id in known:
        of_task = sa.update(_TASKS).where(_TASKS.c.id == task_id)
        op.get_bind().execute(of_task.values(draw_key=secrets.token_hex(16)))


def downgrade() -> None:
    op.drop_column("rounds", "drawn_from")
    op.drop_column("tasks", "draw_key")
