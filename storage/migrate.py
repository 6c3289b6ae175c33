"""Brings a database to this program's schema, or says clearly why not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct
from sqlalchemy import Connection, inspect, text

from fedtt.errors import StorageError

if TYPE_CHECKING:  # importing it takes a fifth of a start, and an up-to-date ledger needs none of it
    from alembic.config import Config

__all__ = ["Schema", "downgrade", "newest_schema", "revisions", "schema_of", "upgrade"]

_MIGRATIONS = Path(__file__).parent / "migrations"


class Schema(Struct, frozen=True, kw_only=True):
    """How far a database has been migrated."""

    current: str | None  #: None where nothing was made yet
    head: str  #: this program's
    behind: int | None  #: migrations that are missing; None where another program made it


def revisions() -> list[str]:
    """That this program knows, in order: migrations are files whose names begin with their revisions."""
    return sorted(path.name.partition("_")[0] for path in _MIGRATIONS.glob("versions/[0-9]*_*.py"))


def newest_schema() -> str:
    """This program's."""
    return revisions()[-1]


def _is_newest(connection: Connection) -> bool:
    if not inspect(connection).has_table("alembic_version"):
        return False
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == newest_schema()


def schema_of(connection: Connection) -> Schema:
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    script = ScriptDirectory.from_config(_config(connection))
    newest_first = [known.revision for known in script.walk_revisions()]
    current = MigrationContext.configure(connection).get_current_revision()
    behind = newest_first.index(current) if current in newest_first else None
    return Schema(current=current, head=newest_first[0], behind=behind)


def upgrade(connection: Connection, where: Path | str, revision: str = "head") -> None:
    """Migrate to a newer schema, or the newest, within the caller's transaction; raises StorageError.

    A database of a newer schema, or one that holds another program's tables, is left untouched.
    """
    if _is_newest(connection):
        return
    from alembic import command

    found = schema_of(connection)
    current = found.current
    if current is None and set(inspect(connection).get_table_names()) - {"alembic_version"}:
        raise StorageError(f"{where}: the database belongs to another program: name another one")
    if current is not None and found.behind is None:
        raise StorageError(
            f"{where}: its schema {current!r} is newer than this program: use the newer fedtt that made it"
        )
    command.upgrade(_config(connection), revision)


def downgrade(connection: Connection, revision: str) -> None:
    """Go back to an older schema ("base" for none) within the caller's transaction."""
    from alembic import command

    command.downgrade(_config(connection), revision)


def _config(connection: Connection) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
