"""Devices that are there in windows of time alone, against the real aggregator in virtual time."""

from __future__ import annotations

from pathlib import Path

from fleet.availability import Nightly, Trace
from fleet.profiles import Profile
from fleet.spec import NightlySpec
from storage.records import TaskState
from tests.support.fleets import SmallFleet, small_task


def test_a_device_whose_window_ends_goes_on_in_the_next_one(tmp_path: Path) -> None:
    slow = Profile(step_s=100.0)  # two steps at a batch of 4 of 16: 50 s
    windows = [[(0.0, 30.0), (500.0, 5000.0)]]
    small = SmallFleet(
        tmp_path,
        devices=1,
        task=small_task(rounds=1, cohort=1, deadline_s=2000.0),
        profiles=(slow,),
        availability=Trace(windows, 1_000_000.0),
    )
    small.run()
    assert small.server.task.state is TaskState.FINISHED
    (row,) = small.rows
    assert float(str(row[4])) > 550
    assert row[5] == "acknowledged"


def test_visits_in_a_window_leave_nothing_behind_in_the_clock(tmp_path: Path) -> None:
    """Each device waits for one thing, and its window's end for another, however often it came."""
    devices, lasts_s = 20, 5000.0
    small = SmallFleet(
        tmp_path,
        devices=devices,
        task=small_task(rounds=1000, cohort=2),
        availability=Trace([[(0.0, 2 * lasts_s)]] * devices, 1_000_000.0),
    )
    small.fleet.start()
    small.server.run_clock()
    most = 0

    def look() -> bool:
        nonlocal most
        most = max(most, small.time.waiting)
        return False

    small.time.run(look, small.time.now() + lasts_s)
    assert most <= 2 * devices + 10  # the server has some of its own
    assert small.fleet.participations.traffic.check_ins > 20 * devices


def test_whoever_is_awake_at_the_end_of_a_window_is_stopped_also_on_a_later_visit(tmp_path: Path) -> None:
    shift = [(0.0, 1000.0), (4000.0, 9000.0)]
    small = SmallFleet(
        tmp_path,
        devices=5,
        task=small_task(rounds=400, cohort=2, deadline_s=5000.0),
        profiles=(Profile(step_s=100.0),),  # two steps at a batch of 4 of 16: 50 s
        availability=Trace([shift] * 5, 1_000_000.0),
    )
    small.fleet.start()
    small.server.run_clock()
    small.time.run(lambda: False, 1_003_999.0)
    ended = [float(str(row[4])) for row in small.rows]
    assert len(ended) > 10  # of which the devices had several each
    assert max(ended) < 1000
    assert small.fleet.awake == 0
    small.time.run(lambda: False, 1_004_300.0)
    over = [row for row in small.rows if float(str(row[3])) < 1000 < float(str(row[4]))]
    assert over  # what was in hand when the window ended was gone on with in the next
    assert all(row[5] == "acknowledged" for row in over)


def test_a_fleet_that_charges_at_night_trains_through_two_nights(tmp_path: Path) -> None:
    small = SmallFleet(
        tmp_path,
        devices=4,
        task=small_task(rounds=1000, cohort=2, retry_s=1200.0),
        availability=Nightly(NightlySpec(zones_h=0.0), seed=1, on_battery=[True] * 4),
    )
    small.run(1.5 * 86400.0)
    nights = {float(str(row[3])) // 86400.0 for row in small.rows}
    assert len(nights) == 2
    assert small.server.version.number > 20
