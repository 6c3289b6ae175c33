"""What emulated devices read of themselves: power, battery and network over their days.

A device's own client holds these readings against its owner's limits, as it does those of a real one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from edge_client.conditions import Readings
from edge_client.device_config import DeviceConfig
from fedtt.errors import ConfigError
from fedtt.seams import Clock
from fleet.availability import Nightly, Window
from fleet.profiles import Profile
from fleet.spec import DailySpec

__all__ = ["Daily", "OfDevice"]

_HOUR_S = 3600.0
_NIGHTS_KEPT = 65_536


class Daily:
    """Devices on battery charge at night and drain by day; devices on the mains have no battery.

    They plug in as `Nightly` has it. Every night fills the battery, which then drains evenly. At home, and so
    on a network that nobody counts, a device is from `home_h` before it plugs in until it unplugs; on the
    mains always. While it charges nobody uses it.
    """

    def __init__(self, spec: DailySpec, *, seed: int, on_battery: Sequence[bool]) -> None:
        nights = Nightly(spec, seed=seed, on_battery=on_battery, section="conditions")
        least_h = spec.hours - 2 * spec.spread_h
        if not 0 < spec.charge_h <= least_h:
            allowed = f"hours above 0, at most {least_h:g}, the shortest night: each fills the battery"
            raise ConfigError("conditions.charge_h", spec.charge_h, allowed)
        for field in ("drain_h", "rest_s", "watch_s"):
            if not getattr(spec, field) > 0:
                raise ConfigError(f"conditions.{field}", getattr(spec, field), "a number above 0")
        if not 0 <= spec.home_h <= 12:
            raise ConfigError("conditions.home_h", spec.home_h, "hours from 0 to 12")
        self._spec, self._on_battery = spec, on_battery
        self._night = lru_cache(maxsize=_NIGHTS_KEPT)(nights.night)
        self._day = nights.day

    def looked_at(self, config: DeviceConfig) -> DeviceConfig:
        """A client's settings with how often it looks."""
        return replace(config, rest_s=self._spec.rest_s, watch_s=self._spec.watch_s)

    def read(self, index: int, profile: Profile, now: float) -> Readings:
        """What a device would read at a time."""
        at_home = profile.network == "home"
        if not self._on_battery[index]:
            return Readings(charging=True, unmetered=at_home, idle=True)
        spec, ((_, unplugged), (start, _)) = self._spec, self._nights(index, now)
        full_s, empty_s = spec.charge_h * _HOUR_S, spec.drain_h * _HOUR_S
        plugged_in = start <= now
        battery = max(0.0, 1 - (min(now, start) - unplugged) / empty_s)
        if plugged_in:
            battery = min(1.0, battery + (now - start) / full_s)
        return Readings(
            battery=battery,
            charging=plugged_in,
            unmetered=at_home and now >= start - spec.home_h * _HOUR_S,
            idle=plugged_in,
        )

    def _nights(self, index: int, now: float) -> tuple[Window, Window]:
        """The night before, and the one that holds `now` or comes next."""
        day = self._day(now)
        while self._night(index, day)[1] <= now:
            day += 1
        return self._night(index, day - 1), self._night(index, day)


class OfDevice:
    """One device's Conditions, by its own clock."""

    def __init__(self, daily: Daily, index: int, profile: Profile, clock: Clock) -> None:
        self._daily, self._index, self._profile, self._clock = daily, index, profile, clock

    def now(self) -> Readings:
        return self._daily.read(self._index, self._profile, self._clock.now())
