"""What every store promises about transactions: all or nothing, one after another."""

from __future__ import annotations

import threading

import pytest
from msgspec.structs import replace

from fedtt.errors import StorageError
from storage.records import (
    MAIN,
    RoundState,
    UpdateState,
)
from storage.store import Store
from tests.contract.stores.opened import OpenedStore
from tests.support import ledger

ACCEPTED, FOLDED = UpdateState.ACCEPTED, UpdateState.FOLDED


class TransactionContract(OpenedStore):
    """Undone, refused, isolated."""

    def test_after_an_error_nothing_of_the_transaction_remains(self, store: Store) -> None:
        with store.transaction() as tx:
            kept = ledger.upload(tx, "kept")

        def write_all_and_fail() -> None:
            with store.transaction() as tx:
                tx.put_token(ledger.token())
                tx.put_device(ledger.device("alice", examples=99))
                tx.put_device(ledger.device("carol"))
                tx.put_participation(ledger.participation())
                tx.add_task(ledger.task("other"))
                tx.add_version(ledger.version(1))
                tx.put_round(ledger.round_(1, state=RoundState.FOLDING))
                ledger.upload(tx, "lost")
                tx.settle([kept.lease_id], FOLDED, folded_into=1)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            write_all_and_fail()
        with store.reading() as tx:
            assert tx.token(ledger.sha256("secret")) is None
            assert tx.device(ledger.device("alice").id) == ledger.device("alice")
            assert tx.device(ledger.device("carol").id) is None
            assert tx.participation(1, ledger.device("alice").id) is None
            assert len(tx.tasks()) == 1
            assert tx.versions(1) == [ledger.version(0)]
            assert tx.rounds(1) == [ledger.round_(1)]
            assert tx.lease(ledger.lease("lost").id) is None
            assert list(tx.updates(1, MAIN, 1, ACCEPTED)) == [kept]

    def test_what_a_failed_transaction_took_is_given_again(self, store: Store) -> None:
        def upload_and_fail() -> None:
            with store.transaction() as tx:
                ledger.upload(tx, "a")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            upload_and_fail()
        with store.transaction() as tx:
            update = ledger.upload(tx, "a")
        with store.reading() as tx:
            assert list(tx.updates(1, MAIN, 1, ACCEPTED)) == [update]

    def test_writing_while_reading_is_an_error_and_leaves_nothing(self, store: Store) -> None:
        with pytest.raises(StorageError, match="reading transaction wrote"), store.reading() as tx:
            tx.put_token(ledger.token())
        with store.reading() as tx:
            assert tx.token(ledger.sha256("secret")) is None

    def test_a_reading_transaction_sees_one_state_whatever_is_written_meanwhile(self, store: Store) -> None:
        def write() -> None:
            with store.transaction() as tx:
                tx.put_device(ledger.device("alice", examples=8))
                tx.put_device(ledger.device("bob", examples=8))

        writer = threading.Thread(target=write)
        with store.reading() as tx:
            alice = tx.device(ledger.device("alice").id)
            writer.start()
            writer.join(0.1)  # a store may make the writer wait for the reader
            bob = tx.device(ledger.device("bob").id)
        writer.join()
        assert alice == ledger.device("alice")
        assert bob == ledger.device("bob")
        with store.reading() as tx:
            assert tx.device(ledger.device("bob").id) == ledger.device("bob", examples=8)

    def test_transactions_of_many_threads_happen_one_after_another(self, store: Store) -> None:
        def count_up() -> None:
            for _ in range(10):
                with store.transaction() as tx:
                    alice = tx.device(ledger.device("alice").id)
                    assert alice is not None
                    tx.put_device(replace(alice, examples=alice.examples + 1))

        threads = [threading.Thread(target=count_up) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with store.reading() as tx:  # 7 + 4·10 = 47
            assert tx.device(ledger.device("alice").id) == ledger.device("alice", examples=47)
