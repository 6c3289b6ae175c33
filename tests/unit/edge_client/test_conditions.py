"""When a device may work: readings against limits, and what it does where they do not hold."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from edge_client import events
from edge_client.conditions import Limits, Readings, while_holding
from edge_client.device_config import DeviceConfig
from edge_client.journal import Idle, Leased, Trained
from edge_client.tokens import Batch
from fedtt.errors import ConfigError, Declined
from fedtt.layout import Theta
from fedtt.messages import FailureCode
from storage.records import LeaseState
from tests.support.device_world import World, granted, in_world, trained
from tests.support.edge import MeanTarget
from tests.support.in_process import TOKEN

GOOD = Readings(battery=0.9, charging=True, unmetered=True, idle=True, temperature_c=40.0)
STRICT = Limits(
    only_charging=True, only_unmetered=True, only_idle=True, min_battery=0.4, max_temperature_c=60.0
)


class Told:
    """Conditions as a test says they are."""

    def __init__(self, readings: Readings = GOOD) -> None:
        self.readings = readings

    def now(self) -> Readings:
        return self.readings


def config(limits: Limits = STRICT) -> DeviceConfig:
    return DeviceConfig(token=TOKEN, limits=limits, watch_s=0.01)


def test_where_all_holds_nothing_stands_against_work() -> None:
    assert STRICT.against_work(GOOD) == ""


def test_without_limits_a_board_that_knows_nothing_of_itself_may_work() -> None:
    assert Limits().against_work(Readings()) == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"battery": 0.39}, "the battery is at 39%, its owner asks for 40%"),
        ({"charging": False}, "it is not charging"),
        ({"charging": None}, "nothing says whether it is charging"),
        ({"unmetered": False}, "its network is metered"),
        ({"unmetered": None}, "nothing says whether its network is unmetered"),
        ({"idle": False}, "it is in use"),
        ({"idle": None}, "nothing says whether it is idle"),
        ({"temperature_c": 61.0}, "it is at 61 °C, its owner allows 60 °C"),
        ({"temperature_c": None}, "nothing says how hot it is"),
    ],
)
def test_what_does_not_hold_is_said_also_where_nobody_knows(change: dict[str, object], reason: str) -> None:
    assert STRICT.against_work(replace(GOOD, **change)) == reason


def test_a_device_without_a_battery_has_none_to_spare() -> None:
    assert STRICT.against_work(replace(GOOD, battery=None)) == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [("min_battery", -0.1), ("min_battery", 40.0), ("max_temperature_c", 0.0), ("max_temperature_c", 400.0)],
)
def test_a_limit_that_makes_no_sense_is_refused_when_it_is_made(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        Limits(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["rest_s", "watch_s"])
def test_a_device_that_would_look_without_a_pause_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        DeviceConfig(**{field: 0.0})  # type: ignore[arg-type]


def test_a_device_rests_until_the_conditions_hold_and_asks_for_no_work_before(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        told = Told(replace(GOOD, charging=False))
        device, transport = world.device(config=config(), conditions=told)
        assert isinstance(await device.step(), events.Enrolled)
        resting = await device.step()
        assert isinstance(resting, events.Resting)
        assert (resting.reason, resting.pause_s) == ("it is not charging", 60.0)
        assert transport.calls == ["enroll"]
        told.readings = GOOD
        assert isinstance(await device.step(), events.Granted)
        await device.run(until=trained)

    in_world(tmp_path, test)


def test_training_stops_at_its_next_batch_when_conditions_break_and_the_lease_goes_back(
    tmp_path: Path,
) -> None:
    told, seen = Told(), threading.Event()

    class Unplugging(MeanTarget):
        """Unplugged within the first batch, which ends some time after that has been seen."""

        def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
            told.readings = replace(GOOD, charging=False)
            seen.wait(10)
            time.sleep(0.1)
            return super().gradient(theta, batch)

    class Watched:
        def now(self) -> Readings:
            readings = told.readings
            if not readings.charging:
                seen.set()
            return readings

    async def test(world: World) -> None:
        runtime = Unplugging()
        world.runtime = runtime
        device, transport = world.device(config=config(), conditions=Watched())
        work = await device.run(until=granted)
        assert isinstance(work, events.Granted)
        gave_up = await device.step()
        assert isinstance(gave_up, events.GaveUp)
        assert (gave_up.code, gave_up.detail) == (FailureCode.CONDITIONS, "it is not charging")
        assert len(runtime.batches) == 1, "of two"
        assert [failure.detail for failure in transport.failures] == [""], "the server learns the code alone"
        with world.service.store.reading() as tx:
            lease = tx.lease(work.lease)
        assert lease is not None
        assert lease.state is LeaseState.FAILED
        assert isinstance(device.journal.state.phase, Idle)
        assert isinstance(await device.step(), events.Resting)

    in_world(tmp_path, test)


def test_a_lease_that_a_restart_finds_under_bad_conditions_goes_back_untrained(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, _ = world.device(config=config(), conditions=Told())
        await device.run(until=granted)
        assert isinstance(device.journal.state.phase, Leased)
        device, transport = world.device(config=config(), conditions=Told(replace(GOOD, temperature_c=80.0)))
        gave_up = await device.step()
        assert isinstance(gave_up, events.GaveUp)
        assert gave_up.code is FailureCode.CONDITIONS
        assert transport.calls == ["fail"], "nothing was downloaded"

    in_world(tmp_path, test)


def test_a_frame_waits_for_an_unmetered_network_and_for_nothing_else(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        told = Told()
        device, transport = world.device(config=config(), conditions=told)
        await device.run(until=trained)
        told.readings = replace(GOOD, unmetered=False, battery=0.05)
        assert isinstance(await device.step(), events.Resting)
        phase = device.journal.state.phase
        assert isinstance(phase, Trained)
        told.readings = replace(GOOD, battery=0.05, charging=False)
        assert isinstance(await device.step(), events.Acknowledged)
        assert transport.frames == [(phase.lease, phase.frame)]

    in_world(tmp_path, test)


def test_a_frame_that_was_stored_just_before_conditions_broke_is_kept_and_sent(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        told = Told()
        device, transport = world.device(config=config(), conditions=told)
        await device.run(until=granted)
        write = device.journal._place.write

        def slow(state: object) -> None:
            write(state)  # type: ignore[arg-type]
            if isinstance(state.phase, Trained):  # type: ignore[attr-defined]
                told.readings = replace(GOOD, idle=False)
                threading.Event().wait(0.2)

        device.journal._place.write = slow  # type: ignore[method-assign]
        resting = await device.step()
        assert isinstance(resting, events.Resting)
        assert isinstance(device.journal.state.phase, Trained)
        assert isinstance(await device.step(), events.Acknowledged)
        assert len(transport.frames) == 1

    in_world(tmp_path, test)


def test_work_that_ends_while_conditions_break_has_its_result() -> None:
    async def work() -> int:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            return 7
        return 0

    answers = iter(["", "hot"])

    async def broken() -> str:
        return next(answers)

    assert asyncio.run(while_holding(work, broken, 0.01)) == 7


def test_work_that_fails_while_it_is_stopped_says_how() -> None:
    async def work() -> None:
        try:
            await asyncio.sleep(10)
        finally:
            raise ValueError("disk full")

    answers = iter(["", "hot"])

    async def broken() -> str:
        return next(answers)

    with pytest.raises(ValueError, match="disk full"):
        asyncio.run(while_holding(work, broken, 0.01))


@pytest.mark.parametrize("times", [1, 3])
def test_cancelling_what_holds_cancels_the_work_and_waits_for_its_end(times: int) -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(10)
        finally:
            await asyncio.sleep(0.05)
            ended.append(True)

    async def broken() -> str:
        return ""

    async def run() -> None:
        task = asyncio.ensure_future(while_holding(work, broken, 10))
        for _ in range(times):
            await asyncio.sleep(0.01)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == [True]

    asyncio.run(run())


def test_work_is_not_begun_where_conditions_do_not_hold() -> None:
    begun = []

    async def work() -> None:
        begun.append(True)

    async def broken() -> str:
        return "hot"

    with pytest.raises(Declined, match="hot"):
        asyncio.run(while_holding(work, broken, 10))
    assert begun == []
