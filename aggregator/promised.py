"""Rows that the schema's foreign keys promise."""

from __future__ import annotations

from typing import TypeVar

from fedtt.errors import StorageError

__all__ = ["promised"]

Row = TypeVar("Row")


def promised(row: Row | None, what: str) -> Row:
    """The row; raises StorageError where a damaged ledger lacks it."""
    if row is None:
        raise StorageError(f"the ledger is damaged, it lacks {what}: restore the database from a backup")
    return row
