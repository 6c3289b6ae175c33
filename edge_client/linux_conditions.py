"""The readings of a Linux machine: sysfs, /proc, NetworkManager, and plain files that an app writes.

A file stands above what the system says, so that a script or an app may answer for what Linux does not know:
`battery` (0 to 1), `charging`, `unmetered`, `idle` (0 or 1), `temperature_c`, `memory_mb`. What cannot be
read is None; a file that holds no such number is as none.
"""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TypeVar

from msgspec import Struct

from edge_client.conditions import Limits, Readings

__all__ = ["LinuxConditions"]

T = TypeVar("T")

_TOLD = {
    "battery": 1.0,
    "charging": 1.0,
    "unmetered": 1.0,
    "idle": 1.0,
    "temperature_c": 150.0,
    "memory_mb": 1e9,
}  #: files that an app may write, with their largest numbers

#: NMMetered in NetworkManager's D-Bus interface: yes, no, and its guesses of either; 0 is unknown.
_UNMETERED = {"u 1": False, "u 2": True, "u 3": False, "u 4": True}
_NETWORK_MANAGER = "org.freedesktop.NetworkManager"
_ASK_METERED = [
    *("--system", "--auto-start=no", "--timeout=2", "get-property"),
    *(_NETWORK_MANAGER, "/org/freedesktop/NetworkManager", _NETWORK_MANAGER, "Metered"),
]
_METERED_LASTS_S = 30.0  #: asking starts a process
_POWERED = {"Charging", "Full", "Not charging"}  #: states of a battery beside power from outside
_BUSY = 0.25  #: share of all processors that others may use of a machine that is idle
#: Controllers in /proc/self/cgroup -> where their groups lie, and the names of limit, use and unused pages.
_GROUPS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
_READ_BYTES = 64 * 1024  #: of any file here


class _Used(Struct, frozen=True):
    """Time of processors since the machine started, seconds."""

    at: float  #: monotonic
    all_s: float
    idle_s: float
    own_s: float  #: of this process


