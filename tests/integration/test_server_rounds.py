"""Whole rounds over real sockets: folded to the last bit, too late, abandoned, interrupted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client import Counter

from aggregator.folding import sum_round
from aggregator.lifecycle import Fold, Lifecycle
from edge_client import events
from edge_client.device_config import DeviceConfig
from edge_client.examples import ExampleStore
from edge_client.inference import Model
from edge_client.session import open_device
from fedtt.errors import Refused
from fedtt.messages import Code, Receipt, UpdateState, Work
from fedtt.wire import version_digest
from storage.blobs import FileBlobs, load
from storage.records import MAIN, RoundState
from storage.sql import SqlStore
from tests.support.served import LAYOUT, Peer, Served, frame_of, refused, served, task_text, until

Delta = NDArray[np.float32]


def moved(seed: int) -> Delta:
    """A delta of a device, reproducible from its seed."""
    return np.random.default_rng(seed).normal(0, 0.1, LAYOUT.size).astype(np.float32)


def weighted_sum(updates: Sequence[tuple[Delta, int]], start: Delta) -> bytes:
    """The version that fp32 updates make, in the order of the ledger: start + Σ n Δ / Σ n in float64."""
    total = np.zeros(LAYOUT.size, np.float64)
    for delta, examples in updates:
        total += float(examples) * delta.astype(np.float64)
    mean = total / float(sum(examples for _, examples in updates))
    return (start.astype(np.float64) + mean).astype("<f4").tobytes()


async def version(server: Served, number: int, within_s: float = 10.0) -> tuple[int, bytes]:
    """Wait for a version; how many updates it is made of, and its bytes."""

    async def found() -> list[dict[str, int | str]]:
        rows = await server.admin.task("lights", "/versions")
        return [row for row in rows if row["number"] == number]

    (row,) = await until(found, within_s)
    return int(row["updates"]), load(server.service.blobs, str(row["sha256"]))


@asynccontextmanager
async def devices(server: Served, count: int) -> AsyncIterator[list[tuple[Peer, Work]]]:
    """Enrolled devices that hold a lease each."""
    async with AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(server.device()) for _ in range(count)]
        yield [(peer, await peer.work()) for peer in peers]


async def upload(peer: Peer, work: Work, delta: Delta, examples: int = 5) -> Receipt:
    return await peer.transport.upload(work.lease, frame_of(work.plan, delta, examples=examples))


async def stale(peer: Peer, work: Work, *words: str) -> None:
    with pytest.raises(Refused) as caught:
        await upload(peer, work, moved(0))
    assert caught.value.problem.code is Code.STALE
    for word in ("this update comes too late", *words, "drop it and check in for new work"):
        assert word in str(caught.value)


async def test_a_version_is_the_weighted_sum_of_its_updates_to_the_last_bit(tmp_path: Path) -> None:
    async with served(tmp_path, task_text(cohort=3)) as server, devices(server, 3) as leased:
        updates = [(moved(seed), examples) for seed, examples in ((1, 5), (2, 40), (3, 7))]
        for (peer, work), (delta, examples) in zip(leased, updates, strict=True):
            receipt = await upload(peer, work, delta, examples)
            assert receipt.state is UpdateState.ACCEPTED
        count, data = await version(server, 1)
        assert (count, data) == (3, weighted_sum(updates, np.zeros(LAYOUT.size, np.float32)))
        for peer, work in leased:
            receipt = await peer.transport.receipt(work.lease)
            assert (receipt.state, receipt.version_number) == (UpdateState.FOLDED, 1)
        peer, work = leased[0]
        assert await upload(peer, work, *updates[0]) == await peer.transport.receipt(work.lease)


async def test_updates_that_come_all_at_once_are_each_folded_once(tmp_path: Path) -> None:
    async with served(tmp_path, task_text(cohort=30)) as server, devices(server, 30) as leased:
        tries = [upload(peer, work, moved(seed)) for seed, (peer, work) in enumerate(leased * 3)]
        answers = await asyncio.gather(*tries, return_exceptions=True)
        # each lease was sent three times, with other bytes each time: one is acknowledged, two conflict
        taken = [answer for answer in answers if isinstance(answer, Receipt)]
        codes = {answer.problem.code for answer in answers if isinstance(answer, Refused)}
        assert len({receipt.lease for receipt in taken}) == len(taken) == 30
        assert codes == {Code.CONFLICT}
        assert (await version(server, 1))[0] == 30


async def test_an_expired_lease_is_taken_until_its_round_has_closed(tmp_path: Path) -> None:
    text = task_text(cohort=3, buffer=2, lease_s=0.05)
    async with (
        served(tmp_path, text) as server,
        devices(server, 3) as ((a, a_work), (b, b_work), (c, c_work)),
    ):
        await asyncio.sleep(0.1)
        first = await upload(a, a_work, moved(1))
        second = await upload(b, b_work, moved(2))
        assert (first.state, second.state) == (UpdateState.ACCEPTED, UpdateState.ACCEPTED)
        count, _ = await version(server, 1)
        await stale(c, c_work, "it was trained from version 0, now 1 is current")
        assert count == 2
        for peer, work in ((a, a_work), (b, b_work)):
            assert (await peer.transport.receipt(work.lease)).state is UpdateState.FOLDED
        assert (await c.work()).plan.version_number == 1


async def test_an_abandoned_round_says_why_to_everybody_and_the_next_one_works(tmp_path: Path) -> None:
    text = task_text(cohort=3, quorum=2, deadline_s=1.0)
    async with served(tmp_path, text) as server, devices(server, 2) as ((a, a_work), (late, late_work)):
        await upload(a, a_work, moved(1))

        async def discarded() -> bool:
            return (await a.transport.receipt(a_work.lease)).state is UpdateState.DISCARDED

        await until(discarded)
        why = "round 1 was abandoned: 1 of at least 2 updates came by the deadline"
        assert (await a.transport.receipt(a_work.lease)).reason == why
        await stale(late, late_work, "its round 1 has closed, now round 2 is open")
        await asyncio.gather(a.update(moved(2)), late.update(moved(3)))
        expected = [(moved(2), 5), (moved(3), 5)]
        start = np.zeros(LAYOUT.size, np.float32)
        # the two came at once: either order of the ledger
        assert (await version(server, 1))[1] in {
            weighted_sum(expected, start),
            weighted_sum(expected[::-1], start),
        }


async def test_a_task_that_was_stopped_takes_nothing_more_and_discards_what_waits(tmp_path: Path) -> None:
    async with served(tmp_path, task_text()) as server, devices(server, 2) as ((a, a_work), (b, b_work)):
        await upload(a, a_work, moved(1))
        await server.admin.task("lights", "/stop", "POST")
        receipt = await a.transport.receipt(a_work.lease)
        assert (receipt.state, receipt.reason) == (
            UpdateState.DISCARDED,
            "round 1 was abandoned: the task was stopped",
        )
        await stale(b, b_work, "task 'lights' is stopped")


async def test_a_task_that_is_finished_says_so_when_it_is_resumed(tmp_path: Path) -> None:
    async with served(tmp_path, task_text(cohort=1, count=1)) as server, server.device() as peer:
        await peer.update()
        await version(server, 1)
        assert (await server.admin.task("lights"))["state"] == "finished"
        answer = await server.people("POST", "/tasks/lights/resume")
        refused(answer, Code.CONFLICT, "task 'lights' is finished and cannot be resumed", "with a new name")


async def test_updates_whose_sum_is_not_finite_end_their_round_and_no_more(tmp_path: Path) -> None:
    greatest = np.full(LAYOUT.size, np.finfo(np.float32).max)
    async with served(tmp_path, task_text(cohort=1, count=5)) as server, server.device() as peer:
        await peer.update(greatest)
        assert (await version(server, 1))[1] == greatest.tobytes()
        poisoned = await peer.update(greatest)

        async def settled() -> bool:
            return (await peer.transport.receipt(poisoned.lease)).state is not UpdateState.ACCEPTED

        await until(settled)
        receipt = await peer.transport.receipt(poisoned.lease)
        why = "round 2 was abandoned: the sum of its 1 updates is not finite"
        assert (receipt.state, receipt.reason) == (UpdateState.DISCARDED, why)
        await peer.update(-greatest)
        assert await version(server, 2) == (1, bytes(4 * LAYOUT.size))  # max - max = 0


async def test_a_sum_that_cannot_be_stored_waits_until_it_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    incoming = tmp_path / "data" / "blobs" / "incoming"
    async with served(tmp_path, task_text(cohort=1)) as server, server.device() as peer:
        incoming.rmdir()
        await peer.update(moved(1))

        async def said() -> bool:
            return "round 1 waits for its sum" in caplog.text

        await until(said)
        incoming.mkdir()
        start = np.zeros(LAYOUT.size, np.float32)
        assert await version(server, 1) == (1, weighted_sum([(moved(1), 5)], start))


@pytest.mark.parametrize("mistake", [MemoryError("no room for 9 GB"), RuntimeError("a mistake of ours")])
async def test_a_sum_that_meets_a_mistake_keeps_no_other_task_waiting_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mistake: Exception
) -> None:
    met = 0

    def mistaken(*given: Any) -> Fold:
        nonlocal met
        if given[-1].task_id == 1 and met < 2:
            met += 1
            raise mistake
        return sum_round(*given)

    monkeypatch.setattr("aggregator.keeper.sum_round", mistaken)
    async with served(tmp_path, task_text(cohort=1, count=1)) as server, server.device() as peer:
        failures = server.service.metrics.fold_failures
        bundle = (await server.admin.task("lights"))["bundle"]
        first = await peer.update(moved(1))
        await until(partial(_counted, failures, 1))
        await server.admin.create_task(task_text("blinds", cohort=1, count=1), bundle)
        await peer.update(moved(2))

        async def finished() -> bool:
            return str((await server.admin.task("blinds"))["state"]) == "finished"

        await until(finished)
        assert (await server.admin.task("lights"))["version"] == 0  # it pauses for a second
        start = np.zeros(LAYOUT.size, np.float32)
        assert await version(server, 1) == (1, weighted_sum([(moved(1), 5)], start))
        assert (await peer.transport.receipt(first.lease)).state is UpdateState.FOLDED
        assert await _counted(failures, 2)
    assert caplog.text.count(f"round 1 waits for its sum: {mistake}") == 2


async def _counted(counter: Counter, times: int) -> bool:
    (metric,) = counter.collect()
    return [int(s.value) for s in metric.samples if s.name.endswith("_total")] == [times]


def claim(data: Path, *, summed: bool) -> None:
    """Close round 1 in the ledger of a server that is down, as one does that dies right afterwards."""
    with closing(SqlStore.open(data / "fedtt.db")) as store:
        lifecycle = Lifecycle()
        with store.transaction() as tx:
            (round_,) = lifecycle.advance(tx, now=10.0**10)
        assert round_.state is RoundState.FOLDING
        if summed:
            sum_round(store, FileBlobs(data / "blobs"), lifecycle, round_)


@pytest.mark.parametrize("summed", [False, True])
async def test_a_server_that_died_between_claim_and_publish_sums_again_to_one_version(
    tmp_path: Path, summed: bool
) -> None:
    text = task_text(cohort=5)
    async with served(tmp_path, text) as server, devices(server, 3) as leased:
        for seed, (peer, work) in enumerate(leased[:2]):
            await upload(peer, work, moved(seed))
        await server.admin.task("lights", "/pause", "POST")
    claim(tmp_path / "data", summed=summed)
    async with served(tmp_path, text) as server:
        expected = weighted_sum([(moved(0), 5), (moved(1), 5)], np.zeros(LAYOUT.size, np.float32))
        assert await version(server, 1) == (2, expected)
        assert len(await server.admin.task("lights", "/versions")) == 2
        for number, state in ((1, UpdateState.FOLDED), (2, UpdateState.FOLDED)):
            async with server.device(number) as peer:
                assert (await peer.transport.receipt(leased[number - 1][1].lease)).state is state
        async with server.device(3) as peer:
            await stale(peer, leased[2][1])
        with server.service.store.reading() as tx:
            latest = tx.latest_version(1, MAIN)
        assert latest is not None
        assert latest.sha256 == version_digest(expected)


@pytest.mark.slow
async def test_real_clients_train_two_versions_over_http_that_a_person_can_use(
    tmp_path: Path, tiny_bundle: Path
) -> None:
    said = {"set the alarm for seven": 0, "lights off please": 1, "pay my card": 2, "weather today": 3}
    text = (
        'name = "tiny"\n[rounds]\ncount = 2\ncohort = 4\nretry_s = 0.05\n'
        '[training]\nlocal_steps = 20\nbatch_size = 4\n[codec]\nquantise = "int8"\nerror_feedback = true\n'
    )
    receipts: list[Receipt] = []

    def keep(event: events.Event) -> None:
        assert not isinstance(event, events.GaveUp | events.Retrying | events.Dropped), event
        if isinstance(event, events.Acknowledged):
            receipts.append(event.receipt)

    async def live(server: Served, name: str) -> None:
        examples = ExampleStore(None)
        for sentence, label in said.items():
            examples.add(sentence, label)
        async with open_device(
            tmp_path / name,
            server=server.url,
            examples=examples,
            config=DeviceConfig(token=server.token),
            cache=tmp_path / "cache",
            observe=keep,
        ) as device:
            await device.consent()
            await device.run(lambda step: isinstance(step, events.Waiting) and "no task" in step.reason)

    async with served(tmp_path) as server:
        digest = await server.admin.send_bundle(tiny_bundle)
        await server.admin.create_task(text, digest)
        async with asyncio.timeout(60):
            await asyncio.gather(*(live(server, name) for name in "abcd"))
        task = await server.admin.task("tiny")
        assert (task["state"], task["version"]) == ("finished", 2)
        versions = await server.admin.task("tiny", "/versions")
        assert [row["updates"] for row in versions] == [0, 4, 4]
        assert versions[2]["loss_last"] < versions[1]["loss_first"]
        with server.service.store.reading() as tx:
            found = [tx.update(receipt.lease) for receipt in receipts]
        assert (
            sorted((u.state.value, u.folded_into) for u in found if u)
            == [("folded", 1)] * 4 + [("folded", 2)] * 4
        )
        for number in (0, 2):
            await server.admin.download_version("tiny", number, tmp_path / f"v{number}")
        await server.admin.download_bundle(digest, tmp_path / "again")
    before, after = (
        Model.open(tmp_path / f"v{number}", tmp_path / "again").predict(list(said)) for number in (0, 2)
    )
    right = [said[p.text] == TINY.index(p.label) for p in after]
    assert all(right)
    for was, now, label in zip(before, after, said.values(), strict=True):
        assert now.probabilities[TINY[label]] > was.probabilities[TINY[label]]


TINY = ("alarm", "lights off", "pay", "weather")
