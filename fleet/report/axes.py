"""Scales of charts: round ticks, units that fit, and where a value lies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["BYTES", "NUMBER", "SECONDS", "SHARE", "Scale", "Unit", "scale"]

_LIMIT, _NEXT_TO_NOTHING = 1e300, 1e-300  #: beyond them differences overflow or vanish


@dataclass(frozen=True)
class Unit:
    """A quantity and the sizes in which people read it: (what one of them is, its name), rising."""

    sizes: tuple[tuple[float, str], ...]

    def fitting(self, most: float) -> tuple[float, str]:
        """The largest size of which there is at least one."""
        return next((size for size in reversed(self.sizes) if size[0] <= most), self.sizes[0])

    def text(self, value: float) -> str:
        """A value for people, with three digits."""
        size, name = self.fitting(abs(value))
        return f"{value / size:.1f}%" if name == "%" else f"{number(value / size)} {name}".rstrip()


NUMBER = Unit(((1.0, ""),))
SHARE = Unit(((0.01, "%"),))
BYTES = Unit(((1.0, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB")))
SECONDS = Unit(((1.0, "s"), (60.0, "min"), (3600.0, "h"), (86400.0, "days")))


def number(value: float) -> str:
    """Three digits at least, whole numbers below a million in full."""
    if abs(value) >= 1e6:
        return f"{value:.3g}"
    if value == round(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` on a line from 0 to 1, in steps that are even or, with `log`, tenfold."""

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]  #: value, and what is written there
    name: str  #: of the unit that the ticks are in

    def at(self, value: float) -> float:
        """Where a value lies, kept within the line."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return (value - low) / (high - low)


def scale(
    values: Iterable[float], unit: Unit = NUMBER, *, from_zero: bool = False, log: bool = False, most: int = 5
) -> Scale:
    """A scale that all values fit on, ended by ticks; `most` is about how many there are.

    log: values must be above 0.
    """
    found = [min(max(value, -_LIMIT), _LIMIT) for value in values] or [0.0, 1.0]
    low, high = min(found), max(found)
    if log:
        return _log_scale(low, high, unit)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    most_far = max(abs(low), abs(high))
    if high - low <= max(1e-9 * most_far, _NEXT_TO_NOTHING):
        room = most_far / 2 if most_far > _NEXT_TO_NOTHING else 1.0
        low, high = low if from_zero and low >= 0 else low - room, high + room
    size, name = unit.fitting(most_far)
    step = _round_step((high - low) / size / most) * size
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [n * step for n in range(first, last + 1)]
    return Scale(ticks[0], ticks[-1], False, tuple(zip(ticks, _texts(ticks, size), strict=True)), name)


def _round_step(step: float) -> float:
    """1, 2 or 5 times a power of ten, at least `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * times for times in (1, 2, 5, 10) if power * times >= step * (1 - 1e-9))


def _texts(ticks: Sequence[float], size: float) -> list[str]:
    """All with as many decimals as tell them apart."""
    shown = [tick / size for tick in ticks]
    step = shown[1] - shown[0]
    if max(map(abs, shown)) >= 1e6 or step < 1e-4:
        return [f"{value:.4g}" for value in shown]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value:,.{decimals}f}" for value in shown]


def _log_scale(low: float, high: float, unit: Unit) -> Scale:
    """Ticks at 1, 2 and 5 times powers of ten, or at the powers alone where that is too many."""
    size, name = unit.fitting(high)
    low, high = max(low, size * _NEXT_TO_NOTHING), max(high, size * _NEXT_TO_NOTHING)
    first, last = math.floor(math.log10(low / size)), math.ceil(math.log10(high / size))
    times = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [size * n * 10.0**power for power in range(first, last + 1) for n in times]
    inside = [tick for tick in ticks if low <= tick <= high]
    texts = tuple((tick, f"{tick / size:.12g}") for tick in inside)
    return Scale(low, high if high > low else low * 10, True, texts, name)
