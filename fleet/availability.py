"""When devices are there at all: always, charging at night, or as a trace says.

A trace is a CSV file with the header `device,start_s,end_s`: from one second of the run to another, device
`device` (0, 1, 2, …) is there. Rows of one device come in order of time and do not overlap.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from fedtt.errors import ConfigError
from fedtt.rng import Purpose, rng_for
from fleet.spec import NightsSpec

__all__ = ["Always", "Availability", "Nightly", "Trace", "Window", "read_trace"]

DAY_S = 86400.0
_HOUR_S = 3600.0
Window = tuple[float, float]  #: [start, end) in Unix seconds


class Availability(Protocol):
    """When each device could take part."""

    def window(self, index: int, now: float) -> Window | None:
        """The window that holds `now`, else the next one; None where none will come."""
        ...


class Always:
    def window(self, index: int, now: float) -> Window | None:
        return (-math.inf, math.inf)


class Nightly:
    """Devices on battery are there while they charge at night; the others always.

    Each device has a time zone, drawn evenly from `zones_h` hours, and plugs in each evening about
    `from_h` o'clock for about `hours`: both normal with σ = `spread_h`, cut off at 2 σ and drawn anew for
    each device and night.
    """

    def __init__(
        self, spec: NightsSpec, *, seed: int, on_battery: Sequence[bool], section: str = "availability"
    ) -> None:
        """section: of the fleet file, which errors name."""
        zones_h, from_h, hours, spread_h = spec.zones_h, spec.from_h, spec.hours, spec.spread_h
        for field, value, sound, allowed in (
            ("zones_h", zones_h, 0 <= zones_h <= 24, "hours from 0 to 24"),
            ("from_h", from_h, 0 <= from_h < 24, "an hour of the day, from 0, below 24"),
            ("hours", hours, 0 < hours <= 12, "hours above 0, at most 12"),
            ("spread_h", spread_h, 0 <= 4 * spread_h < hours, f"from 0, below a quarter of {hours:g} hours"),
        ):
            if not sound:
                raise ConfigError(f"{section}.{field}", value, allowed)
        self._seed, self._on_battery, self._zones_h = seed, on_battery, zones_h
        self._from_h, self._hours, self._spread_h = from_h, hours, spread_h

    def window(self, index: int, now: float) -> Window | None:
        if not self._on_battery[index]:
            return (-math.inf, math.inf)
        night = self.day(now)
        while (found := self.night(index, night))[1] <= now:
            night += 1
        return found

    @staticmethod
    def day(now: float) -> int:
        """A day whose night is over for every device."""
        return math.floor(now / DAY_S) - 2  # zones and spread move a night by less than two days

    def night(self, index: int, day: int) -> Window:
        """When this device charges in the night that begins on `day`, counted from 1970 in its own zone."""
        zone_h = self._zones_h * (rng_for(self._seed, Purpose.ARRIVALS, 0, index).random() - 0.5)
        drawn = rng_for(self._seed, Purpose.ARRIVALS, day, index).standard_normal(2)
        shift_h, longer_h = (self._spread_h * drawn.clip(-2, 2)).tolist()  # a Timeline takes floats alone
        start = day * DAY_S + (self._from_h + shift_h - zone_h) * _HOUR_S
        return start, start + (self._hours + longer_h) * _HOUR_S


class Trace:
    """Windows in seconds of a run that begins at `start_s`, by device."""

    def __init__(self, windows: Sequence[Sequence[Window]], start_s: float = 0.0) -> None:
        self._windows, self._start_s = windows, start_s

    def window(self, index: int, now: float) -> Window | None:
        mine = self._windows[index]
        # on the sums that are given out: a difference is rounded otherwise, and `now` may be such an end
        at = bisect_right(mine, now, key=lambda window: self._start_s + window[1])
        if at == len(mine):
            return None
        start, end = mine[at]
        return self._start_s + start, self._start_s + end


def read_trace(path: Path, devices: int) -> list[list[Window]]:
    """The windows of each device; raises ConfigError that names the row and what is wrong with it."""
    windows: list[list[Window]] = [[] for _ in range(devices)]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            _read_rows(csv.reader(file), path, windows)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError("availability.file", str(path), f"a CSV file that can be read ({error})") from None
    if [] in windows:
        raise ConfigError(
            "availability.file", str(path), f"a row for every device; number {windows.index([])} has none"
        )
    return windows


def _read_rows(rows: Iterable[list[str]], path: Path, windows: list[list[Window]]) -> None:
    for number, row in enumerate(rows, 1):
        if number == 1:
            if row != ["device", "start_s", "end_s"]:
                raise _bad_row(path, 1, row, "the header device,start_s,end_s")
            continue
        try:
            device, start, end = int(row[0]), float(row[1]), float(row[2])
        except (ValueError, IndexError):
            raise _bad_row(path, number, row, "three numbers: a device, and two times in seconds") from None
        if len(row) != 3 or not (0 <= start < end < math.inf):
            raise _bad_row(path, number, row, "three numbers, with 0 <= start_s < end_s")
        if not 0 <= device < len(windows):
            raise _bad_row(path, number, row, f"a device from 0 to {len(windows) - 1}")
        if windows[device] and start < windows[device][-1][1]:
            ended = windows[device][-1][1]
            raise _bad_row(path, number, row, f"start_s from {ended:g}, where the device's last row ends")
        windows[device].append((start, end))


def _bad_row(path: Path, number: int, row: list[str], allowed: str) -> ConfigError:
    return ConfigError("availability.file", ",".join(row)[:100], allowed, f"{path} row {number}")
