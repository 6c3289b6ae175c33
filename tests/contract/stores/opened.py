"""A store with one open round, for the classes of its contract."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.store import Store
from tests.support import ledger

__all__ = ["OpenedStore"]


class OpenedStore:
    """Each store's own test class makes the store."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _open_round(self, store: Store) -> None:
        with store.transaction() as tx:
            ledger.open_round(tx)
