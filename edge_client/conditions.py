"""When a device may work: what it reads of itself, held against what its owner allows.

A limit that the owner set and nobody can read does not hold: silence is no permission. The battery is the
exception: where none is read there is none to spare.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from msgspec import Struct

from edge_client.aside import Aside, settled
from fedtt.errors import ConfigError, Declined

__all__ = ["Conditions", "Holding", "Limits", "Readings", "Watch", "while_holding"]

T = TypeVar("T")


class Readings(Struct, frozen=True, kw_only=True):
    """What a device knows of itself now; None where it does not."""

    battery: float | None = None  #: charge, 0 to 1; None also without a battery
    charging: bool | None = None  #: whether it runs on power from outside
    unmetered: bool | None = None  #: whether nobody counts what goes over its network
    idle: bool | None = None  #: whether others leave its processor alone
    temperature_c: float | None = None  #: of its hottest part
    memory_mb: int | None = None  #: that training may use now


class Conditions(Protocol):
    """Where the readings come from: files of Linux (`LinuxConditions`), or the app that hosts the device."""

    def now(self) -> Readings:
        """Read all; may block for a moment, never raises."""
        ...


class Limits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the owner asks for before the device works."""

    only_charging: bool = False
    only_unmetered: bool = False
    only_idle: bool = False
    min_battery: float = 0.2  #: charge, 0 to 1
    max_temperature_c: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.min_battery <= 1:
            raise ConfigError("min_battery", self.min_battery, "a number from 0 to 1")
        if self.max_temperature_c is not None and not 0 < self.max_temperature_c <= 150:
            raise ConfigError("max_temperature_c", self.max_temperature_c, "a number above 0, at most 150")

    def against_work(self, found: Readings) -> str:
        """Why the device may not work now; "" where it may."""
        if found.battery is not None and found.battery < self.min_battery:
            return f"the battery is at {found.battery:.0%}, its owner asks for {self.min_battery:.0%}"
        if self.only_charging and not found.charging:
            return _missing(found.charging, "it is charging", "it is not charging")
        if reason := self.against_traffic(found):
            return reason
        if self.only_idle and not found.idle:
            return _missing(found.idle, "it is idle", "it is in use")
        if self.max_temperature_c is None:
            return ""
        if found.temperature_c is None:
            return "nothing says how hot it is"
        if found.temperature_c > self.max_temperature_c:
            return f"it is at {found.temperature_c:.0f} °C, its owner allows {self.max_temperature_c:.0f} °C"
        return ""

    def against_traffic(self, found: Readings) -> str:
        """Why what is trained may not be sent now; "" where it may."""
        if self.only_unmetered and not found.unmetered:
            return _missing(found.unmetered, "its network is unmetered", "its network is metered")
        return ""


def _missing(value: bool | None, wanted: str, otherwise: str) -> str:
    return f"nothing says whether {wanted}" if value is None else otherwise


class Holding(Protocol):
    """How work is done while conditions hold: `while_holding`, or the same under another clock."""

    def __call__(
        self,
        work: Callable[[], Coroutine[Any, Any, T]],
        broken: Callable[[], Coroutine[Any, Any, str]],
        every_s: float,
        /,
    ) -> Awaitable[T]: ...


class Watch:
    """The conditions of one device, held against what its owner asks for; None of them lets all pass."""

    def __init__(
        self,
        conditions: Conditions | None,
        limits: Limits,
        every_s: float,
        aside: Aside,
        hold: Holding,
    ) -> None:
        self._conditions, self._limits = conditions, limits
        self._every_s, self._aside, self._hold = every_s, aside, hold

    async def against_work(self) -> str:
        """Why the device may not work now; "" where it may."""
        if self._conditions is None:
            return ""
        return self._limits.against_work(await self._aside(self._conditions.now))

    async def against_traffic(self) -> str:
        """Why it may not send now; "" where it may."""
        if self._conditions is None:
            return ""
        return self._limits.against_traffic(await self._aside(self._conditions.now))

    async def free_mb(self) -> int | None:
        """MiB of memory that training may use now; None where nobody knows."""
        if self._conditions is None:
            return None
        return (await self._aside(self._conditions.now)).memory_mb

    async def holding(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do work while the conditions hold; raises Declined as soon as they do not.

        What is under way is given back, not kept for later: a training begins anew in any case, and the
        round need not wait for this device.
        """
        if self._conditions is None:
            return await work()
        return await self._hold(work, self.against_work, self._every_s)


async def while_holding(
    work: Callable[[], Coroutine[Any, Any, T]], broken: Callable[[], Awaitable[str]], every_s: float
) -> T:
    """Do the work as long as `broken`, asked every so many seconds, has nothing to say.

    Raises Declined with what it said, once the work has been cancelled and has ended.
    """
    if why := await broken():
        raise Declined(why)
    task = asyncio.ensure_future(work())
    try:
        while not (await asyncio.wait([task], timeout=every_s))[0]:
            if why := await broken():
                break
        else:
            return task.result()
    finally:
        task.cancel()
        await settled(task)
        if not task.cancelled():
            task.exception()  # seen, also where this is cancelled itself
    with suppress(asyncio.CancelledError):
        return task.result()  # it came to its end first
    raise Declined(why)
