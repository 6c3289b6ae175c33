"""What is left of a device that was erased."""

from __future__ import annotations

import hashlib

import pytest

from fedtt.errors import StorageError
from fedtt.messages import Code, Receipt
from storage.records import UpdateState
from tests.unit.aggregator.test_coordinator import Server, code_of


def test_an_erased_device_leaves_no_key_and_no_update_behind() -> None:
    server = Server(cohort=2)
    device = server.device(1)
    lease = server.work(device).lease
    assert isinstance(server.upload(device, lease), Receipt)
    with server.store.transaction() as tx:
        assert server.coordinator.leave(tx, device, erase=True) is None
        row, update = tx.device(device), tx.update(lease)
        assert update is not None
        with pytest.raises(StorageError, match="holds no payload"):
            tx.payloads([update])
    assert row is not None
    assert (row.public_key, row.client) == (b"", "")
    assert update.state is UpdateState.DISCARDED
    assert code_of(server.check_in(device)) is Code.UNKNOWN_DEVICE


def test_an_erased_device_leaves_no_count_and_no_loss_behind_whether_folded_before_or_after() -> None:
    server = Server(cohort=1)
    device = server.device(1)
    leases = []
    for _ in range(2):
        leases.append(server.work(device).lease)
        server.upload(device, leases[-1])
        if len(leases) == 1:
            server.fold()
    with server.store.transaction() as tx:
        server.coordinator.lifecycle.advance(tx, 0.0)  # claims the second
        server.coordinator.leave(tx, device, erase=True)
        kept = tx.update(leases[1])
        assert kept is not None
        assert (kept.state, kept.examples) == (UpdateState.ACCEPTED, 1)
    server.fold()
    with server.store.reading() as tx:
        for number, lease in enumerate(leases, 1):
            update = tx.update(lease)
            assert update is not None
            assert (update.examples, update.loss_first, update.loss_last) == (0, 0.0, 0.0)
            assert (update.folded_into, update.digest) == (number, hashlib.sha256(b"frame").hexdigest())