class LinuxConditions:
    """Conditions of this machine."""

    def __init__(
        self,
        files: Path | None = None,
        limits: Limits | None = None,
        *,
        sys: Path = Path("/sys"),
        proc: Path = Path("/proc"),
        busctl: str = "busctl",
        idle_window_s: float = 0.5,
    ) -> None:
        """files: the directory of plain files. limits: what takes long is read for them alone; None reads it.

        sys, proc: where the kernel tells. busctl: the program that asks NetworkManager.
        idle_window_s: shortest time over which the processors are looked at.
        """
        self._files, self._sys, self._proc, self._busctl = files, sys, proc, busctl
        self._asks_network = limits is None or limits.only_unmetered
        self._asks_idle = limits is None or limits.only_idle
        self._idle_window_s = idle_window_s
        self._metered_until = 0.0
        self._unmetered: bool | None = None
        self._used = self._processors()
        self._idle: bool | None = None

    def now(self) -> Readings:
        told = {name: _told(self._files / name, most) for name, most in _TOLD.items() if self._files}
        battery, charging = self._power()
        return Readings(
            battery=_either(told.get("battery"), battery),
            charging=_either(_yes(told.get("charging")), charging),
            unmetered=_either(_yes(told.get("unmetered")), self._network()),
            idle=_either(_yes(told.get("idle")), self._left_alone()),
            temperature_c=_either(told.get("temperature_c"), self._temperature()),
            memory_mb=_either(_whole(told.get("memory_mb")), self._memory()),
        )

    def _power(self) -> tuple[float | None, bool | None]:
        """Charge of the batteries in the mean, and whether power comes from outside.

        Linux, Documentation/ABI/testing/sysfs-class-power. A machine without a battery lives on such power;
        the batteries of a mouse (scope Device) are not its own.
        """
        supplies = _entries(self._sys / "class" / "power_supply")
        if supplies is None:
            return None, None
        own = [supply for supply in supplies if _text(supply / "scope") != "Device"]
        batteries = [supply for supply in own if _text(supply / "type") == "Battery"]
        if not batteries:
            return None, True
        states = {_text(battery / "status") for battery in batteries}
        charges = [charge for battery in batteries if (charge := _number(battery / "capacity")) is not None]
        online = any(_number(supply / "online") for supply in own if supply not in batteries)
        outside = True if online or states & _POWERED else False if "Discharging" in states else None
        return sum(charges) / len(charges) / 100 if charges else None, outside

    def _network(self) -> bool | None:
        """What NetworkManager says of the connection in use; kept for a while."""
        if self._asks_network and time.monotonic() >= self._metered_until:
            try:
                asked = subprocess.run(  # noqa: S603  #: our words, and the system's own program
                    [self._busctl, *_ASK_METERED], capture_output=True, text=True, timeout=5, check=False
                )
                self._unmetered = _UNMETERED.get(asked.stdout.strip())
            except (OSError, ValueError, subprocess.TimeoutExpired):
                self._unmetered = None
            self._metered_until = time.monotonic() + _METERED_LASTS_S
        return self._unmetered

    def _temperature(self) -> float | None:
        """The hottest of the thermal zones, which the kernel gives in thousandths of a degree."""
        entries = _entries(self._sys / "class" / "thermal") or []
        zones = (entry / "temp" for entry in entries if entry.name.startswith("thermal_zone"))
        found = [value / 1000 for path in zones if (value := _number(path)) is not None]
        return max((value for value in found if -40 <= value <= 150), default=None)

    def _memory(self) -> int | None:
        """MemAvailable, or what this process's control groups leave of it, MiB."""
        available = _named(_text(self._proc / "meminfo"), "MemAvailable:")
        machine = [] if available is None else [available << 10]
        return min((*machine, *self._memory_in_groups()), default=-1) >> 20 if machine else None

    def _memory_in_groups(self) -> Iterator[int]:
        """Bytes that each group with a limit leaves; pages of files give way and do not count.

        Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
        """
        for line in _text(self._proc / "self" / "cgroup").splitlines():
            _, kinds, path = (*line.split(":", 2), "", "")[:3]
            if kinds not in _GROUPS or not path.startswith("/"):
                continue
            below, most_name, used_name, files_name = _GROUPS[kinds]
            for group in (PurePosixPath(path), *PurePosixPath(path).parents):
                directory = self._sys / "fs" / "cgroup" / below / group.relative_to("/")
                most, used = _number(directory / most_name), _number(directory / used_name)
                if most is not None and used is not None:
                    files = _named(_text(directory / "memory.stat"), files_name) or 0
                    yield max(0, int(most) - max(0, int(used) - files))

    def _left_alone(self) -> bool | None:
        """Whether others have used little of the processors since the last look."""
        if not self._asks_idle:
            return None
        if self._used is not None:
            time.sleep(max(0.0, self._used.at + self._idle_window_s - time.monotonic()))
        before, self._used = self._used, self._processors()
        if before is None or self._used is None:
            self._idle = None
        elif (all_s := self._used.all_s - before.all_s) > 0:
            own_s = self._used.own_s - before.own_s
            self._idle = all_s - (self._used.idle_s - before.idle_s) - own_s < _BUSY * all_s
        return self._idle

    def _processors(self) -> _Used | None:
        """The first line of /proc/stat: user, nice, system, idle, iowait, … in ticks (proc(5))."""
        words = _text(self._proc / "stat").partition("\n")[0].split()
        if len(words) < 9 or words[0] != "cpu" or not all(word.isdecimal() for word in words[1:9]):
            return None
        ticks, per_second = [int(word) for word in words[1:9]], os.sysconf("SC_CLK_TCK")
        own = os.times()
        return _Used(
            time.monotonic(),
            sum(ticks) / per_second,
            (ticks[3] + ticks[4]) / per_second,
            own.user + own.system,
        )


def _either(told: T | None, found: T | None) -> T | None:
    return found if told is None else told


def _entries(directory: Path) -> list[Path] | None:
    """What lies in a directory; None where that cannot be seen."""
    try:
        return list(directory.iterdir())
    except OSError:
        return None


def _text(path: Path) -> str:
    """What a file says; "" where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(_READ_BYTES).decode("ascii", "replace").strip()
    except OSError:
        return ""


def _named(text: str, name: str) -> int | None:
    """The whole number behind a name at the beginning of a line."""
    for line in text.splitlines():
        words = line.split()
        if words[:1] == [name] and len(words) > 1 and words[1].isdecimal():
            return int(words[1])
    return None


def _number(path: Path) -> float | None:
    try:
        value = float(_text(path))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _told(path: Path, most: float) -> float | None:
    """A number from 0 to `most` that an app has written."""
    value = _number(path)
    return value if value is not None and 0 <= value <= most else None


def _yes(value: float | None) -> bool | None:
    return None if value is None else value > 0


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
