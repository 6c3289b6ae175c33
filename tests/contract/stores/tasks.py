"""What every store promises about tasks, their versions, rounds and verdicts."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from fedtt.errors import StorageError
from fedtt.messages import Judged, Verdict
from storage.records import (
    MAIN,
    DeviceState,
    EvaluationState,
    LeaseState,
    RoundState,
    TaskState,
    VersionState,
)
from storage.store import Store
from tests.contract.stores.opened import OpenedStore
from tests.support import ledger


class TaskContract(OpenedStore):
    """Bundles, tasks, versions, rounds and evaluations."""

    # bundles and tasks

    def test_devices_are_counted_by_state_among_those_seen_since(self, store: Store) -> None:
        with store.transaction() as tx:  # alice and bob are active, seen at 200.5
            tx.put_device(ledger.device("carol", seen_at=100.0))
            tx.put_device(ledger.device("dave", seen_at=300.0, state=DeviceState.LEFT))
        with store.reading() as tx:
            assert dict(tx.count_devices()) == {DeviceState.ACTIVE: 3, DeviceState.LEFT: 1}
            assert dict(tx.count_devices(seen_since=200.5)) == {DeviceState.ACTIVE: 2, DeviceState.LEFT: 1}
            assert dict(tx.count_devices(seen_since=300.25)) == {}

    def test_a_bundle_keeps_its_manifest_byte_for_byte(self, store: Store) -> None:
        bundle = ledger.bundle("other", manifest=bytes(range(256)))
        with store.transaction() as tx:
            tx.put_bundle(bundle)
            tx.put_bundle(bundle)
        with store.reading() as tx:
            assert tx.bundle(bundle.sha256) == bundle

    def test_tasks_get_ids_in_order_of_creation(self, store: Store) -> None:
        with store.transaction() as tx:
            second = tx.add_task(ledger.task("a-second"))
        with store.reading() as tx:
            assert [(t.id, t.spec.name) for t in tx.tasks()] == [(1, "intents"), (2, "a-second")]
            assert tx.task("a-second") == tx.task_by_id(2) == second

    def test_a_second_task_of_a_name_is_refused_and_the_transaction_goes_on(self, store: Store) -> None:
        with store.transaction() as tx:
            with pytest.raises(StorageError, match="a task named 'intents' exists already"):
                tx.add_task(ledger.task())
            assert tx.add_task(ledger.task("other")).id == 2
        with store.reading() as tx:
            assert [t.id for t in tx.tasks()] == [1, 2]

    def test_a_task_put_again_replaces_the_first(self, store: Store) -> None:
        with store.transaction() as tx:
            paused = replace(tx.tasks()[0], state=TaskState.PAUSED, reason="too few devices")
            tx.put_task(paused)
        with store.reading() as tx:
            assert tx.tasks() == [paused]

    # versions and rounds

    def test_versions_are_listed_by_branch_and_number(self, store: Store) -> None:
        with store.transaction() as tx:
            tx.put_round(ledger.round_(2, state=RoundState.FOLDING))
            tx.add_version(ledger.version(2))
            tx.add_version(ledger.version(1))
            tx.add_version(ledger.version(0, branch="group-1", parents=tuple(ledger.sha256(n) for n in "ab")))
        with store.reading() as tx:
            listed = [(v.branch, v.number) for v in tx.versions(1)]
            assert listed == [("group-1", 0), (MAIN, 0), (MAIN, 1), (MAIN, 2)]
            assert tx.version(1, MAIN, 1) == ledger.version(1)
            assert tx.latest_version(1, MAIN) == ledger.version(2)
            latest = tx.latest_version(1, "group-1")
            assert latest is not None
            assert latest == ledger.version(
                0, branch="group-1", parents=tuple(ledger.sha256(n) for n in "ab")
            )
            assert tx.versions(2) == []

    def test_a_second_version_of_a_number_is_refused_and_the_transaction_goes_on(self, store: Store) -> None:
        with store.transaction() as tx:
            with pytest.raises(StorageError, match="version 0 of branch 'main' exists already"):
                tx.add_version(ledger.version(0, sha256=ledger.sha256("another")))
            tx.add_version(ledger.version(1))
        with store.reading() as tx:
            assert tx.versions(1) == [ledger.version(0), ledger.version(1)]

    def test_what_a_fold_leaves_and_measures_comes_back_with_its_version(self, store: Store) -> None:
        version = ledger.version(
            1, server_state=ledger.sha256("state"), report={"error_share": 0.125, "lost_bytes": 3.0}
        )
        with store.transaction() as tx:
            tx.add_version(version)
        with store.reading() as tx:
            assert tx.version(1, MAIN, 1) == version

    def test_leases_and_updates_carry_the_rank_they_are_of(self, store: Store) -> None:
        with store.transaction() as tx:
            tx.put_lease(ledger.lease("a", rank=3, state=LeaseState.UPLOADED))
            tx.add_update(ledger.update("a", rank=3), b"coded")
            plain = ledger.upload(tx, "b")
        with store.reading() as tx:
            lease, update = tx.lease(ledger.lease("a").id), tx.update(ledger.lease("a").id)
            assert lease is not None
            assert update is not None
            assert (lease.rank, update.rank, plain.rank) == (3, 3, None)

    def test_a_version_is_known_by_its_hash(self, store: Store) -> None:
        with store.reading() as tx:
            assert tx.has_version(ledger.sha256("version 0"))
            assert not tx.has_version(ledger.sha256("version 1"))

    def test_rounds_are_listed_newest_first(self, store: Store) -> None:
        with store.transaction() as tx:
            for number in (2, 3):
                tx.put_round(ledger.round_(number, state=RoundState.FOLDING))
        with store.reading() as tx:
            assert [r.number for r in tx.rounds(1)] == [3, 2, 1]
            assert [r.number for r in tx.rounds(1, limit=2)] == [3, 2]
            assert tx.rounds(2) == []
            assert tx.latest_round(1, MAIN) == ledger.round_(3, state=RoundState.FOLDING)
            assert tx.round(1, MAIN, 1) == ledger.round_(1)

    def test_rounds_of_a_task_are_counted_by_state_over_all_its_branches(self, store: Store) -> None:
        with store.transaction() as tx:
            tx.add_task(ledger.task("other"))
            tx.add_version(ledger.version(0, task_id=2))
            tx.add_version(ledger.version(0, branch="group-1"))
            ended = {"state": RoundState.FOLDED, "closed_at": 999.0}
            tx.put_round(ledger.round_(2, **ended))
            tx.put_round(ledger.round_(1, branch="group-1", **ended))
            tx.put_round(ledger.round_(1, task_id=2))
        with store.reading() as tx:
            assert dict(tx.count_rounds(1)) == {RoundState.OPEN: 1, RoundState.FOLDED: 2}
            assert dict(tx.count_rounds(2)) == {RoundState.OPEN: 1}
            assert dict(tx.count_rounds(3)) == {}

    def test_a_round_put_again_replaces_the_first_in_every_field(self, store: Store) -> None:
        after = ledger.round_(
            live=(1,),
            invited=(),
            state=RoundState.ABANDONED,
            opened_at=301.0,
            deadline_at=400.0,
            closed_at=401.0,
            reason="no one came",
        )
        with store.transaction() as tx:
            tx.put_round(after)
        with store.reading() as tx:
            assert tx.rounds(1) == [after]

    # verdicts

    def test_a_version_is_judged_by_each_device_once_and_read_in_order_of_the_devices(
        self, store: Store
    ) -> None:
        verdict = Verdict(examples=9, before=Judged(loss=1.5, right=3), after=Judged(loss=0.5, right=9))
        with store.transaction() as tx:
            for name in ("bob", "carol"):
                tx.put_device(ledger.device(name))
                tx.put_evaluation(ledger.evaluation(name))
            done = ledger.evaluation("bob", state=EvaluationState.DONE, verdict=verdict)
            tx.put_evaluation(done)
        with store.reading() as tx:
            found = tx.evaluations(1, MAIN, 0)
            assert {e.device_id for e in found} == {ledger.device(name).id for name in ("bob", "carol")}
            assert [e.device_id for e in found] == sorted(e.device_id for e in found)
            assert tx.evaluation(done.lease_id) == done
            assert tx.evaluation("0" * 32) is None
            assert tx.evaluations(1, MAIN, 1) == []
        with pytest.raises(StorageError), store.transaction() as tx:
            tx.put_evaluation(ledger.evaluation("bob", lease_id="0" * 32))
        with store.transaction() as tx:
            tx.forget_evaluations(done.device_id)
        with store.reading() as tx:
            assert tx.evaluation(done.lease_id) == replace(done, verdict=None)

    def test_a_version_is_replaced_with_its_state_and_stays_the_newest(self, store: Store) -> None:
        with store.transaction() as tx:
            held = ledger.version(state=VersionState.HELD, reason="worse", report={"judged_loss": 2.5})
            tx.put_version(held)
        with store.reading() as tx:
            assert tx.version(1, MAIN, 0) == tx.latest_version(1, MAIN) == held
