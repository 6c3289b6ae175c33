"""Each store keeps the whole contract; its parts lie in `tests/contract/stores`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.memory import MemoryStore
from storage.sql import SqlStore
from storage.store import Store
from tests.contract.stores.devices import DeviceContract
from tests.contract.stores.tasks import TaskContract
from tests.contract.stores.transactions import TransactionContract
from tests.contract.stores.updates import LedgerContract
from tests.support.postgresql import empty_store, needs_postgresql


class StoreContract(DeviceContract, TaskContract, LedgerContract, TransactionContract):
    """Tests of `storage.store.Store`; a subclass makes the store."""


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> Iterator[Store]:
        store = MemoryStore()
        yield store
        store.close()


class TestSqliteStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = SqlStore.open(tmp_path / "ledger.db")
        yield store
        store.close()


@needs_postgresql
class TestPostgresqlStore(StoreContract):
    @pytest.fixture
    def store(self) -> Iterator[Store]:
        store = empty_store()
        yield store
        store.close()
