"""HierFedTT from end to end: real devices and the real service; a server that starts anew; a whole fleet."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from aggregator.service import Service
from edge_client import events
from edge_client.bundle import open_bundle
from edge_client.device_config import DeviceConfig
from edge_client.examples import ExampleStore
from edge_client.onnx_runtime import OnnxRuntime
from fedtt.algorithms import HierFedTT
from fedtt.codec import payload_bytes
from fedtt.label_counts import decode_label_counts
from fedtt.wire import decode_update
from fleet.profiles import Profile
from storage.records import MAIN, TaskState
from storage.sql import SqlStore
from tests.support.federations import Federation, federation
from tests.support.fleets import SmallFleet, small_task
from tests.support.in_process import TOKEN
from tests.support.trains import long_adapter

ADAPTER = long_adapter(layers=3)
TASK = """
name = "lights"
seed = 5
[rounds]
count = 6
cohort = 6
deadline_s = 100000
retry_s = 10
[training]
learning_rate = 0.03
local_steps = 5
batch_size = 2
[codec]
error_feedback = true
[method]
name = "hier-fedtt"
groups = 2
warmup_rounds = 1
regroup_every = 3
label_epsilon = 20.0
"""


async def go_round(fleet: Federation) -> None:
    """Every device does one piece of work, if there is any for it."""
    for device in fleet.devices:
        await device.run(until=lambda step: isinstance(step, events.Acknowledged | events.Waiting))


def state_of(fleet: Federation) -> TaskState:
    with fleet.service.store.reading() as tx:
        task = tx.task("lights")
    assert task is not None
    return task.state


async def until_done(fleet: Federation) -> None:
    for _ in range(60):
        if state_of(fleet) is TaskState.FINISHED:
            return
        await go_round(fleet)
    raise AssertionError("the task has not come to its end")


def test_groups_learn_together_send_less_and_tell_their_labels_once(tmp_path: Path) -> None:
    async def run() -> None:
        async with federation(tmp_path, TASK, ADAPTER, memory_mb=(0,) * 6, label_epsilon=50.0) as fleet:
            await until_done(fleet)
            check(fleet)

    asyncio.run(run())


def check(fleet: Federation) -> None:
    main, _ = fleet.ledger()
    assert [version.number for version in main] == list(range(7))
    losses = [version.loss_last for version in main[1:]]
    assert losses[-1] is not None
    assert losses[0] is not None
    assert losses[-1] < 0.8 * losses[0]
    assert all(
        set(version.report) == {"groups_folded", "agreement", "depth_exponent"} for version in main[2:]
    )
    frames = [frame for world in fleet.worlds for transport in world.transports for frame in transport.frames]
    method = fleet.spec.method
    assert isinstance(method, HierFedTT)
    sizes = {payload_bytes(fleet.spec.codec, method.live_at(ADAPTER, depth)) for depth in (1, 2, 3)}
    sent = [decode_update(frame, labels=5) for _, frame in frames]
    assert {len(payload) for _, payload in sent} <= sizes
    whole = payload_bytes(fleet.spec.codec, ADAPTER.layout.everything)
    assert [len(payload) for _, payload in sent].count(whole) < len(
        sent
    ) / 2  # after the warm-up fewer blocks
    told = [decode_label_counts(header.label_counts, 5) for header, _ in sent if header.label_counts]
    assert len(told) == 6  # each device once
    assert all(
        abs(int(counts.sum()) - 4) <= 3 for counts in told
    )  # four examples; at ε = 20 next to no noise
    with fleet.service.store.reading() as tx:
        assert len(set(tx.members(1).values())) == 2


@pytest.mark.slow
def test_groups_train_on_the_real_graphs_of_their_depth(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    adapter = bundle.manifest.adapter
    task = TASK.replace("regroup_every = 3", "bytes_weight = 1.0").replace("0.03", "0.01")

    async def run() -> None:
        async with federation(
            tmp_path,
            task,
            adapter,
            memory_mb=(0,) * 6,
            runtime=lambda _: OnnxRuntime(bundle),
            bundle=tiny_bundle,
        ) as fleet:
            for number, world in enumerate(fleet.worlds):
                world.examples = ExampleStore(None)
                for row, word in enumerate(("alarm", "lights", "pay", "weather")):
                    world.examples.add(f"{word} please", (row + number) % 2 + 2 * (row // 2))
                fleet.devices[number] = world.device(config=DeviceConfig(token=TOKEN))[0]
            await until_done(fleet)
            for world in fleet.worlds:
                first, *later = [e.depth for e in world.seen if isinstance(e, events.Trained)]
                assert first is None  # the warm-up trains all blocks, by the whole step
                assert 1 in later  # a group may train the last alone, over what lies below
            main, _ = fleet.ledger()
            assert [version.number for version in main] == list(range(7))
            start, end = fleet.theta(main[0]), fleet.theta(main[-1])
            below = adapter.size_below(1)
            assert np.isfinite(end).all()
            assert not np.array_equal(start[below:], end[below:])
            layout = adapter.layout
            live = HierFedTT().live_at(adapter, 1)
            sent = {
                len(decode_update(frame)[1])
                for world in fleet.worlds
                for transport in world.transports
                for _, frame in transport.frames
            }
            assert sent == {payload_bytes(fleet.spec.codec, which) for which in (layout.everything, live)}

    asyncio.run(run())


@pytest.mark.slow
def test_labels_are_estimated_from_what_real_graphs_train_and_no_device_tells_any(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = open_bundle(tiny_bundle)
    task = TASK.replace("label_epsilon = 20.0", 'label_source = "updates"')

    async def run() -> None:
        async with federation(
            tmp_path,
            task,
            bundle.manifest.adapter,
            memory_mb=(0,) * 6,
            label_epsilon=50.0,
            runtime=lambda _: OnnxRuntime(bundle),
            bundle=tiny_bundle,
        ) as fleet:
            for number, world in enumerate(fleet.worlds):
                world.examples = ExampleStore(None)
                for word in ("alarm", "lights", "pay", "weather"):
                    world.examples.add(f"{word} please", number % 4)
                config = DeviceConfig(token=TOKEN, label_epsilon=50.0)
                fleet.devices[number] = world.device(config=config)[0]
            await go_round(fleet)
            frames = [
                f for world in fleet.worlds for transport in world.transports for _, f in transport.frames
            ]
            assert len(frames) == 6
            assert all(decode_update(frame)[0].label_counts == b"" for frame in frames)
            with fleet.service.store.reading() as tx:
                told = {part.device_id: part.label_counts for part in tx.participants(1)}
            for number, device in enumerate(fleet.devices):
                counts = decode_label_counts(told[device.journal.state.device] or b"", 4)
                assert counts.sum() == 4  # the examples that a device has
                assert counts[number % 4] >= 3

    asyncio.run(run())


def test_devices_whose_owners_have_not_agreed_tell_nothing_and_are_grouped_all_the_same(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        async with federation(tmp_path, TASK, ADAPTER, memory_mb=(0,) * 6) as fleet:
            await until_done(fleet)
            frames = [
                f for world in fleet.worlds for transport in world.transports for _, f in transport.frames
            ]
            assert all(decode_update(frame)[0].label_counts == b"" for frame in frames)
            assert all(device.journal.state.label_counts == {} for device in fleet.devices)

    asyncio.run(run())


def test_a_server_that_starts_anew_in_the_middle_goes_on_to_the_same_end(tmp_path: Path) -> None:
    async def run(directory: Path, restart_after: int | None) -> tuple[str, list[tuple[str, int, str]]]:
        directory.mkdir()
        path = directory / "ledger.db"
        store = SqlStore.open(path)
        try:
            async with federation(directory, TASK, ADAPTER, memory_mb=(0,) * 6, store=store) as fleet:
                if restart_after is not None:
                    for _ in range(restart_after):
                        await go_round(fleet)
                    await fleet.service.writer.stop()
                    store.close()
                    store = SqlStore.open(path)
                    fleet.service = Service(store, fleet.service.blobs, fleet.service.clock)
                    fleet.service.writer.start()
                    for number, world in enumerate(fleet.worlds):
                        world.service = fleet.service
                        fleet.devices[number] = world.device(config=DeviceConfig(token=TOKEN))[0]
                await until_done(fleet)
                with store.reading() as tx:
                    versions = [(v.branch, v.number, v.sha256) for v in tx.versions(1)]
                    newest = tx.latest_version(1, MAIN)
                if restart_after is not None:
                    await fleet.service.writer.stop()
        finally:
            store.close()
        assert newest is not None
        return newest.sha256, versions

    plain = asyncio.run(run(tmp_path / "plain", None))
    assert {branch for branch, _, _ in plain[1]} == {MAIN, "group-1", "group-2"}
    for after in (1, 3):
        assert asyncio.run(run(tmp_path / f"after-{after}", after)) == plain


def whole_fleet(directory: Path, **method: Any) -> SmallFleet:
    """Forty devices, a quarter of them four times as slow."""
    spec = replace(
        small_task(rounds=12, cohort=12, deadline_s=3000.0),
        method=HierFedTT(**({"groups": 3, "warmup_rounds": 3, "label_epsilon": 1.0} | method)),
    )
    profiles = [
        Profile(name="fast", share=3.0, label_epsilon=5.0, speed_spread=0.2),
        Profile(name="slow", share=1.0, step_s=400.0),
    ]
    return SmallFleet(directory, devices=40, task=spec, profiles=profiles)


@pytest.mark.parametrize("method", [{}, {"regroup_every": 2, "bytes_weight": 0.0}])
def test_a_fleet_gives_the_same_bits_again(method: dict[str, Any], tmp_path: Path) -> None:
    fleets = [whole_fleet(tmp_path / f"{n}", **method) for n in range(2)]
    names = [fleet.run() for fleet in fleets]
    assert names[0] == names[1]
    for fleet in fleets:
        assert fleet.server.task.state is TaskState.FINISHED
        assert [version.number for version in fleet.versions] == list(range(1, 13))
        assert len(fleet.server.task.groups) == 3


def test_slow_devices_are_in_a_group_of_their_own_for_which_fast_ones_do_not_wait(tmp_path: Path) -> None:
    fleet = whole_fleet(tmp_path, time_weight=5.0, bytes_weight=0.0, regroup_every=2, max_frequency=4)
    fleet.run()
    with fleet.server.service.store.reading() as tx:
        parts = tx.participants(fleet.server.task.id)
        members = tx.members(fleet.server.task.id)
    slow = [p.device_id for p in parts if p.duration_s and p.duration_s / p.work > 100]
    assert slow
    assert len({members[device] for device in slow}) <= 2
    of_groups = {group.number: group for group in fleet.server.task.groups}
    assert of_groups[1].round_s < of_groups[3].round_s
    assert np.mean([members[device] for device in slow]) > 2
    assert of_groups[1].frequency * of_groups[1].depth >= of_groups[3].frequency * of_groups[3].depth
    assert of_groups[1].frequency > of_groups[3].frequency
