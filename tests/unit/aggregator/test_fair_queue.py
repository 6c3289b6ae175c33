"""Who floods the writer's queue waits and is refused, and nobody else."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from aggregator.answers import NewToken
from aggregator.enrolment import create_token
from aggregator.fair_queue import FairQueue
from aggregator.metrics import totals
from aggregator.service import Service
from aggregator.uploads import Admission
from aggregator.writer import Writer
from fedtt.codec import encode_delta
from fedtt.messages import CheckIn, Code, Problem, Receipt
from fedtt.seams import SystemClock
from fedtt.task import RoundSpec, TaskSpec
from fedtt.wire import UpdateHeader, encode_update, layout_tag, update_digest
from storage.blobs import MemoryBlobs
from storage.sql import SqlStore
from tests.support import ledger
from tests.support.tiny import add_task


def test_one_alone_has_all_the_room_and_its_items_keep_their_order() -> None:
    queue: FairQueue[int] = FairQueue(3)
    assert [queue.put("a", n) for n in range(4)] == [None, None, None, ("a", 3)]
    assert queue.take(2) == [0, 1]
    assert queue.put("a", 4) is None
    assert queue.take(9) == [2, 4]


def test_a_newcomer_takes_the_place_of_the_newest_item_of_whoever_has_most() -> None:
    queue: FairQueue[str] = FairQueue(4)
    for n in range(4):
        queue.put("flood", f"f{n}")
    assert queue.put("quiet", "q0") == ("flood", "f3")
    assert queue.put("quiet", "q1") == ("flood", "f2")
    assert queue.put("quiet", "q2") == ("quiet", "q2")  # half of the room is its share
    assert queue.take(3) == ["f0", "f1", "q0"]


def test_what_is_never_refused_is_taken_first_and_takes_no_room() -> None:
    queue: FairQueue[str] = FairQueue(1)
    queue.put("a", "request")
    queue.put_always("own")
    assert len(queue) == 2
    assert queue.take(1) == ["own"]
    assert queue.take(1) == ["request"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans())), st.integers(1, 6), st.integers(1, 4))
def test_nothing_is_lost_and_nobody_waits_behind_more_than_a_turn_of_each(
    steps: list[tuple[str, bool]], limit: int, most: int
) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue(limit)
    waiting: dict[str, deque[tuple[str, int]]] = {name: deque() for name in "abc"}
    for number, (whose, takes) in enumerate(steps):
        longest = max(len(items) for items in waiting.values())
        waiting[whose].append((whose, number))
        if gone := queue.put(whose, (whose, number)):
            assert waiting[gone[0]].pop() == gone[1]
            assert len(waiting[gone[0]]) >= longest - 1
        assert len(queue) == sum(map(len, waiting.values())) <= limit
        if takes:
            before = {name: len(items) for name, items in waiting.items()}
            taken = queue.take(most)
            assert [n for _, n in taken] == sorted(n for _, n in taken)
            for item in taken:
                assert waiting[item[0]].popleft() == item
            counts = Counter(name for name, _ in taken)
            assert len(taken) == min(most, sum(before.values()))
            for name, count in counts.items():  # one more than another only where that one has no more
                assert all(count <= counts[o] + 1 or not waiting[o] for o in "abc" if o != name)


async def test_what_people_change_is_not_kept_out_by_a_flood_of_check_ins(tmp_path: Path) -> None:
    store = SqlStore.open(tmp_path / "ledger.db")
    service = Service(store, MemoryBlobs(), SystemClock(), queue_limit=10)
    check_in = CheckIn(client="", runtimes=(), examples=1)
    flood = [asyncio.create_task(service.check_in("0" * 32, check_in)) for _ in range(20)]
    await asyncio.sleep(0)
    people = asyncio.create_task(create_token(service, b"{}"))
    await asyncio.sleep(0)
    service.writer.start()
    assert isinstance(await people, NewToken)
    await asyncio.gather(*flood)
    await service.writer.stop()
    store.close()


async def test_an_update_beside_a_flood_of_another_task_is_in_the_next_commit_and_not_refused(
    tmp_path: Path,
) -> None:
    store, commits = SqlStore.open(tmp_path / "ledger.db"), [0]
    service = Service(store, MemoryBlobs(), SystemClock())
    service.writer = Writer(
        store,
        queue_limit=300,
        observe=lambda *_: commits.__setitem__(0, commits[0] + 1),
        refused=service.metrics.no_room,
    )
    device = ledger.device().id
    names = {"flood": range(400), "quiet": range(1)}
    rounds = RoundSpec(count=1, cohort=1000, deadline_s=3600.0)
    now = service.clock.now()
    with store.transaction() as tx:
        tx.put_device(ledger.device())
        for name, numbers in names.items():
            task = add_task(tx, TaskSpec(name=name, rounds=rounds), now)
            tx.put_round(ledger.round_(task_id=task.id, opened_at=now))
            for n in numbers:
                times = {"granted_at": now, "expires_at": now + 3600}
                tx.put_lease(ledger.lease(f"{name} {n}", task_id=task.id, **times))

    async def upload(name: str) -> tuple[Receipt | Problem, int]:
        lease = ledger.lease(name).id
        with store.reading() as tx:
            admission = service.coordinator.admit(tx, device, lease, "")
        assert isinstance(admission, Admission)
        wanted = admission.wanted
        header = UpdateHeader(
            layout=layout_tag(wanted.layout), examples=1, steps=1, loss_first=2.0, loss_last=1.0
        )
        delta = np.full(wanted.live_set.size, 0.01, np.float32)
        payload = encode_delta(wanted.codec, wanted.live_set, delta, np.random.default_rng(0))
        frame = encode_update(header, payload)
        return await service.upload(admission, frame, update_digest(frame)), commits[0]

    flood = [asyncio.create_task(upload(f"flood {n}")) for n in names["flood"]]
    while totals(service.metrics.queue_refusals, "task").get("flood") != 100:  # 300 of the 400 have room
        await asyncio.sleep(0.01)
    quiet = asyncio.create_task(upload("quiet 0"))
    while totals(service.metrics.queue_refusals, "task").get("flood") != 101:  # and one less, since it came
        await asyncio.sleep(0.01)
    service.writer.start()
    receipt, after = await quiet
    assert isinstance(receipt, Receipt)
    assert after == 1
    answers = [answer for answer, _ in await asyncio.gather(*flood)]
    assert sum(isinstance(answer, Receipt) for answer in answers) == 299
    assert all(answer.code is Code.BUSY for answer in answers if isinstance(answer, Problem))
    await service.writer.stop()
    store.close()
