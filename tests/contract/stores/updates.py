"""What every store promises about leases and the ledger of updates."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from msgspec.structs import replace

from fedtt.errors import StorageError
from storage.memory import MemoryStore
from storage.records import (
    MAIN,
    DeviceState,
    LeaseState,
    RoundState,
    UpdateState,
)
from storage.store import Store
from tests.contract.stores.opened import OpenedStore
from tests.support import ledger

ACCEPTED, FOLDED, DISCARDED = UpdateState.ACCEPTED, UpdateState.FOLDED, UpdateState.DISCARDED


class LedgerContract(OpenedStore):
    """Leases and updates."""

    # leases

    def test_the_newest_lease_of_a_device_in_a_round_is_found(self, store: Store) -> None:
        alice = ledger.device("alice").id
        with store.transaction() as tx:
            tx.put_lease(ledger.lease("z"))
            tx.put_lease(ledger.lease("a"))
            tx.put_lease(ledger.lease("bob's", device_id=ledger.device("bob").id))
            tx.put_lease(ledger.lease("z", state=LeaseState.FAILED))  # as old as before
        with store.reading() as tx:
            assert tx.lease_of(alice, 1, MAIN, 1) == ledger.lease("a")
            assert tx.lease_of(alice, 1, MAIN, 2) is None
            assert tx.lease(ledger.lease("z").id) == ledger.lease("z", state=LeaseState.FAILED)

    def test_leases_of_a_round_are_counted_by_state(self, store: Store) -> None:
        with store.transaction() as tx:
            tx.put_round(ledger.round_(2, state=RoundState.FOLDING))
            for name in "abc":
                tx.put_lease(ledger.lease(name))
            tx.put_lease(ledger.lease("c", state=LeaseState.FAILED))
            tx.put_lease(ledger.lease("d", round_number=2))
        with store.reading() as tx:
            assert tx.count_leases(1, MAIN, 1) == {LeaseState.ACTIVE: 2, LeaseState.FAILED: 1}
            assert tx.count_leases(1, MAIN, 2) == {LeaseState.ACTIVE: 1}
            assert sum(tx.count_leases(1, "other", 1).values()) == 0

    def test_the_leases_of_a_device_are_found_by_state(self, store: Store) -> None:
        alice, bob = ledger.device("alice").id, ledger.device("bob").id
        with store.transaction() as tx:
            for name in "ab":
                tx.put_lease(ledger.lease(name))
            tx.put_lease(ledger.lease("c", device_id=bob))
            tx.put_lease(ledger.lease("d", state=LeaseState.EXPIRED))
        with store.reading() as tx:
            assert tx.leases_of(alice, LeaseState.ACTIVE) == [ledger.lease("a"), ledger.lease("b")]
            assert [lease.id for lease in tx.leases_of(bob, LeaseState.ACTIVE)] == [ledger.lease("c").id]
            assert tx.leases_of(bob, LeaseState.EXPIRED) == []

    def test_active_leases_expire_when_their_time_is_over(self, store: Store) -> None:
        with store.transaction() as tx:
            tx.put_lease(ledger.lease("a", expires_at=900.0))
            tx.put_lease(ledger.lease("b", expires_at=901.0))
            tx.put_lease(ledger.lease("c", expires_at=900.0, state=LeaseState.UPLOADED))
            assert tx.expire_leases(899.0) == 0
            assert tx.expire_leases(900.0) == 1
            assert tx.expire_leases(900.0) == 0
        with store.reading() as tx:
            states = [lease.state for name in "abc" if (lease := tx.lease(ledger.lease(name).id))]
        assert states == [LeaseState.EXPIRED, LeaseState.ACTIVE, LeaseState.UPLOADED]

    # the ledger

    def test_updates_get_sequences_in_order_and_come_back_whole(self, store: Store) -> None:
        payload = bytes(range(256)) * 100
        with store.transaction() as tx:
            first = ledger.upload(tx, "z", payload=payload)
            second = ledger.upload(tx, "a")
        assert 0 < first.sequence < second.sequence
        assert first == ledger.update("z", sequence=first.sequence)
        with store.reading() as tx:
            assert tx.update(first.lease_id) == first
            assert list(tx.updates(1, MAIN, 1, ACCEPTED)) == [first, second]
            assert tx.payloads([second, first]) == [b"payload of a", payload]
            assert tx.payloads([]) == []

    @pytest.mark.parametrize("together", [False, True])
    def test_an_update_without_a_payload_is_refused_and_the_transaction_goes_on(
        self, together: bool, store: Store
    ) -> None:
        lease = ledger.lease().id
        with store.transaction() as tx:
            refused = pytest.raises(StorageError, match=f"the update under lease {lease} has no payload")
            with tx.together([lease]) if together else nullcontext(), refused:
                ledger.upload(tx, payload=b"")
        with store.reading() as tx:
            assert tx.update(lease) is None

    @pytest.mark.parametrize("together", [False, True])
    def test_payloads_are_read_also_before_they_are_written(self, together: bool, store: Store) -> None:
        leases = [ledger.lease(name).id for name in "ab"]
        with store.transaction() as tx, tx.together(leases) if together else nullcontext():
            assert tx.payloads([ledger.upload(tx, name) for name in "ab"]) == [
                b"payload of a",
                b"payload of b",
            ]

    def test_wiping_takes_the_payloads_of_settled_updates_a_few_at_a_time(self, store: Store) -> None:
        names = [str(i) for i in range(300)]
        with store.transaction() as tx:
            updates = [ledger.upload(tx, name) for name in names]
            tx.settle([update.lease_id for update in updates[::2]], DISCARDED, reason="test")
        is_sql = not isinstance(store, MemoryStore)
        assert store.wipe() is is_sql  # 150 are more than it takes at once
        assert store.maintain() is not is_sql
        assert not store.wipe()
        assert store.maintain()
        with store.reading() as tx:
            assert tx.payloads(updates[1::2]) == [f"payload of {name}".encode() for name in names[1::2]]
            for settled in updates[::2]:
                with pytest.raises(StorageError, match=f"update {settled.sequence} holds no payload"):
                    tx.payloads([settled])

    def test_a_second_update_under_a_lease_is_refused_and_the_transaction_goes_on(self, store: Store) -> None:
        with store.transaction() as tx:
            first = ledger.upload(tx, "a")
            with pytest.raises(StorageError, match=f"lease {first.lease_id} has an update already"):
                tx.add_update(ledger.update("a"), b"other bytes")
            second = ledger.upload(tx, "b")
        with store.reading() as tx:
            assert list(tx.updates(1, MAIN, 1, ACCEPTED)) == [first, second]
            assert tx.payloads([first, second]) == [b"payload of a", b"payload of b"]

    def test_updates_are_found_by_round_and_by_device(self, store: Store) -> None:
        bob = ledger.device("bob").id
        with store.transaction() as tx:
            tx.put_round(ledger.round_(2, state=RoundState.FOLDING))
            ledger.upload(tx, "a")
            ledger.upload(tx, "b", device_id=bob)
            ledger.upload(tx, "c", device_id=bob, round_number=2)
            tx.settle([ledger.lease("a").id], DISCARDED, reason="test")
        with store.reading() as tx:
            assert [u.lease_id for u in tx.updates(1, MAIN, 1, ACCEPTED)] == [ledger.lease("b").id]
            assert [u.lease_id for u in tx.updates(1, MAIN, 1, DISCARDED)] == [ledger.lease("a").id]
            assert tx.count_updates(1, MAIN, 1, ACCEPTED) == 1
            assert tx.count_updates(1, MAIN, 1, FOLDED) == 0
            assert tx.count_updates(1, MAIN, 2, ACCEPTED) == 1
            of_bob = [u.lease_id for u in tx.updates_of(bob, ACCEPTED)]
            assert of_bob == [ledger.lease("b").id, ledger.lease("c").id]
            assert tx.updates_of(bob, FOLDED) == []

    def test_many_updates_come_in_ledger_order_also_while_they_are_settled(self, store: Store) -> None:
        names = [str(i) for i in range(150)]
        with store.transaction() as tx:
            for name in names:
                ledger.upload(tx, name)
            seen = []
            for update in tx.updates(1, MAIN, 1, ACCEPTED):
                tx.settle([update.lease_id], DISCARDED, reason="seen")
                seen.append(update.lease_id)
            assert tx.count_updates(1, MAIN, 1, DISCARDED) == 150
        assert seen == [ledger.lease(name).id for name in names]

    def test_settling_moves_accepted_updates_once(self, store: Store) -> None:
        with store.transaction() as tx:
            a, b, c = (ledger.upload(tx, name) for name in "abc")
            tx.add_version(ledger.version(1))
            assert tx.settle([a.lease_id, a.lease_id, b.lease_id], FOLDED, folded_into=1) == 2
            assert tx.settle([b.lease_id, c.lease_id, "0" * 32], DISCARDED, reason="too late") == 1
            assert tx.settle([], DISCARDED, reason="none") == 0
        with store.reading() as tx:
            assert tx.update(a.lease_id) == replace(a, state=FOLDED, folded_into=1)
            assert tx.update(b.lease_id) == replace(b, state=FOLDED, folded_into=1)
            assert tx.update(c.lease_id) == replace(c, state=DISCARDED, reason="too late")

    def test_a_transaction_counts_the_updates_it_moves_and_no_others(self, store: Store) -> None:
        with store.transaction() as tx:
            names = [ledger.upload(tx, name).lease_id for name in "abc"]
            with pytest.raises(StorageError):
                ledger.upload(tx, "a")
            assert tx.moved == {ACCEPTED: 3}
            tx.settle([*names[:2], names[0], "0" * 32], FOLDED, folded_into=0)
            assert tx.moved == {ACCEPTED: 3, FOLDED: 2}
        with store.transaction() as tx:
            tx.settle(names, DISCARDED, reason="too late")
            assert tx.moved == {DISCARDED: 1}

    def test_what_is_settled_of_a_device_is_forgotten_and_the_rest_counts_on(self, store: Store) -> None:
        with store.transaction() as tx:
            settled, waiting = (ledger.upload(tx, name) for name in "ab")
            bobs = ledger.upload(tx, "c", device_id=ledger.device("bob").id)
            tx.settle([settled.lease_id, bobs.lease_id], FOLDED, folded_into=0)
            assert tx.forget_settled(ledger.device("alice").id) == 1
        with store.reading() as tx:
            ended = {"state": FOLDED, "folded_into": 0}
            nothing = {"examples": 0, "loss_first": 0.0, "loss_last": 0.0}
            assert tx.update(settled.lease_id) == replace(settled, **ended, **nothing)
            assert tx.update(waiting.lease_id) == waiting
            assert tx.update(bobs.lease_id) == replace(bobs, **ended)

    def test_an_update_of_an_erased_device_is_forgotten_when_it_is_settled(self, store: Store) -> None:
        with store.transaction() as tx:
            claimed = ledger.upload(tx, "a")
            tx.put_device(ledger.device("alice", state=DeviceState.ERASED, public_key=b""))
            assert tx.update(claimed.lease_id) == claimed
            tx.settle([claimed.lease_id], FOLDED, folded_into=0)
        with store.reading() as tx:
            found = tx.update(claimed.lease_id)
        assert found is not None
        assert (found.examples, found.loss_first, found.loss_last) == (0, 0.0, 0.0)
        assert (found.digest, found.folded_into) == (claimed.digest, 0)

    def test_maintenance_after_a_fold_loses_nothing(self, store: Store) -> None:
        with store.transaction() as tx:
            a, b = (ledger.upload(tx, name) for name in "ab")
            tx.settle([a.lease_id], FOLDED, folded_into=0)
        assert not store.wipe()
        assert store.maintain()
        with store.reading() as tx:
            assert list(tx.updates(1, MAIN, 1, ACCEPTED)) == [b]
            assert tx.payloads([b]) == [b"payload of b"]
