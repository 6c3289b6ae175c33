"""Alembic's environment: the schema's history, one file a step, run at start by `storage.migrate`."""
