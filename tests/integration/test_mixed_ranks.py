"""Devices of two tiers and of none under one task: real devices, the real service, both stores."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from msgspec.structs import replace

from aggregator import admin, admin_versions
from edge_client import events
from edge_client.journal import Leased, Trained
from edge_client.runtime import Runtime
from fedtt.adapter import AdapterSpec
from fedtt.algorithms import FlexLoRA, Tier, TTSVDFedTT
from fedtt.algorithms.mixed_ranks import MixedRanks
from fedtt.codec import decode_delta, payload_bytes
from fedtt.folds import Contribution, Median
from fedtt.layout import FactorLayout
from fedtt.messages import Code, FailureCode, Problem, UpdateState
from fedtt.server_step import server_step
from fedtt.wire import decode_update
from fleet.profiles import Profile
from storage.records import MAIN, RoundState, Update, rank_branch
from storage.sql import SqlStore
from storage.store import Store
from tests.support.federations import Federation, federation
from tests.support.fleets import SmallFleet, small_task
from tests.support.ranks import TowardsProducts, bases_of, lora_adapter, tt_adapter
from tests.support.trains import TowardsMatrices

MEMORY_MB = (256, 1024, 4096, 0)
RANKS = (1, 2, None, None)
TASK = """
name = "lights"
seed = 5
[rounds]
count = 9
cohort = 4
deadline_s = 1000
retry_s = 10
[training]
learning_rate = 0.03
local_steps = 10
batch_size = 2
[codec]
quantise = "int8"
[method]
name = "{name}"
[[method.tiers]]
rank = 1
below_mb = 512
[[method.tiers]]
rank = {second}
below_mb = 2048
"""


class Case(NamedTuple):
    method: type[MixedRanks]
    adapter: AdapterSpec
    runtime: Callable[[AdapterSpec], Runtime]

    @property
    def text(self) -> str:
        return TASK.format(name=self.method.__struct_config__.tag, second=2)


CASES = {
    "tt-svd-fedtt": Case(TTSVDFedTT, tt_adapter(), TowardsMatrices),
    "flexlora": Case(FlexLoRA, lora_adapter(), TowardsProducts),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def store_of(kind: str, tmp_path: Path) -> Store | None:
    return SqlStore.open(tmp_path / "ledger.db") if kind == "sqlite" else None


@every_case
@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_each_device_trains_its_tiers_variant_and_all_of_them_make_one_model(
    case: Case, kind: str, tmp_path: Path
) -> None:
    async def run() -> None:
        store = store_of(kind, tmp_path)
        async with federation(
            tmp_path, case.text, case.adapter, memory_mb=MEMORY_MB, runtime=case.runtime, store=store
        ) as fleet:
            for number in range(4):
                ledger = await one_round(fleet)
                check_fold(fleet, number, ledger)
            check_versions(fleet, case)
            check_devices(fleet, case)
            losses = [version.loss_last for version in fleet.ledger()[0][1:]]
            assert losses[-1] is not None
            assert losses[0] is not None
            assert losses[-1] < 0.8 * losses[0]
        if isinstance(store, SqlStore):
            store.close()

    asyncio.run(run())


async def one_round(fleet: Federation) -> list[Update]:
    """Train and fold; returns the round's part of the ledger."""
    with fleet.service.store.reading() as tx:
        task = tx.task("lights")
        assert task is not None
    await fleet.round()
    number = fleet.ledger()[1][-1].number
    with fleet.service.store.reading() as tx:
        return list(tx.updates(task.id, MAIN, number, UpdateState.FOLDED))


def check_fold(fleet: Federation, number: int, ledger: list[Update]) -> None:
    """Version n+1 is the method's own fold of the frames as they were sent, in the order of the ledger."""
    assert sorted(str(update.rank) for update in ledger) == sorted(map(str, RANKS))
    frames = {lease: frame for world in fleet.worlds for t in world.transports for lease, frame in t.frames}
    before, after = fleet.ledger()[0][number : number + 2]
    theta, method = fleet.theta(before), fleet.spec.method
    contributions = []
    for update in ledger:
        layout = layout_of(fleet.adapter, update.rank)
        payload = decode_update(frames[update.lease_id])[1]
        delta = decode_delta(fleet.spec.codec, layout.everything, payload)
        contributions.append(Contribution(delta=delta, examples=update.examples, rank=update.rank))
    bases = bases_of(method, fleet.adapter, theta)
    live = fleet.adapter.layout.everything
    step = server_step(fleet.spec, fleet.adapter, bases, live, contributions, None)
    assert step.theta.tobytes() == fleet.theta(after).tobytes()
    assert after.report == step.report
    assert 0 <= after.report["truncated_share_mean"] <= after.report["truncated_share_worst"] < 1


def layout_of(adapter: AdapterSpec, rank: int | None) -> FactorLayout:
    return (adapter if rank is None else adapter.at_rank(rank)).layout


