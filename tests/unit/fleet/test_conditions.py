"""Power, battery and network of emulated devices, and what their own clients make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.conditions import Limits
from fedtt.errors import ConfigError
from fleet.availability import Nightly
from fleet.conditions import Daily
from fleet.fleet_file import read_fleet
from fleet.profiles import Profile
from fleet.spec import DailySpec
from storage.records import TaskState
from tests.support.fleets import SmallFleet, small_task

PHONE = Profile(name="phone", power="battery")
MINUTE_S, HOUR_S = 60.0, 3600.0
START_S = 1_000_000.0  #: of `SmallFleet`


def daily(spec: DailySpec | None = None, *, seed: int = 0, devices: int = 50) -> Daily:
    return Daily(spec or DailySpec(), seed=seed, on_battery=[True] * devices)


@given(st.integers(0, 20), st.integers(0, 49), st.sampled_from([8.0, 15.0, 30.0]))
@settings(deadline=None, max_examples=15)
def test_a_battery_fills_while_it_charges_and_drains_otherwise_minute_by_minute(
    seed: int, index: int, drain_h: float
) -> None:
    spec = DailySpec(drain_h=drain_h, charge_h=3.0)
    found, nights = daily(spec, seed=seed), Nightly(DailySpec(), seed=seed, on_battery=[True] * 50)
    first = nights.window(index, START_S)
    assert first is not None
    now, level = first[1], 1.0  # the end of a night, which filled it
    for _ in range(3 * 24 * 60):
        window = nights.window(index, now)
        assert window is not None
        charging = window[0] <= now
        read = found.read(index, PHONE, now)
        assert read.charging is read.idle is charging
        assert read.battery == pytest.approx(level, abs=2 * MINUTE_S / HOUR_S / min(drain_h, 3.0))
        level += MINUTE_S / HOUR_S * (1 / 3.0 if charging else -1 / drain_h)
        level, now = min(1.0, max(0.0, level)), now + MINUTE_S


def test_a_network_is_unmetered_from_hours_before_it_plugs_in_until_it_unplugs() -> None:
    found, nights = daily(DailySpec(home_h=2.0)), Nightly(DailySpec(), seed=0, on_battery=[True] * 50)
    start, end = nights.window(3, START_S) or (0.0, 0.0)
    times = {start - 2.1 * HOUR_S: False, start - 1.9 * HOUR_S: True, end - 1: True, end: False}
    assert {at: found.read(3, PHONE, at).unmetered for at in times} == times
    abroad = Profile(name="abroad", power="battery", network="metered")
    assert not any(found.read(3, abroad, at).unmetered for at in times)


def test_on_the_mains_there_is_no_battery_and_nothing_to_wait_for() -> None:
    read = Daily(DailySpec(), seed=0, on_battery=[False]).read(0, Profile(), START_S)
    assert (read.battery, read.charging, read.unmetered, read.idle) == (None, True, True, True)
    assert Limits(only_charging=True, only_unmetered=True, only_idle=True).against_work(read) == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("charge_h", 6.1),  # of nights of 8 h, less twice 1 h
        ("charge_h", 0.0),
        ("drain_h", 0.0),
        ("home_h", 13.0),
        ("from_h", 24.0),
        ("hours", 0.0),  # and not charge_h, which fits into no such night
        ("spread_h", 3.0),
        ("rest_s", 0.0),
    ],
)
def test_days_that_make_no_sense_are_refused_by_name(field: str, value: float) -> None:
    given_: dict[str, Any] = {field: value}
    with pytest.raises(ConfigError, match=rf"^conditions\.{field} = "):
        daily(DailySpec(**given_))


def fleet(tmp_path: Path, limits: Limits, *, step_s: float = 1.0, **changes: Any) -> SmallFleet:
    """Twelve phones in one time zone, whose first night is hours away."""
    settings_ = {"rounds": 2, "cohort": 6, "deadline_s": 4 * 86400.0, "lease_s": 4 * 86400.0} | changes
    return SmallFleet(
        tmp_path,
        devices=12,
        task=small_task(**settings_),
        profiles=(Profile(name="phone", power="battery", limits=limits, step_s=step_s),),
        conditions=DailySpec(zones_h=0.0),
    )


def in_hand(small: SmallFleet) -> list[tuple[int, float, float, str]]:
    """(device, from, to, outcome) of each piece of work, Unix seconds."""
    rows = [(int(str(r[0])), float(str(r[3])), float(str(r[4])), str(r[5])) for r in small.rows]
    return [(device, START_S + begun, START_S + ended, outcome) for device, begun, ended, outcome in rows]


def test_devices_work_only_while_they_charge_where_their_owners_want_that(tmp_path: Path) -> None:
    small = fleet(tmp_path, Limits(only_charging=True))
    small.run(4 * 86400.0)
    assert small.server.task.state is TaskState.FINISHED
    assert small.daily is not None
    work = in_hand(small)
    assert {outcome for *_, outcome in work} == {"acknowledged"}
    for device, begun, ended, _ in work:
        assert small.daily.read(device, PHONE, begun).charging
        assert small.daily.read(device, PHONE, ended).charging
    assert min(begun for _, begun, *_ in work) > START_S + 2 * HOUR_S  # nobody before the night


def test_without_that_limit_they_work_at_once(tmp_path: Path) -> None:
    small = fleet(tmp_path, Limits())
    small.run(4 * 86400.0)
    assert max(ended for *_, ended, _ in in_hand(small)) < START_S + 2 * HOUR_S


def test_a_device_that_is_unplugged_gives_its_lease_back_and_is_not_left_out(tmp_path: Path) -> None:
    """Trainings last 30 h: two steps over 4 rows where 16 take 60 h."""
    small = fleet(tmp_path, Limits(only_charging=True), step_s=60 * HOUR_S)
    small.run(6 * 86400.0)
    assert small.server.task.state is TaskState.ACTIVE
    outcomes = small.fleet.participations.outcomes
    assert set(outcomes) == {"gave up: conditions"}
    assert outcomes["gave up: conditions"] >= 12
    assert not small.population.left_out.any()
    assert small.daily is not None
    for device, begun, ended, _ in in_hand(small):
        assert small.daily.read(device, PHONE, begun).charging
        assert not small.daily.read(device, PHONE, ended).charging
        assert small.daily.read(device, PHONE, ended - 61).charging  # it looks every minute


def test_a_low_battery_ends_work_by_day(tmp_path: Path) -> None:
    """Trainings last an hour, in which a battery loses a thirtieth."""
    small = fleet(tmp_path, Limits(min_battery=0.97), step_s=2 * HOUR_S, rounds=20)
    small.run(2 * 86400.0)
    outcomes, work = small.fleet.participations.outcomes, in_hand(small)
    assert outcomes["gave up: conditions"] > 0
    assert small.daily is not None
    for device, begun, ended, outcome in work:
        assert (small.daily.read(device, PHONE, begun).battery or 0) >= 0.97
        battery = small.daily.read(device, PHONE, ended).battery or 0
        assert (battery < 0.97) == (outcome == "gave up: conditions")


def test_what_was_trained_waits_for_a_network_that_nobody_counts(tmp_path: Path) -> None:
    small = fleet(tmp_path, Limits(only_unmetered=True))
    small.run(4 * 86400.0)
    assert small.server.task.state is TaskState.FINISHED
    assert small.daily is not None
    for device, begun, ended, outcome in in_hand(small):
        assert outcome == "acknowledged"
        assert small.daily.read(device, PHONE, begun).unmetered
        assert small.daily.read(device, PHONE, ended).unmetered


def test_the_same_seed_gives_the_same_rows(tmp_path: Path) -> None:
    limits = Limits(only_charging=True, only_unmetered=True)
    one, other = (fleet(tmp_path / name, limits) for name in ("one", "other"))
    assert one.run(4 * 86400.0) == other.run(4 * 86400.0)
    assert one.rows == other.rows


FILE = """
bundle = "bundle"
[fleet]
devices = 4
[data]
train = "train.jsonl"
[task]
name = "lights"
[task.rounds]
count = 1
cohort = 2
[[profiles]]
name = "phone"
power = "battery"
limits = {{ {limits} }}
{more}
"""
DAYS = '[conditions]\nkind = "daily"\n'


@pytest.mark.parametrize(
    ("limits", "more", "complaint"),
    [
        (
            "only_charging = true",
            "",
            r"profiles\.phone\.limits = .* given with conditions\.kind = 'daily' alone",
        ),
        ("", "", r"profiles\.phone\.power = 'battery' .* or availability\.kind = 'nightly' alone"),
        (
            "",
            '[availability]\nkind = "nightly"\n[[profiles]]\nname = "abroad"\nnetwork = "metered"',
            r"profiles\.abroad\.network = 'metered' .* given with conditions\.kind = 'daily' alone",
        ),
        ("max_temperature_c = 40.0", DAYS, r"phone\.limits\.max_temperature_c = 40\.0 .*has a temperature"),
        ("", f'{DAYS}[availability]\nkind = "nightly"', r"availability\.kind = 'nightly' .*another kind"),
        ("", '[conditions]\nkind = "weekly"', r"conditions\.kind = 'weekly' .*one of 'daily', 'none'"),
        ("", f"{DAYS}sleep_h = 3", r"conditions\.sleep_h = 3 .*known settings here are zones_h"),
    ],
)
def test_a_fleet_file_whose_conditions_make_no_sense_is_refused(
    limits: str, more: str, complaint: str, tmp_path: Path
) -> None:
    (tmp_path / "fleet.toml").write_text(FILE.format(limits=limits, more=more))
    with pytest.raises(ConfigError, match=complaint):
        read_fleet(tmp_path / "fleet.toml")


def test_a_fleet_file_names_limits_and_days(tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text(FILE.format(limits="min_battery = 0.5", more=f"{DAYS}home_h = 5.0"))
    spec = read_fleet(tmp_path / "fleet.toml")
    assert spec.conditions == DailySpec(home_h=5.0)
    assert spec.profiles[0].limits == Limits(min_battery=0.5)
