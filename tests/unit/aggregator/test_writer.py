"""Group commit: many changes in one transaction, each with its own outcome."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from aggregator.service import Service
from aggregator.writer import QueueFullError, Writer
from fedtt.errors import StorageError
from fedtt.messages import Code, Problem, UpdateState
from fedtt.seams import SystemClock
from storage.blobs import MemoryBlobs
from storage.memory import MemoryStore
from storage.records import Token
from storage.store import Transaction
from tests.support import ledger
from tests.support.ledger import sha256, token


class Counting(MemoryStore):
    """A store that counts its transactions and holds them up while `gate` is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.transactions = 0
        self.gate = threading.Event()
        self.gate.set()

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        self.gate.wait(10)
        self.transactions += 1
        with super().transaction() as tx:
            yield tx

    def known(self, name: object) -> Token | None:
        with self.reading() as tx:
            return tx.token(sha256(name))


def put(name: object) -> Callable[[Transaction], object]:
    def change(tx: Transaction) -> object:
        tx.put_token(token(name))
        return name

    return change


async def test_changes_that_wait_together_share_one_transaction_and_keep_their_order() -> None:
    store = Counting()
    writer = Writer(store)
    store.gate.clear()
    writer.start()
    first = asyncio.create_task(writer.run(put("first")))
    await asyncio.sleep(0.05)  # it is being committed, the others wait
    others = [asyncio.create_task(writer.run(put(n))) for n in range(100)]
    await asyncio.sleep(0)
    store.gate.set()
    assert await asyncio.gather(first, *others) == ["first", *range(100)]
    await writer.stop()
    assert store.transactions == 2  # one for the first, one for the hundred


async def test_a_change_that_fails_fails_alone_and_leaves_nothing() -> None:
    def bad(tx: Transaction) -> None:
        tx.put_token(token("half"))
        raise StorageError("no")

    store = Counting()
    writer = Writer(store)
    tasks = [asyncio.create_task(writer.run(change)) for change in (put(1), bad, put(2))]
    await asyncio.sleep(0)
    writer.start()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    await writer.stop()
    assert outcomes[0] == 1
    assert isinstance(outcomes[1], StorageError)
    assert outcomes[2] == 2
    assert store.known(1)
    assert store.known(2)
    assert store.known("half") is None


async def test_what_has_committed_is_told_with_its_size_and_what_failed_is_not() -> None:
    def good(tx: Transaction) -> None:
        ledger.upload(tx, "good")

    def bad(tx: Transaction) -> None:
        ledger.upload(tx, "bad")
        raise StorageError("no")

    store = Counting()
    with store.transaction() as tx:
        ledger.open_round(tx)
    told: list[tuple[int, float, dict[UpdateState, int]]] = []
    writer = Writer(store, observe=lambda *commit: told.append((*commit[:2], dict(commit[2]))))
    tasks = [asyncio.create_task(writer.run(change)) for change in (good, bad, put(1), put(2))]
    await asyncio.sleep(0)
    assert writer.waiting() == 4
    writer.start()
    await asyncio.gather(*tasks, return_exceptions=True)
    again = asyncio.gather(writer.run(put(3)), writer.run(put(4)))
    await again
    await writer.stop()
    assert writer.waiting() == 0
    # the four together failed, so each was committed for itself; the last two shared a commit
    assert [(changes, moved) for changes, _, moved in told] == [
        (1, {UpdateState.ACCEPTED: 1}),
        (1, {}),
        (1, {}),
        (2, {}),
    ]
    assert all(0 < seconds < 10 for _, seconds, _ in told)


async def test_a_full_queue_refuses_requests_and_what_it_holds_is_committed_when_it_stops() -> None:
    store = Counting()
    writer = Writer(store, queue_limit=2)
    waiting = [asyncio.create_task(writer.request(put(n))) for n in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError, match="2 changes wait already"):
        await writer.request(put("third"))
    own = asyncio.create_task(writer.run(put("the server's own")))
    await asyncio.sleep(0)
    writer.start()
    await writer.stop()
    assert await asyncio.gather(*waiting, own) == [0, 1, "the server's own"]
    assert store.known(0)
    assert store.known("third") is None


async def test_a_change_is_durable_although_nobody_waits_for_it_any_more() -> None:
    store = Counting()
    writer = Writer(store)
    task = asyncio.create_task(writer.run(put("gone")))
    await asyncio.sleep(0)
    task.cancel()
    writer.start()
    await writer.stop()
    assert task.cancelled()
    assert store.known("gone")


async def test_a_service_with_a_full_queue_says_busy() -> None:
    service = Service(MemoryStore(), MemoryBlobs(), SystemClock(), queue_limit=1)
    waiting = asyncio.create_task(service.write(put(1)))
    await asyncio.sleep(0)
    answer = await service.write(put(2))
    assert isinstance(answer, Problem)
    assert (answer.code, answer.detail) == (Code.BUSY, "1 changes wait already; come back later")
    service.writer.start()
    await service.writer.stop()
    assert await waiting == 1


async def test_rounds_move_on_while_the_queue_is_full() -> None:
    service = Service(MemoryStore(), MemoryBlobs(), SystemClock(), queue_limit=0)
    assert isinstance(await service.write(put(1)), Problem)
    service.writer.start()
    await service.tick()
    await service.writer.stop()
