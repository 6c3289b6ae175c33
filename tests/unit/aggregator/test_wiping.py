"""What is settled leaves the disk at the next tick, whatever settled it and whoever reads meanwhile."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import pytest
import pytest_asyncio

from aggregator.service import Service
from fedtt.task import RoundSpec, TaskSpec
from storage.blobs import MemoryBlobs
from storage.records import TaskState, UpdateState
from storage.sql import SqlStore
from storage.store import Transaction
from tests.support import ledger
from tests.support.clock import VirtualClock
from tests.support.tiny import add_task

SECRET = os.urandom(5000)
ALICE = ledger.device("alice").id
SPEC = TaskSpec(name="t", rounds=RoundSpec(count=9, cohort=9, quorum=2, deadline_s=60.0, give_up_after=1))


@pytest_asyncio.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    """A server that holds one acknowledged update of Alice, SECRET."""
    store = SqlStore.open(tmp_path / "ledger.db")
    service = Service(store, MemoryBlobs(), VirtualClock(start=1000.0))
    with store.transaction() as tx:
        tx.put_device(ledger.device("alice"))
        task = add_task(tx, SPEC)
        tx.put_round(ledger.round_(opened_at=999.0, deadline_at=1060.0))
        assert task.id == 1
    with store.transaction() as tx:
        ledger.upload(tx, payload=SECRET)
    service.writer.start()
    await service.tick()
    yield service
    await service.writer.stop()
    store.close()


def lies_in(directory: Path) -> bool:
    return any(SECRET[2000:2032] in path.read_bytes() for path in directory.iterdir())


def leave(service: Service, tx: Transaction) -> None:
    service.coordinator.leave(tx, ALICE, erase=False)


def erase(service: Service, tx: Transaction) -> None:
    service.coordinator.leave(tx, ALICE, erase=True)


def stop(service: Service, tx: Transaction) -> None:
    service.lifecycle.stop(tx, 1000.0, "t", "test")


def fold(service: Service, tx: Transaction) -> None:
    """What publishing does to an update."""
    tx.settle([ledger.lease().id], UpdateState.FOLDED, folded_into=0)


def give_up(service: Service, tx: Transaction) -> None:
    """The deadline passes with one update where two are needed."""
    service.lifecycle.advance(tx, 1061.0)
    assert tx.tasks()[0].state is TaskState.PAUSED


@pytest.mark.parametrize("settle", [fold, leave, erase, stop, give_up])
async def test_a_settled_update_is_in_no_file_after_the_next_tick(
    settle: Callable[[Service, Transaction], None], service: Service, tmp_path: Path
) -> None:
    assert lies_in(tmp_path)
    await service.write(lambda tx: settle(service, tx))
    await service.tick()
    assert not lies_in(tmp_path)


async def test_where_a_reader_is_in_the_way_a_later_tick_wipes(service: Service, tmp_path: Path) -> None:
    with service.store.reading() as reading:
        assert reading.device(ALICE)
        await service.write(lambda tx: leave(service, tx))
        await service.tick()
        assert lies_in(tmp_path)
    await service.tick()
    assert not lies_in(tmp_path)


async def test_other_commits_go_on_while_many_payloads_leave(service: Service, tmp_path: Path) -> None:
    def held() -> int:
        with closing(sqlite3.connect(tmp_path / "ledger.db")) as db:
            return int(db.execute("SELECT count(*) FROM payloads").fetchone()[0])

    with service.store.transaction() as tx:
        for number in range(1000):
            ledger.upload(tx, number, payload=SECRET)
    await service.write(lambda tx: stop(service, tx))
    wiping, left = asyncio.create_task(service.tick()), 1001
    while left == 1001:
        await service.write(lambda tx: tx.update(ledger.lease("1").id))
        left = held()
    assert left > 0, "commits waited for all of it"
    await wiping
    assert not lies_in(tmp_path)


async def test_what_a_server_has_settled_leaves_the_disk_as_it_stops(
    service: Service, tmp_path: Path
) -> None:
    await service.write(lambda tx: leave(service, tx))
    assert lies_in(tmp_path)
    await service.writer.stop()
    assert not lies_in(tmp_path)
