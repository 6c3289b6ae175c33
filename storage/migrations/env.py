"""Runs migrations on the connection, and within the transaction, that `storage.migrate` hands over."""

from __future__ import annotations

from alembic import context

from storage.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    transactional_ddl=True,  # SQLite's schema changes roll back like any other
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