def check_versions(fleet: Federation, case: Case) -> None:
    """Every version has its variants under the same number, each the method's own of the main one."""
    versions, _ = fleet.ledger()
    assert [version.number for version in versions] == [0, 1, 2, 3, 4]
    with fleet.service.store.reading() as tx:
        for version in versions:
            for rank in (1, 2):
                variant = tx.version(version.task_id, rank_branch(rank), version.number)
                assert variant is not None
                expected = fleet.spec.method.variant(case.adapter, fleet.theta(version), rank)
                assert fleet.theta(variant, rank).tobytes() == expected.tobytes()


def check_devices(fleet: Federation, case: Case) -> None:
    sizes = []
    for world, rank in zip(fleet.worlds, RANKS, strict=True):
        layout = layout_of(case.adapter, rank)
        assert not any(isinstance(event, events.GaveUp | events.Dropped) for event in world.seen)
        for _, frame in world.transports[0].frames:
            payload = decode_update(frame)[1]
            assert len(payload) == payload_bytes(fleet.spec.codec, layout.everything)
        sizes.append(len(frame))
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3]


@every_case
def test_people_get_the_main_version(case: Case, tmp_path: Path) -> None:
    async def run() -> None:
        async with federation(
            tmp_path, case.text, case.adapter, memory_mb=MEMORY_MB, runtime=case.runtime
        ) as fleet:
            await fleet.round()
            files = await admin_versions.version_files(fleet.service, "lights", 1)
            assert isinstance(files, dict)
            assert len(files["factors.safetensors"]) > 4 * case.adapter.layout.size
            rows = await admin_versions.list_versions(fleet.service, "lights")
            assert isinstance(rows, list)
            assert [(row.branch, row.number) for row in rows] == [("main", 0), ("main", 1)]
            assert rows[1].report["effective_rank_least"] > 0

    asyncio.run(run())


def test_a_frame_of_another_rank_than_the_leases_is_refused_with_its_layout(tmp_path: Path) -> None:
    case = CASES["tt-svd-fedtt"]

    async def run() -> None:
        async with federation(tmp_path, case.text, case.adapter, memory_mb=(256, 4096)) as fleet:
            low, high = fleet.devices
            for device in (low, high):
                await device.run(until=lambda step: isinstance(step, events.Trained))
            mine, other = low.journal.state.phase, high.journal.state.phase
            assert isinstance(mine, Trained)
            assert isinstance(other, Trained)
            low.journal.update(phase=replace(mine, frame=other.frame))
            step = await low.step()
            assert isinstance(step, events.Dropped)
            assert Code.WRONG_LAYOUT.value in step.reason or Code.TOO_LARGE.value in step.reason
            await high.run(until=lambda step: isinstance(step, events.Acknowledged))

    asyncio.run(run())


def test_a_plan_of_a_rank_the_bundle_lacks_is_given_back(tmp_path: Path) -> None:
    case = CASES["tt-svd-fedtt"]

    async def run() -> None:
        async with federation(tmp_path, case.text, case.adapter, memory_mb=(256,)) as fleet:
            (device,) = fleet.devices
            await device.run(until=lambda step: isinstance(step, events.Granted))
            leased = device.journal.state.phase
            assert isinstance(leased, Leased)
            forged = replace(leased.work, plan=replace(leased.work.plan, rank=9))
            device.journal.update(phase=replace(leased, work=forged))
            step = await device.step()
            assert isinstance(step, events.GaveUp)
            assert step.code is FailureCode.BUNDLE
            assert "rank = 9" in step.detail

    asyncio.run(run())


@pytest.mark.parametrize(
    ("text", "adapter", "complaint"),
    [
        (CASES["flexlora"].text, tt_adapter(), "it trains 'lora' adapters and the bundle has 'tt': export"),
        (CASES["tt-svd-fedtt"].text, lora_adapter(), "it trains 'tt' adapters and the bundle has 'lora'"),
        (CASES["tt-svd-fedtt"].text, tt_adapter(rank=2), "ranks below 2, the bundle's own"),
        (
            TASK.format(name="tt-svd-fedtt", second=1),
            tt_adapter(),
            "rising, rising and falling from tier to tier",
        ),
        (TASK.format(name="fedtt", second=2), tt_adapter(), "method.tiers = "),
    ],
)
def test_a_task_that_does_not_fit_its_bundle_is_refused_before_anything_is_stored(
    text: str, adapter: AdapterSpec, complaint: str, tmp_path: Path
) -> None:
    async def run() -> None:
        plain = 'name = "other"\n[rounds]\ncount = 1\ncohort = 1\n[method]\nname = "fedavg"\n'
        async with federation(tmp_path, plain, adapter, memory_mb=()) as fleet:
            with fleet.service.store.reading() as tx:
                bundle = tx.tasks()[0].bundle
            answer = await admin.create_task(fleet.service, text, bundle)
            assert isinstance(answer, Problem)
            assert answer.code is Code.MALFORMED
            assert complaint in answer.detail
            assert [task.name for task in await admin.list_tasks(fleet.service)] == ["other"]

    asyncio.run(run())


