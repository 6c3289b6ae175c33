"""What every store promises about devices: who they are, what they did, and in which group."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
from msgspec.structs import replace

from fedtt.sampling import Candidate
from storage.records import (
    MAIN,
    DeviceState,
)
from storage.store import Store
from tests.contract.stores.opened import OpenedStore
from tests.support import ledger


class DeviceContract(OpenedStore):
    """Tokens, devices, participations and groups."""

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

    # participation

    @pytest.mark.parametrize("together", [False, True])
    def test_what_many_devices_did_is_as_each_was_last(self, together: bool, store: Store) -> None:
        names = [str(number) for number in range(20)]
        known = [ledger.participation(name, count=1) for name in names[:10]]
        last = [
            ledger.participation(
                name,
                last_loss=None if number % 3 else 0.5,
                duration_s=None if number % 3 else 1.5,
                label_counts=bytes([0, 255, number]) if number % 2 else None,
            )
            for number, name in enumerate(names)
        ]
        with store.transaction() as tx:
            for name in names:
                tx.put_device(ledger.device(name))
            for participation in known:
                tx.put_participation(participation)
        with store.transaction() as tx, tx.together([]) if together else nullcontext():
            for participation in [*known, *reversed(last[:5]), *last]:
                tx.put_participation(participation)
        with store.reading() as tx:
            assert [tx.participation(1, ledger.device(name).id) for name in names] == last

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
