"""What a plan may take of a device, against what the device and its owner have to give."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from aggregator.metrics import totals
from edge_client import events
from edge_client.allowance import Pace, with_pace
from edge_client.conditions import Readings
from edge_client.device_config import DeviceConfig
from edge_client.journal import Idle
from edge_client.tokens import Batch
from fedtt.budget import Budget
from fedtt.errors import ConfigError, Unreachable
from fedtt.layout import Theta
from fedtt.messages import FailureCode
from storage.records import LeaseState
from tests.support.device_world import SPEC, World, in_world, trained
from tests.support.edge import MeanTarget
from tests.support.in_process import TOKEN


class Free:
    """A machine with so much memory."""

    def __init__(self, memory_mb: int) -> None:
        self.memory_mb = memory_mb

    def now(self) -> Readings:
        return Readings(memory_mb=self.memory_mb)


def set_budget(world: World, budget: Budget) -> None:
    """Of the task from now on, unchecked, as a server of another make may ask."""
    with world.service.store.transaction() as tx:
        task = tx.task(SPEC.name)
        assert task is not None
        tx.put_task(replace(task, spec=replace(task.spec, budget=budget)))


async def next_round(world: World, after_s: float = 1000) -> None:
    """The deadline of the round passes, and with it every lease."""
    await world.clock.advance(after_s)
    await world.service.tick()


def gave_up(step: events.Step) -> bool:
    return isinstance(step, events.GaveUp | events.Trained)


def given_back(world: World, code: FailureCode) -> int:
    """What the server has counted."""
    return totals(world.service.metrics.given_back, "code")[code.value]


async def declined(world: World, code: FailureCode, config: DeviceConfig | None = None) -> events.GaveUp:
    """The step in which a device declines, of which the server knows the code and nothing is left."""
    device, transport = world.device(config=config)
    step = await device.run(gave_up)
    assert isinstance(step, events.GaveUp)
    assert [failure.code for failure in transport.failures] == [code] == [step.code]
    assert transport.failures[0].detail == ""
    assert device.journal.state.phase == Idle()
    assert given_back(world, code) == 1
    with world.service.store.reading() as tx:
        assert {lease.state for lease in tx.leases_of(device._name, LeaseState.FAILED)} == {LeaseState.FAILED}
    return step


@pytest.mark.parametrize(("free_mb", "begins"), [(255, False), (256, True)])
def test_a_plan_that_may_use_more_memory_than_is_free_is_declined(
    tmp_path: Path, free_mb: int, begins: bool
) -> None:
    async def test(world: World) -> None:
        device, transport = world.device(conditions=Free(free_mb))
        step = await device.run(gave_up)
        assert trained(step) is begins
        if isinstance(step, events.GaveUp):
            assert step.code is FailureCode.MEMORY
            assert step.detail == f"the task may use 256 MiB of memory, {free_mb} are free here"
            assert "bundle_file" not in transport.calls  # nothing was loaded for it

    in_world(tmp_path, test, replace(SPEC, budget=Budget(memory_mb=256)))


def test_a_server_offers_no_work_to_a_device_that_said_it_has_too_little_memory(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, _ = world.device(config=DeviceConfig(token=TOKEN, memory_mb=255))
        step = await device.run(lambda step: isinstance(step, events.Waiting | events.Granted))
        assert isinstance(step, events.Waiting)
        assert step.reason == "the task may use 256 MiB of memory, you have 255"

    in_world(tmp_path, test, replace(SPEC, budget=Budget(memory_mb=256)))


def test_a_bundle_that_does_not_fit_the_budget_is_declined_by_its_manifest_alone(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        step = await declined(world, FailureCode.TRAFFIC)
        assert "bytes of the bundle and a version are missing, 250000 may be downloaded" in step.detail
        held = {path.name for path in world.home.bundles.rglob("*") if path.is_file()}
        assert held == set()  # nothing stays of it

    in_world(tmp_path, test, replace(SPEC, budget=Budget(download_bytes=250_000)))


def test_what_was_downloaded_before_counts_no_more(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        def breaks_off(name: str) -> None:
            if name == "bundle_file" and list(world.home.bundles.rglob("base.bin.part")):
                raise Unreachable("it broke off")

        device, _ = world.device(after=breaks_off)
        await device.run(lambda step: isinstance(step, events.Retrying))
        (part,) = world.home.bundles.rglob("base.bin.part")
        set_budget(world, Budget(download_bytes=250_000))
        device, _ = world.device()
        await next_round(world)
        assert part.stat().st_size == 100_000
        assert trained(await device.run(gave_up))

    in_world(tmp_path, test, replace(SPEC, budget=Budget()))


def test_an_owner_may_allow_less_than_the_plan_does(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        step = await declined(world, FailureCode.TIME, DeviceConfig(token=TOKEN, max_training_s=1e-9))
        assert step.detail == "training has taken the 1e-09 s that it may"

    in_world(tmp_path, test, replace(SPEC, budget=Budget(time_s=60)))


def test_a_version_too_large_is_declined_where_the_bundle_is_there(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, _ = world.device()
        await device.run(lambda step: isinstance(step, events.Acknowledged))
        version_bytes = next(world.home.versions.iterdir()).stat().st_size
        set_budget(world, Budget(download_bytes=version_bytes - 1))
        step = await declined(world, FailureCode.TRAFFIC)
        assert step.detail == f"a version has {version_bytes} bytes, {version_bytes - 1} may be downloaded"

    in_world(tmp_path, test, replace(SPEC, budget=Budget()))


class Slow(MeanTarget):
    """Each batch takes its time on the wall."""

    def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
        time.sleep(0.05)
        return super().gradient(theta, batch)


def test_training_ends_at_its_limit_of_time_and_is_declined_at_once_from_then_on(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.runtime = slow = Slow()
        step = await declined(world, FailureCode.TIME)
        assert step.detail == "training has taken the 0.03 s that it may"
        assert len(slow.batches) == 1  # of two: the second did not begin
        device, _ = world.device()
        await next_round(world)
        step = await device.run(gave_up)  # type: ignore[assignment]
        assert isinstance(step, events.GaveUp)
        takes = re.fullmatch(r"training would take ([\d.]+) s here, it may take 0.03", step.detail)
        assert takes
        assert float(takes[1]) > 0.03
        assert len(slow.batches) == 1
        await next_round(world, 31 * 86400)  # what it took then says nothing now
        device, _ = world.device()
        await device.run(gave_up)
        assert len(slow.batches) == 2

    in_world(tmp_path, test, replace(SPEC, budget=Budget(time_s=0.03)))


def test_a_frame_that_may_be_longer_than_allowed_is_not_trained_for(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        set_budget(world, Budget(upload_bytes=100))
        step = await declined(world, FailureCode.TRAFFIC)
        assert step.detail.endswith("100 may be sent")
        assert not world.runtime.batches  # type: ignore[attr-defined]

    in_world(tmp_path, test, replace(SPEC, budget=Budget()))


def test_a_task_whose_first_frame_is_beyond_its_budget_is_refused() -> None:
    from tests.support.tiny import tiny_spec

    with pytest.raises(ConfigError, match=r"budget.upload_bytes = 100 is not allowed: at least \d+"):
        replace(SPEC, budget=Budget(upload_bytes=100)).check(tiny_spec())


def test_the_tighter_of_two_budgets_holds_one_by_one() -> None:
    ours, theirs = Budget(memory_mb=5, time_s=2.0), Budget(memory_mb=4, download_bytes=7)
    assert ours.within(theirs) == theirs.within(ours) == Budget(memory_mb=4, time_s=2.0, download_bytes=7)


def test_paces_are_few_and_not_believed_where_the_clock_was_wrong() -> None:
    paces: dict[str, Pace] = {}
    for number in range(40):
        paces = with_pace(paces, str(number), Pace(row_s=1.0, at=1000.0))
    assert list(paces) == [str(number) for number in range(24, 40)]
    assert paces["30"].expected_s(3, now=1001.0) == 3.0
    assert paces["30"].expected_s(3, now=999.0) is None
