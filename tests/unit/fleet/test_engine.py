"""Emulated devices against the real aggregator, in virtual time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace
from safetensors.numpy import load_file

from edge_client.runtime import Runtimes
from fedtt.budget import Budget
from fedtt.codec.difference import encode_difference
from fedtt.wire import encode_theta
from fleet.pool import OneByOnePool
from fleet.population import Population, device_key
from fleet.profiles import Profile
from storage.records import MAIN, TaskState, UpdateState
from tests.support.edge import MeanTarget
from tests.support.fleets import SmallFleet, small_task

UNEQUAL = (
    Profile(name="phone", share=3, step_s=2.0, speed_spread=0.5, dropout=0.3),
    Profile(name="board", share=1, step_s=0.5, up_bps=1e5, down_bps=1e5, latency_s=0.5, power="mains"),
)


def trained() -> OneByOnePool:
    return OneByOnePool(Runtimes(lambda bundle: MeanTarget()))


def test_a_hundred_devices_train_a_task_to_its_end(tmp_path: Path) -> None:
    small = SmallFleet(tmp_path, devices=100, task=small_task(cohort=100))
    small.run()
    assert small.server.task.state is TaskState.FINISHED
    assert [version.updates for version in small.versions] == [100, 100, 100]
    assert small.population.participations.sum() == 300


def test_the_same_seed_gives_the_same_bits_also_with_unequal_devices_that_vanish(tmp_path: Path) -> None:
    task = small_task(cohort=12, buffer=8, deadline_s=60.0)

    def run(name: str, seed: int = 1) -> tuple[str, list[object]]:
        small = SmallFleet(
            tmp_path / name, devices=20, task=task, profiles=UNEQUAL, pool=trained(), seed=seed
        )
        return small.run(), list(small.rows)

    first, again, other = run("first"), run("again"), run("other", seed=2)
    assert first == again
    assert first[0] != other[0]


def test_asynchronous_training_is_as_repeatable(tmp_path: Path) -> None:
    task = small_task(rounds=6, cohort=10, buffer=4, max_staleness=3)

    def run(name: str) -> SmallFleet:
        small = SmallFleet(tmp_path / name, devices=20, task=task, profiles=UNEQUAL, pool=trained())
        small.run()
        return small

    first, again = run("first"), run("again")
    assert first.server.version == again.server.version
    assert len(first.versions) == 6


def test_a_fleet_in_process_loads_no_library_of_sockets_signatures_or_databases() -> None:
    heavy = "('aiohttp', 'cryptography', 'sqlalchemy', 'onnxruntime', 'torch')"
    code = f"import sys, fleet.engine, fleet.server; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_devices_exist_only_while_they_are_awake(tmp_path: Path) -> None:
    small = SmallFleet(tmp_path, devices=50, task=small_task(cohort=5, retry_s=1000.0))
    most = 0
    small.fleet.start()
    small.server.run_clock()

    def look() -> bool:
        nonlocal most
        most = max(most, small.fleet.awake)
        return small.server.ended

    small.time.run(look, small.time.now() + 86400)
    assert small.server.task.state is TaskState.FINISHED
    assert most < 20  # 5 that train, and those on their way to being told to wait


def test_what_a_device_sends_and_receives_takes_time(tmp_path: Path) -> None:
    slow = Profile(name="slow", up_bps=1000.0, down_bps=2000.0, latency_s=1.0, step_s=5.0)
    small = SmallFleet(tmp_path, devices=1, task=small_task(rounds=1, cohort=1), profiles=(slow,))
    small.run()
    (row,) = small.rows
    granted_s, ended_s, frame_bytes = float(str(row[3])), float(str(row[4])), int(str(row[10]))
    # bundle 1000 B down, version, 2 steps of 5 s at a batch of 4 of 16, frame up, receipt down: 640 B a head
    manifest = small.bundle.manifest
    first = load_file(small.bundle.directory / manifest.initial)
    theta = encode_theta(manifest.adapter.layout.flatten(first))
    version_bytes = len(encode_difference(bytes(len(theta)), theta))  # a new device holds zeros
    least = 8 * 1000 / 2000 + (1 + 8 * 640 / 1000 + 8 * version_bytes / 2000) + 2 * 5 * 4 / 16
    least += 1 + 8 * (640 + frame_bytes) / 1000
    receipt_s = 8 * 200 / 2000
    assert least < ended_s - granted_s < least + receipt_s


def test_a_device_that_cannot_train_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    profiles = (Profile(name="able"), Profile(name="tiny", memory_mb=10))
    small = SmallFleet(
        tmp_path, devices=10, task=small_task(rounds=9, cohort=5), profiles=profiles, needs_memory_mb=100
    )
    small.run()
    assert small.server.task.state is TaskState.FINISHED
    assert small.population.left_out.sum() == 5
    assert list(small.fleet.left_out) == ["training needs 100 MB, 'tiny' has 10"]


def test_a_device_too_slow_for_the_budget_declines_and_loses_no_more_than_its_time(tmp_path: Path) -> None:
    profiles = (Profile(name="quick", step_s=1.0), Profile(name="slow", step_s=100.0))
    task = replace(small_task(cohort=10, buffer=5, quorum=5), budget=Budget(time_s=20.0))  # of 0.5 s and 50 s
    small = SmallFleet(tmp_path, devices=10, task=task, profiles=profiles)
    small.run()
    assert small.server.task.state is TaskState.FINISHED
    assert [version.updates for version in small.versions] == [5] * len(small.versions)
    quick = small.population.profile == 0
    assert (small.population.participations[~quick] == 0).all()
    assert (small.population.participations[quick] > 0).all()


def test_every_acknowledged_update_ends_in_one_state_and_is_a_row(tmp_path: Path) -> None:
    task = small_task(rounds=5, cohort=12, buffer=6, deadline_s=40.0)
    small = SmallFleet(tmp_path, devices=30, task=task, profiles=UNEQUAL, pool=trained())
    small.run()
    with small.server.service.store.reading() as tx:
        states = [
            update.state
            for number in range(1, 100)
            for state in UpdateState
            for update in tx.updates(small.server.task.id, MAIN, number, state)
        ]
    acknowledged = small.fleet.participations.outcomes["acknowledged"]
    assert len(states) == acknowledged
    assert sum(version.updates for version in small.versions) == states.count(UpdateState.FOLDED)
    assert small.fleet.participations.outcomes["vanished"] > 0


def test_sparse_visits_leave_a_large_population_asleep(tmp_path: Path) -> None:
    small = SmallFleet(
        tmp_path,
        devices=20_000,
        task=small_task(rounds=3, cohort=20),
        spread_s=86400.0,
        visit_every_s=86400.0,
    )
    small.run(10 * 86400.0)
    assert small.server.task.state is TaskState.FINISHED
    assert 60 <= (small.population.sent_bytes > 0).sum() < 2000


def test_kinds_of_devices_are_dealt_in_exact_shares() -> None:
    profiles = [Profile(name="a", share=2), Profile(name="b", share=1), Profile(name="c", share=1)]
    population = Population(size=1000, shards=7, profiles=profiles, seed=3)
    counts = [int((population.profile == kind).sum()) for kind in range(3)]
    assert counts == [500, 250, 250]
    assert sorted(set(population.shard.tolist())) == list(range(7))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_device_is_the_same_in_every_run_and_no_other_one(seed: int) -> None:
    keys = {device_key(seed, index) for index in range(100)}
    assert len(keys) == 100
    assert all(len(key) == 32 for key in keys)
    assert keys.isdisjoint({device_key(seed + 2, index) for index in range(100)})


def test_messages_that_go_through_their_bytes_change_nothing(tmp_path: Path) -> None:
    typed = SmallFleet(tmp_path / "typed", devices=20, profiles=UNEQUAL, pool=trained())
    framed = SmallFleet(tmp_path / "framed", devices=20, profiles=UNEQUAL, pool=trained(), framed=True)
    assert (typed.run(), typed.rows) == (framed.run(), framed.rows)
