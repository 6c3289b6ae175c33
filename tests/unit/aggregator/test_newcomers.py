"""Devices that come after the warm-up: with the slowest first and, once measured, where they fit."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fedtt.messages import Receipt, Work
from fedtt.work import work_share
from storage.memory import MemoryStore
from storage.sql import SqlStore
from storage.store import Store
from tests.support.groups import ADAPTER, GroupedServer, grouped_task
from tests.support.postgresql import empty_store, needs_postgresql

SPEEDS_S = (5.0, 40.0, 150.0)
DEVICES = 12
ROUNDS = {"count": 30, "cohort": 3, "deadline_s": 1e5, "lease_s": 1e5}
METHOD = {"groups": 3, "max_frequency": 2, "time_weight": 3.0}


class Fleet:
    """A third of its devices of each speed; all are always there, and each takes what it is given."""

    def __init__(self, store: Store, restarts: bool = False) -> None:
        self.server = GroupedServer(grouped_task(ROUNDS, METHOD), store, DEVICES)
        self.kind = {device: number % 3 for number, device in enumerate(self.server.devices)}
        self.restarts = restarts
        self._due: list[tuple[float, str, Work]] = []

    def until(self, version: int) -> None:
        while len(self.server.versions()) <= version:
            if self.restarts:
                self.server.restart()
            busy = {device for _, device, _ in self._due}
            for device in self.server.devices:
                if device not in busy and isinstance(answer := self.server.check_in(device), Work):
                    took_s = SPEEDS_S[self.kind[device]] * work_share(ADAPTER, answer.plan.live)
                    heapq.heappush(self._due, (self.server.now + took_s, device, answer))
            self.server.now, device, work = heapq.heappop(self._due)
            told = (9, 1) if self.server.devices.index(device) % 2 else (1, 9)
            assert isinstance(self.server.upload(device, work, 0.1, told), Receipt)
            self.server.tick()

    def where(self) -> dict[str, int]:
        with self.server.store.reading() as tx:
            return tx.members(self.server.task_id)

    def rounds_of(self) -> dict[str, int]:
        """Of each device measured so far, the last round it took part in."""
        with self.server.store.reading() as tx:
            return {part.device_id: part.last_round for part in tx.participants(self.server.task_id)}


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=needs_postgresql)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    store = empty_store() if request.param == "postgresql" else SqlStore.open(tmp_path / "ledger.db")
    with closing(store):
        yield store


def test_devices_that_come_after_the_warm_up_end_in_groups_of_their_own_speed() -> None:
    fleet = Fleet(MemoryStore())
    fleet.until(1)
    assert len(fleet.rounds_of()) == 3  # three quarters of the fleet are unknown when groups are formed
    meant, version = {device: 1 + kind for device, kind in fleet.kind.items()}, 1
    while fleet.where() != meant:
        version += 1
        fleet.until(version)
    assert len(fleet.rounds_of()) == DEVICES
    assert version < 25


def test_an_unknown_device_holds_up_no_group_but_the_slowest() -> None:
    fleet = Fleet(MemoryStore())
    fleet.until(3)
    known = fleet.rounds_of()
    assert len(known) < DEVICES - 2
    assert {fleet.where()[device] for device in fleet.kind.keys() - known.keys()} == {3}


def test_only_devices_that_took_part_since_the_last_version_change_their_group() -> None:
    fleet, moved = Fleet(MemoryStore()), 0
    fleet.until(1)
    for version in range(2, 6):
        before, rounds = fleet.where(), fleet.rounds_of()
        fleet.until(version)
        now, later = fleet.where(), fleet.rounds_of()
        moves = {device for device, group in before.items() if now[device] != group}
        assert all(later[device] > rounds.get(device, 0) for device in moves)
        moved += len(moves)
    assert moved


def test_members_are_the_same_on_every_database_and_whenever_the_server_starts_anew(database: Store) -> None:
    plain, restarted = Fleet(MemoryStore()), Fleet(database, restarts=True)
    for version in (1, 4):
        plain.until(version)
        restarted.until(version)
        assert restarted.where() == plain.where()