def test_first_factors_too_large_for_a_variant_are_refused_before_anything_is_stored(tmp_path: Path) -> None:
    plain = 'name = "other"\n[rounds]\ncount = 1\ncohort = 1\n[method]\nname = "fedavg"\n'
    case = CASES["tt-svd-fedtt"]
    huge = np.full(case.adapter.layout.size, 3e38, np.float32)

    async def run() -> None:
        async with federation(tmp_path, plain, case.adapter, memory_mb=(), first=huge) as fleet:
            with fleet.service.store.reading() as tx:
                bundle = tx.tasks()[0].bundle
            answer = await admin.create_task(fleet.service, case.text, bundle)
            assert isinstance(answer, Problem)
            assert "too large for a variant" in answer.detail
            assert [task.name for task in await admin.list_tasks(fleet.service)] == ["other"]

    asyncio.run(run())


def test_a_device_changes_its_tier_when_its_memory_changes(tmp_path: Path) -> None:
    case = CASES["tt-svd-fedtt"]

    async def run() -> None:
        async with federation(
            tmp_path, case.text.replace("cohort = 4", "cohort = 1"), case.adapter, memory_mb=(256,)
        ) as fleet:
            (device,) = fleet.devices
            sizes: list[int] = []
            for memory in (256, 1024, 0, 256):
                device.config = dataclasses.replace(device.config, memory_mb=memory)
                await device.run(until=lambda step: isinstance(step, events.Acknowledged))
                sizes.append(len(fleet.worlds[0].transports[0].frames[-1][1]))
            assert sizes[0] == sizes[3] < sizes[1] < sizes[2]
            assert np.isfinite(fleet.theta(fleet.ledger()[0][-1])).all()

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_a_device_trains_at_the_rank_of_its_last_measured_time(kind: str, tmp_path: Path) -> None:
    case = CASES["tt-svd-fedtt"]
    text = case.text.replace("cohort = 4", "cohort = 1")
    text = text.replace("below_mb = 512", "slower_than_s = 300").replace(
        "below_mb = 2048", "slower_than_s = 60.0"
    )

    async def run() -> None:
        store = store_of(kind, tmp_path)
        async with federation(tmp_path, text, case.adapter, memory_mb=(256,), store=store) as fleet:
            (device,), (world,) = fleet.devices, fleet.worlds
            for takes_s in (900.0, 100.0, 10.0, 10.0):
                await device.run(until=lambda step: isinstance(step, events.Trained))
                await world.clock.advance(takes_s)
                await device.run(until=lambda step: isinstance(step, events.Acknowledged))
            await device.run(until=lambda step: isinstance(step, events.Granted))
            with fleet.service.store.reading() as tx:
                rounds = [r for r in tx.rounds(1)[::-1] if r.state is RoundState.FOLDED]
                ranks = [u.rank for r in rounds for u in tx.updates(1, MAIN, r.number, UpdateState.FOLDED)]
            assert ranks == [None, 1, 2, None]  # the first unmeasured, then by the time before
        if isinstance(store, SqlStore):
            store.close()

    asyncio.run(run())


def test_an_emulated_fleet_folds_late_updates_of_all_ranks_robustly(tmp_path: Path) -> None:
    task = small_task(rounds=6, cohort=8, buffer=4, quorum=3, max_staleness=3)
    task = replace(task, method=TTSVDFedTT(tiers=(Tier(rank=1, below_mb=512),)), fold=Median())
    slow, quick = Profile(name="slow", memory_mb=256, step_s=30.0), Profile(name="quick", memory_mb=4096)
    fleet = SmallFleet(tmp_path, devices=16, task=task, profiles=(slow, quick))
    fleet.run()
    assert fleet.server.version.number == 6
    with fleet.server.service.store.reading() as tx:
        rounds = tx.rounds(fleet.server.task.id)
        found = {
            (update.rank, round_.version_number > update.version_number)
            for round_ in rounds
            for update in tx.updates(round_.task_id, MAIN, round_.number, UpdateState.FOLDED)
        }
    assert found >= {(None, False), (1, True)}


def test_an_emulated_fleet_trains_at_the_ranks_of_its_profiles(tmp_path: Path) -> None:
    tiers = (Tier(rank=1, below_mb=512),)
    task = replace(small_task(cohort=12), method=TTSVDFedTT(tiers=tiers))
    phone, board = Profile(name="phone", memory_mb=256), Profile(name="board", memory_mb=4096)
    fleet = SmallFleet(tmp_path, devices=12, task=task, profiles=(phone, board))
    fleet.run()
    assert fleet.server.ended
    with fleet.server.service.store.reading() as tx:
        updates = [
            update
            for round_ in (1, 2, 3)
            for update in tx.updates(fleet.server.task.id, MAIN, round_, UpdateState.FOLDED)
        ]
    ranks = [update.rank for update in updates]
    assert len(ranks) == 36
    assert set(ranks) == {None, 1}
    by_device = {update.device_id: update.rank for update in updates}
    assert all(by_device[update.device_id] == update.rank for update in updates)
    assert fleet.server.version.report["effective_rank_least"] > 0
