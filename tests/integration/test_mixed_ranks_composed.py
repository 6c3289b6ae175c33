"""Mixed ranks with robust folds, server optimisers and late updates: real devices, the real service."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from msgspec.structs import replace

from edge_client import events
from edge_client.runtime import Runtime
from fedtt.adapter import AdapterSpec
from fedtt.codec import decode_delta
from fedtt.folds import Contribution
from fedtt.messages import UpdateState
from fedtt.server_optimiser import ServerState
from fedtt.server_step import server_step
from fedtt.wire import decode_update
from storage.records import MAIN, Update, Version
from storage.sql import SqlStore
from tests.support.federations import Federation, federation
from tests.support.ranks import TowardsProducts, at_rank, bases_of, lora_adapter, tt_adapter
from tests.support.trains import TowardsMatrices

MEMORY_MB = (256, 1024, 4096, 0)
TASK = """
name = "lights"
seed = 5
[rounds]
count = 9
cohort = 4
quorum = 3
deadline_s = 1000
retry_s = 10
{rounds}
[training]
learning_rate = 0.03
local_steps = 10
batch_size = 2
[codec]
quantise = "int8"
{more}
[method]
name = "{name}"
[[method.tiers]]
rank = 1
below_mb = 512
[[method.tiers]]
rank = 2
below_mb = 2048
"""
METHODS: dict[str, tuple[AdapterSpec, Callable[[AdapterSpec], Runtime]]] = {
    "tt-svd-fedtt": (tt_adapter(), TowardsMatrices),
    "flexlora": (lora_adapter(), TowardsProducts),
}
LATE = "buffer = 3\nmax_staleness = 2"


class Choice(NamedTuple):
    more: str
    rounds: str = ""


CHOICES = {
    "median": Choice('[fold]\nkind = "median"'),
    "trimmed mean, late": Choice('[fold]\nkind = "trimmed-mean"\ntrim = 0.34', LATE),
    "adam": Choice('[server]\noptimiser = "adam"\nlearning_rate = 0.05'),
    "momentum, late": Choice('[server]\noptimiser = "momentum"\nmomentum = 0.5', LATE),
    "late": Choice("", LATE),
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("name", METHODS)
def test_every_version_is_the_fold_of_the_frames_each_on_the_base_it_was_trained_from(
    name: str, choice: Choice, tmp_path: Path
) -> None:
    adapter, runtime = METHODS[name]
    text = TASK.format(name=name, more=choice.more, rounds=choice.rounds)

    async def run() -> None:
        store = SqlStore.open(tmp_path / "ledger.db")
        async with federation(
            tmp_path, text, adapter, memory_mb=MEMORY_MB, runtime=runtime, store=store
        ) as fleet:
            if choice.rounds:
                await rounds_with_someone_late(fleet)
            else:
                for _ in range(3):
                    await fleet.round()
            check_versions(fleet, late=bool(choice.rounds))
        store.close()

    asyncio.run(run())


async def rounds_with_someone_late(fleet: Federation) -> None:
    """The device of the lowest rank trains on version 0, the others make two more; then it sends."""
    late, *quick = fleet.devices
    await late.run(until=lambda step: isinstance(step, events.Trained))
    for _ in range(2):
        for device in quick:
            await device.run(until=lambda step: isinstance(step, events.Acknowledged))
    for device in (late, *quick[:2]):
        await device.run(until=lambda step: isinstance(step, events.Acknowledged))


def check_versions(fleet: Federation, *, late: bool) -> None:
    versions = fleet.ledger()[0]
    assert [version.number for version in versions] == [0, 1, 2, 3]
    ages = set[int]()
    state: ServerState | None = None
    for before, after in itertools.pairwise(versions):
        given = contributions(fleet, versions, after)
        ages |= {c.staleness for c in given}
        assert {c.rank for c in given} >= {2, None}
        theta, live = fleet.theta(before), fleet.adapter.layout.everything
        bases = bases_of(fleet.spec.method, fleet.adapter, theta)
        step = server_step(fleet.spec, fleet.adapter, bases, live, given, state)
        assert step.theta.tobytes() == fleet.theta(after).tobytes()
        assert after.report == step.report
        forgot = [replace(c, bases=None) for c in given]
        other = server_step(fleet.spec, fleet.adapter, bases, live, forgot, state)
        is_late = any(c.staleness for c in given)
        assert (
            other.theta.tobytes() != step.theta.tobytes()
        ) == is_late  # on newer factors it is another change
        state = step.state
    assert ages == ({0, 2} if late else {0})
    losses = [version.loss_last for version in versions[1:]]
    assert losses[-1] is not None
    assert losses[0] is not None
    assert losses[-1] < losses[0]


def contributions(fleet: Federation, versions: list[Version], after: Version) -> list[Contribution]:
    """In the order of the ledger, from the frames as they were sent."""
    frames = {lease: frame for world in fleet.worlds for t in world.transports for lease, frame in t.frames}
    found = []
    for update in ledger(fleet, after):
        age, spec = after.number - 1 - update.version_number, at_rank(fleet.adapter, update.rank)
        delta = decode_delta(
            fleet.spec.codec, spec.layout.everything, decode_update(frames[update.lease_id])[1]
        )
        base = bases_of(fleet.spec.method, fleet.adapter, fleet.theta(versions[update.version_number]))
        found.append(
            Contribution(
                delta=delta,
                examples=update.examples,
                staleness=age,
                rank=update.rank,
                bases=base if age else None,
            )
        )
    return found


def ledger(fleet: Federation, version: Version) -> list[Update]:
    assert version.round_number is not None
    with fleet.service.store.reading() as tx:
        return list(tx.updates(version.task_id, MAIN, version.round_number, UpdateState.FOLDED))
