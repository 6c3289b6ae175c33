"""What every store promises, in one class; each store inherits it whole."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from fedtt.errors import StorageError
from fedtt.messages import Judged, Verdict
from fedtt.sampling import Candidate
from storage.memory import MemoryStore
from storage.records import (
    MAIN,
    DeviceState,
    EvaluationState,
    LeaseState,
    RoundState,
    TaskState,
    UpdateState,
    VersionState,
)
from storage.sql import SqlStore
from storage.store import Store
from tests.support import ledger
from tests.support.postgresql import empty_store, needs_postgresql

ACCEPTED, FOLDED, DISCARDED = UpdateState.ACCEPTED, UpdateState.FOLDED, UpdateState.DISCARDED


class StoreContract:
    """Tests of `storage.store.Store`; a subclass makes the store."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _open_round(self, store: Store) -> None:
        with store.transaction() as tx:
            ledger.open_round(tx)

    # enrolment

    def test_what_was_never_put_reads_as_none(self, store: Store) -> None:
        with store.reading() as tx:
            assert tx.token(ledger.sha256("other")) is None
            assert tx.device(ledger.device("other").id) is None
            assert tx.bundle(ledger.sha256("other")) is None
            assert tx.task("other") is None
            assert tx.task_by_id(2) is None
            assert tx.version(1, MAIN, 1) is None
            assert tx.version(1, "other", 0) is None
            assert tx.latest_version(2, MAIN) is None
            assert tx.round(1, MAIN, 2) is None
            assert tx.latest_round(1, "other") is None
            assert tx.lease(ledger.lease("other").id) is None
            assert tx.lease_of(ledger.device("alice").id, 1, MAIN, 1) is None
            assert tx.update(ledger.lease("other").id) is None

    def test_a_token_put_again_replaces_the_first(self, store: Store) -> None:
        with store.transaction() as tx:
            tx.put_token(ledger.token(uses_left=None, expires_at=12.5))
            tx.put_token(ledger.token(uses_left=1))
        with store.reading() as tx:
            assert tx.token(ledger.sha256("secret")) == ledger.token(uses_left=1)

    def test_a_device_put_again_replaces_the_first_in_every_field(self, store: Store) -> None:
        before = ledger.device("carol")
        after = replace(
            before,
            public_key=b"",
            client="",
            runtimes=(),
            examples=0,
            memory_mb=512,
            enrolled_at=1.0,
            seen_at=2.0,
            state=DeviceState.ERASED,
        )
        with store.transaction() as tx:
            tx.put_device(before)
            assert tx.device(before.id) == before
            tx.put_device(after)
        with store.reading() as tx:
            assert tx.device(before.id) == after

    def test_devices_come_in_pages_by_id(self, store: Store) -> None:
        names = [str(i) for i in range(5)]
        with store.transaction() as tx:
            for name in names:
                tx.put_device(ledger.device(name))
            ids = sorted(ledger.device(name).id for name in (*names, "alice", "bob"))
            assert [d.id for d in tx.devices(limit=3)] == ids[:3]
            assert [d.id for d in tx.devices(after=ids[2], limit=3)] == ids[3:6]
            assert [d.id for d in tx.devices(after=ids[5])] == ids[6:]
            assert tx.devices(after=ids[6]) == []

    def test_active_devices_are_those_seen_lately_that_can_do_the_work(self, store: Store) -> None:
        with store.transaction() as tx:
            tx.put_device(ledger.device("exactly", seen_at=500.0, examples=9))
            tx.put_device(ledger.device("well", seen_at=600.0, examples=10))
            tx.put_device(ledger.device("too long ago", seen_at=499.0, examples=9))
            tx.put_device(ledger.device("too few", seen_at=500.0, examples=8))
            tx.put_device(ledger.device("gone", seen_at=500.0, examples=9, state=DeviceState.LEFT))
            tx.put_device(ledger.device("unable", seen_at=500.0, examples=9, runtimes=("executorch",)))
            tx.put_device(ledger.device("mute", seen_at=500.0, examples=9, runtimes=()))
            found = tx.active_devices(seen_since=500.0, min_examples=9, runtimes=("torch", "jax"))
            nobody = tx.active_devices(seen_since=500.0, min_examples=9, runtimes=())
        assert nobody == []
        assert found == sorted([ledger.device("exactly").id, ledger.device("well").id])

    def test_active_devices_that_said_they_have_too_little_memory_are_left_out(self, store: Store) -> None:
        with store.transaction() as tx:
            for name, memory_mb in {"silent": 0, "small": 255, "just": 256, "large": 512}.items():
                tx.put_device(ledger.device(name, seen_at=900.0, memory_mb=memory_mb))
            wanted: dict[str, Any] = {"seen_since": 900.0, "min_examples": 1, "runtimes": ("torch",)}
            found = tx.active_devices(**wanted, memory_mb=256)
            assert [c.device_id for c in tx.candidates(1, **wanted, memory_mb=256)] == found
        assert found == sorted(ledger.device(name).id for name in ("silent", "just", "large"))

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

    # participation

    def test_what_a_device_did_for_a_task_is_kept_apart_from_others(self, store: Store) -> None:
        alice, bob = ledger.device("alice").id, ledger.device("bob").id
        first, second = ledger.participation(), ledger.participation(task_id=2, count=1)
        with store.transaction() as tx:
            tx.add_task(ledger.task("other"))
            tx.put_participation(ledger.participation(count=9, last_round=9, last_loss=9.0, duration_s=9.0))
            tx.put_participation(first)
            tx.put_participation(second)
        with store.reading() as tx:
            assert (tx.participation(1, alice), tx.participation(2, alice)) == (first, second)
            assert tx.participation(1, bob) is None
            assert tx.participation(3, alice) is None

    def test_candidates_are_the_active_devices_with_what_they_did_for_the_task(self, store: Store) -> None:
        with store.transaction() as tx:
            tx.add_task(ledger.task("other"))
            tx.put_device(ledger.device("carol", seen_at=100.0))
            tx.put_device(ledger.device("bob", memory_mb=256, examples=9))
            tx.put_participation(ledger.participation())
            tx.put_participation(ledger.participation("bob", task_id=2))
            tx.put_participation(ledger.participation("carol"))
        with store.reading() as tx:
            wanted: dict[str, Any] = {"seen_since": 200.0, "min_examples": 7, "runtimes": ("torch",)}
            found = tx.candidates(1, **wanted)
            assert [c.device_id for c in found] == tx.active_devices(**wanted)
        alice = Candidate(
            device_id=ledger.device("alice").id,
            examples=7,
            count=3,
            last_round=2,
            last_loss=1.25,
            duration_s=12.5,
        )
        bob = Candidate(device_id=ledger.device("bob").id, examples=9, memory_mb=256)
        assert found == sorted([alice, bob], key=lambda c: c.device_id)

    def test_what_was_measured_of_a_device_is_forgotten_in_every_task_and_its_counts_stay(
        self, store: Store
    ) -> None:
        alice = ledger.device("alice").id
        with store.transaction() as tx:
            tx.add_task(ledger.task("other"))
            for task_id in (1, 2):
                tx.put_participation(ledger.participation(task_id=task_id))
            tx.put_participation(ledger.participation("bob"))
            assert tx.forget_participations(alice) == 2
            assert tx.forget_participations(ledger.device("carol").id) == 0
        with store.reading() as tx:
            for task_id in (1, 2):
                kept = ledger.participation(task_id=task_id, last_loss=None, duration_s=None)
                assert tx.participation(task_id, alice) == kept
            assert tx.participation(1, ledger.device("bob").id) == ledger.participation("bob")

    # groups

    def test_a_device_is_in_one_group_of_each_task(self, store: Store) -> None:
        alice, bob = ledger.device("alice").id, ledger.device("bob").id
        with store.transaction() as tx:
            tx.add_task(ledger.task("other"))
            tx.put_members(1, {alice: 1, bob: 2})
            tx.put_members(2, {alice: 2})
            tx.put_members(1, {alice: 3})
            tx.put_members(1, {})
        with store.reading() as tx:
            assert (tx.group_of(1, alice), tx.group_of(1, bob)) == (3, 2)
            assert (tx.group_of(2, alice), tx.group_of(2, bob)) == (2, None)
            assert list(tx.members(1).items()) == sorted({alice: 3, bob: 2}.items())
            assert tx.members(3) == {}

    def test_members_are_active_and_seen_and_those_of_a_group_can_be_asked_for(self, store: Store) -> None:
        names = ("alice", "bob", "carol", "dave")
        ids = {name: ledger.device(name).id for name in names}
        with store.transaction() as tx:
            tx.put_device(ledger.device("carol", seen_at=100.0))
            tx.put_device(ledger.device("dave"))
            tx.put_members(1, {ids[name]: 1 + (name == "dave") for name in names})
            tx.put_participation(ledger.participation("bob"))
            tx.put_device(ledger.device("alice", state=DeviceState.LEFT))
        with store.reading() as tx:
            wanted: dict[str, Any] = {"seen_since": 200.0, "min_examples": 7, "runtimes": ("torch",)}
            assert tx.members(1, seen_since=200.5) == {ids["bob"]: 1, ids["dave"]: 2}
            assert set(tx.members(1)) == {ids["bob"], ids["carol"], ids["dave"]}
            assert tx.active_devices(**wanted, member_of=(1, 1)) == [ids["bob"]]
            assert tx.active_devices(**wanted, member_of=(1, 3)) == []
            assert tx.active_devices(**wanted, member_of=(2, 1)) == []
            (bob,) = tx.candidates(1, **wanted, group=1)
            assert (bob.device_id, bob.last_loss) == (ids["bob"], 1.25)
            assert tx.candidates(1, **wanted, group=2)[0].device_id == ids["dave"]

    def test_participants_are_the_active_devices_that_took_part(self, store: Store) -> None:
        told = ledger.participation("bob", work=0.5, label_counts=bytes(range(6)))
        with store.transaction() as tx:
            tx.add_task(ledger.task("other"))
            tx.put_device(ledger.device("carol", state=DeviceState.LEFT))
            for part in (ledger.participation(), told, ledger.participation("carol")):
                tx.put_participation(part)
        with store.reading() as tx:
            expected = sorted([ledger.participation(), told], key=lambda part: part.device_id)
            assert tx.participants(1) == expected
            assert tx.participants(2) == []

    def test_what_a_device_told_of_its_labels_and_its_groups_are_forgotten_with_it(
        self, store: Store
    ) -> None:
        alice, bob = ledger.device("alice").id, ledger.device("bob").id
        with store.transaction() as tx:
            for name in ("alice", "bob"):
                tx.put_participation(ledger.participation(name, label_counts=b"1234"))
            tx.put_members(1, {alice: 1, bob: 1})
            tx.forget_participations(alice)
        with store.reading() as tx:
            parts = [tx.participation(1, device) for device in (alice, bob)]
            assert [part.label_counts for part in parts if part] == [None, b"1234"]
            assert (tx.group_of(1, alice), tx.group_of(1, bob)) == (None, 1)
            assert tx.members(1) == {bob: 1}

    def test_a_task_keeps_its_groups(self, store: Store) -> None:
        group = ledger.group(2, ended=1)
        with store.transaction() as tx:
            task = tx.add_task(ledger.task("other"))
            assert task.groups == ()
            tx.put_task(replace(task, groups=(ledger.group(1), group)))
        with store.reading() as tx:
            found = tx.task("other")
        assert found is not None
        assert found.groups == (ledger.group(1), group)
        assert [g.branch for g in found.groups] == ["group-1", "group-2"]

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
            tx.add_update(ledger.update("a", rank=3))
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
        assert first == ledger.update("z", payload=payload, sequence=first.sequence)
        with store.reading() as tx:
            assert tx.update(first.lease_id) == first
            assert list(tx.updates(1, MAIN, 1, ACCEPTED)) == [first, second]

    def test_a_second_update_under_a_lease_is_refused_and_the_transaction_goes_on(self, store: Store) -> None:
        with store.transaction() as tx:
            first = ledger.upload(tx, "a")
            with pytest.raises(StorageError, match=f"lease {first.lease_id} has an update already"):
                tx.add_update(ledger.update("a", payload=b"other bytes"))
            second = ledger.upload(tx, "b")
        with store.reading() as tx:
            assert list(tx.updates(1, MAIN, 1, ACCEPTED)) == [first, second]

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

    def test_settling_moves_accepted_updates_once_and_empties_their_payloads(self, store: Store) -> None:
        with store.transaction() as tx:
            a, b, c = (ledger.upload(tx, name) for name in "abc")
            tx.add_version(ledger.version(1))
            assert tx.settle([a.lease_id, a.lease_id, b.lease_id], FOLDED, folded_into=1) == 2
            assert tx.settle([b.lease_id, c.lease_id, "0" * 32], DISCARDED, reason="too late") == 1
            assert tx.settle([], DISCARDED, reason="none") == 0
        with store.reading() as tx:
            assert tx.update(a.lease_id) == replace(a, state=FOLDED, payload=b"", folded_into=1)
            assert tx.update(b.lease_id) == replace(b, state=FOLDED, payload=b"", folded_into=1)
            assert tx.update(c.lease_id) == replace(c, state=DISCARDED, payload=b"", reason="too late")

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
            ended = {"state": FOLDED, "payload": b"", "folded_into": 0}
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
        assert store.maintain()
        with store.reading() as tx:
            assert list(tx.updates(1, MAIN, 1, ACCEPTED)) == [b]

    # transactions

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
