"""What a fold leaves for the next one, through a real ledger on disk, restarts and crashes in between."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregator.folding import server_state, sum_round
from aggregator.service import Service
from aggregator.token_files import token_sha256
from aggregator.uploads import Admission
from fedtt.codec import CodecSpec
from fedtt.folds import Contribution, Fold, Mean, TrimmedMean
from fedtt.messages import Enroll, Enrolled, Receipt, Work
from fedtt.server_optimiser import ServerSpec, ServerState, encode_state
from fedtt.server_step import server_step
from fedtt.task import RoundSpec, TaskSpec
from fedtt.wire import encode_theta
from storage.blobs import FileBlobs, load, save
from storage.records import MAIN, Round, RoundState, Token, Version
from storage.sql import SqlStore
from tests.support.clock import VirtualClock
from tests.support.served import CHECK_IN, LAYOUT, frame_of
from tests.support.tiny import add_task, tiny_spec

Delta = NDArray[np.float32]
DEVICES, ROUNDS = 5, 3
OPTIMISERS: tuple[Literal["momentum", "adam", "yogi"], ...] = ("momentum", "adam", "yogi")


def task(server: ServerSpec, fold: Fold) -> TaskSpec:
    rounds = RoundSpec(count=ROUNDS, cohort=DEVICES, quorum=DEVICES, deadline_s=1e6)
    return TaskSpec(name="t", rounds=rounds, codec=CodecSpec(quantise="fp32"), server=server, fold=fold)


def sent() -> list[list[tuple[Delta, int]]]:
    """What each device sends in each round: its delta and its count of examples."""
    rng = np.random.default_rng(11)
    return [
        [
            (rng.normal(0, 0.1, LAYOUT.size).astype(np.float32), int(rng.integers(1, 50)))
            for _ in range(DEVICES)
        ]
        for _ in range(ROUNDS)
    ]


def computed(spec: TaskSpec) -> list[tuple[bytes, bytes]]:
    """Bytes of each version and of the state behind it, without a server."""
    theta, state, made = np.zeros(LAYOUT.size, np.float32), None, []
    for updates in sent():
        given = [Contribution(delta=delta, examples=examples) for delta, examples in updates]
        step = server_step(spec, tiny_spec(), {None: theta}, LAYOUT.everything, given, state)
        theta, state = step.theta, step.state
        made.append((encode_theta(theta), encode_state(state)))
    return made


@asynccontextmanager
async def server(directory: Path, spec: TaskSpec | None = None) -> AsyncIterator[Service]:
    """A server process over the files of a directory, with a task where it is new."""
    store = SqlStore.open(directory / "ledger.db")
    service = Service(store, FileBlobs(directory / "blobs"), VirtualClock())
    if spec is not None:
        save(service.blobs, encode_theta(np.zeros(LAYOUT.size, np.float32)))
        with store.transaction() as tx:
            tx.put_token(Token(sha256=token_sha256("secret"), uses_left=None, expires_at=None))
            add_task(tx, spec)
    service.writer.start()
    try:
        yield service
    finally:
        await service.writer.stop()
        store.close()


async def upload_all(service: Service, updates: Sequence[tuple[Delta, int]]) -> None:
    for number, (delta, examples) in enumerate(updates):
        enrolled = await service.enroll(Enroll(public_key=bytes([number]) * 32, token="secret", client="t"))
        assert isinstance(enrolled, Enrolled)
        work = await service.check_in(enrolled.device, CHECK_IN)
        assert isinstance(work, Work)
        frame = frame_of(work.plan, delta, examples=examples)
        digest = hashlib.sha256(frame).hexdigest()
        _, admitted = await service.admit(enrolled.device, work.lease, digest)
        assert isinstance(admitted, tuple)
        assert isinstance(admitted[0], Admission)
        assert isinstance(await service.upload(admitted[0], frame, digest), Receipt)


async def claim(service: Service) -> Round:
    """The first third of a fold: its updates are fixed from now on."""
    (claimed,) = await service.writer.run(lambda tx: service.lifecycle.advance(tx, service.clock.now()))
    assert claimed.state is RoundState.FOLDING
    return claimed


async def versions(service: Service) -> list[Version]:
    return await service.read(lambda tx: tx.versions(1))


async def stored(service: Service) -> list[tuple[bytes, bytes]]:
    made = (await versions(service))[1:]
    return [(load(service.blobs, v.sha256), load(service.blobs, v.server_state or "")) for v in made]


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("fold", [Mean(), TrimmedMean()], ids=["mean", "trimmed mean"])
async def test_folds_of_a_server_that_restarts_every_round_are_those_of_the_pure_computation(
    optimiser: Literal["momentum", "adam", "yogi"], fold: Fold, tmp_path: Path
) -> None:
    spec = task(ServerSpec(optimiser=optimiser), fold)
    for number, updates in enumerate(sent()):
        async with server(tmp_path, None if number else spec) as service:
            await upload_all(service, updates)
            await service.tick()
    async with server(tmp_path) as service:
        assert await stored(service) == computed(spec)
        last = server_state(service.blobs, (await versions(service))[-1])
        assert isinstance(last, ServerState)
        assert last.first.any()


@pytest.mark.parametrize("crash", ["after the claim", "after the sum"])
async def test_a_crash_between_claim_and_publication_repeats_the_fold_to_the_same_bits(
    crash: str, tmp_path: Path
) -> None:
    spec = task(ServerSpec(optimiser="adam"), Mean())
    for number, updates in enumerate(sent()):
        async with server(tmp_path, None if number else spec) as service:
            await upload_all(service, updates)
            claimed = await claim(service)
            if crash == "after the sum":
                fold = sum_round(service.store, service.blobs, service.lifecycle, claimed)
                assert fold.server_state in {entry.name for entry in (tmp_path / "blobs").rglob("*")}
            assert len(await versions(service)) == number + 1
        async with server(tmp_path) as service:
            await service.tick()
            assert len(await versions(service)) == number + 2
    async with server(tmp_path) as service:
        assert await stored(service) == computed(spec)


async def test_an_update_that_would_hold_a_number_for_ever_ends_its_round_and_not_the_task(
    tmp_path: Path,
) -> None:
    """Adam squares it: theta itself would have stayed finite."""
    enormous = np.full(LAYOUT.size, 3e38, np.float32)
    async with server(tmp_path, task(ServerSpec(optimiser="adam"), Mean())) as service:
        await upload_all(service, [(enormous, 1), *sent()[0][1:]])
        await service.tick()
        rounds = await service.read(lambda tx: tx.rounds(1))
        assert [r.state for r in rounds] == [RoundState.OPEN, RoundState.ABANDONED]
        assert rounds[1].reason == "the sum of its 5 updates is not finite"
        await upload_all(service, sent()[0])
        await service.tick()
        version = await service.read(lambda tx: tx.latest_version(1, MAIN))
        assert version is not None
        assert (
            load(service.blobs, version.sha256) == computed(task(ServerSpec(optimiser="adam"), Mean()))[0][0]
        )
