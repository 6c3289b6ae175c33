"""Brings a database to this program's schema, or says clearly why not."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from fedtt.errors import StorageError

__all__ = ["downgrade", "upgrade"]

_MIGRATIONS = Path(__file__).parent / "migrations"


def upgrade(connection: Connection, where: Path | str) -> None:
    """Migrate to the newest schema within the caller's transaction; raises StorageError.

    A database of a newer schema, or one that holds another program's tables, is left untouched.
    """
    config = _config(connection)
    script = ScriptDirectory.from_config(config)
    current = MigrationContext.configure(connection).get_current_revision()
    if current == script.get_current_head():
        return
    if current is None and set(inspect(connection).get_table_names()) - {"alembic_version"}:
        raise StorageError(f"{where}: the database belongs to another program: name another one")
    if current is not None and current not in {known.revision for known in script.walk_revisions()}:
        raise StorageError(
            f"{where}: its schema {current!r} is newer than this program: use the newer fedtt that made it"
        )
    command.upgrade(config, "head")


def downgrade(connection: Connection, revision: str) -> None:
    """Go back to an older schema ("base" for none) within the caller's transaction."""
    command.downgrade(_config(connection), revision)


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
