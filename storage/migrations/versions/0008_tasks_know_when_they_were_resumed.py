"""When a task was last resumed: candidates are judged within a time that starts then, if not later."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tasks", sa.Column("resumed_at", sa.Double(), nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("tasks", "resumed_at")
