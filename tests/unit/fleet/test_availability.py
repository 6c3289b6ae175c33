from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtt.errors import ConfigError
from fleet.availability import Always, Nightly, Trace, read_trace
from fleet.experiment import START_S
from fleet.spec import NightlySpec

DAY_S = 86400.0


def test_some_devices_are_always_there() -> None:
    assert Always().window(3, 1e9) == (-math.inf, math.inf)
    assert Nightly(NightlySpec(), seed=0, on_battery=[False]).window(0, 1e9) == (-math.inf, math.inf)


@given(st.integers(0, 30), st.integers(0, 50), st.floats(0, 1000 * DAY_S))
def test_a_night_holds_now_or_is_the_next_one_and_lasts_a_night(seed: int, index: int, now: float) -> None:
    nightly = Nightly(NightlySpec(), seed=seed, on_battery=[True] * 51)
    found = nightly.window(index, now)
    assert found is not None
    start, end = found
    assert end > now
    assert start - now < 1.5 * DAY_S
    assert 6 * 3600 <= end - start + 1e-6 <= 10 * 3600 + 2e-6  # 8 h, ± 2 σ of 1 h
    before = nightly.window(index, start - 1)
    assert before is not None
    assert before[1] <= start or before == found  # nights of one device do not overlap


def test_a_third_of_a_fleet_over_all_zones_is_charging_at_any_time() -> None:
    nightly = Nightly(NightlySpec(), seed=1, on_battery=[True] * 1000)
    for hour in (0, 7, 15):
        now = 100 * DAY_S + 3600 * hour
        windows = [nightly.window(index, now) for index in range(1000)]
        there = sum(window is not None and window[0] <= now for window in windows)
        assert 280 < there < 390  # 8 of 24 hours of 1,000 devices: 333, σ = 15


def test_without_zones_everybody_charges_at_the_same_hours() -> None:
    nightly = Nightly(NightlySpec(zones_h=0.0), seed=1, on_battery=[True] * 100)

    def there(hour: float) -> int:
        now = 100 * DAY_S + 3600 * hour
        windows = [nightly.window(index, now) for index in range(100)]
        return sum(window is not None and window[0] <= now for window in windows)

    assert (there(12), there(26)) == (0, 100)


@pytest.mark.parametrize(
    ("field", "value"), [("zones_h", 25.0), ("from_h", 24.0), ("hours", 0.0), ("spread_h", 2.0)]
)
def test_a_night_that_makes_no_sense_is_refused_by_name(field: str, value: float) -> None:
    given_: dict[str, Any] = {field: value}
    with pytest.raises(ConfigError) as caught:
        Nightly(NightlySpec(**given_), seed=0, on_battery=[True])
    assert caught.value.field == f"availability.{field}"


def trace_file(tmp_path: Path, *rows: str, header: str = "device,start_s,end_s") -> Path:
    path = tmp_path / "trace.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_a_trace_is_read_and_counts_from_the_start_of_the_run(tmp_path: Path) -> None:
    path = trace_file(tmp_path, "0,0,10", "1,5,7.5", "0,20,30")
    trace = Trace(read_trace(path, 2), start_s=1000.0)
    assert trace.window(0, 1003) == (1000, 1010)
    assert trace.window(0, 1010) == (1020, 1030)  # an end is no longer part of its window
    assert trace.window(1, 1000) == (1005, 1007.5)
    assert trace.window(1, 1007.5) is None


@given(st.lists(st.floats(0.001, 30 * DAY_S), min_size=2, max_size=9, unique=True).map(sorted))
def test_an_end_is_behind_its_window_whatever_the_sum_rounds_to(times: list[float]) -> None:
    windows = list(zip(times[::2], times[1::2], strict=False))
    trace, now, seen = Trace([windows], START_S), START_S, 0
    while (found := trace.window(0, now)) is not None:
        assert found[1] > now
        now, seen = found[1], seen + 1
    assert seen <= len(windows)


@pytest.mark.parametrize(
    ("rows", "row", "why"),
    [
        (["0,0,10", "1,5,5"], 3, "0 <= start_s < end_s"),
        (["0,0,10", "0,9,12"], 3, "from 10, where the device's last row ends"),
        (["0,0,10", "", "1,0,1"], 3, "three numbers"),
        (["0,0,10", "2,0,1"], 3, "a device from 0 to 1"),
        (["0,0,ten"], 2, "three numbers"),
        (["0,0,nan"], 2, "three numbers"),
        (["0,0,10,11"], 2, "three numbers"),
        (["0,-1,10"], 2, "0 <= start_s"),
    ],
)
def test_a_row_that_makes_no_sense_is_named(tmp_path: Path, rows: list[str], row: int, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_trace(trace_file(tmp_path, *rows), 2)
    assert caught.value.field == "availability.file"
    assert f"trace.csv row {row}:" in str(caught.value)
    assert why in str(caught.value)


def test_a_trace_without_a_row_for_a_device_or_without_its_header_or_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="number 1 has none"):
        read_trace(trace_file(tmp_path, "0,0,10"), 2)
    with pytest.raises(ConfigError, match=r"row 1: .* the header"):
        read_trace(trace_file(tmp_path, "0,0,10", header="device,start,end"), 1)
    with pytest.raises(ConfigError, match="a CSV file that can be read"):
        read_trace(tmp_path / "none.csv", 1)
