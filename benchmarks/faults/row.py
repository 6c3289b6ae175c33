"""What a row of the table is given, and what it answers: figures, and the bounds they must keep."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from benchmarks.harness import Report

__all__ = ["Figures", "Outcome", "Row", "Setting"]

Figures = dict[str, float | int | str]


class Setting(Struct, frozen=True, kw_only=True):
    """Where and how large a row runs."""

    report: Report
    directory: Path  #: its own, and empty
    quick: bool = False
    seed: int = 0

    def rng(self, stream: int = 0) -> np.random.Generator:
        return np.random.default_rng((self.seed, stream))


class Outcome(Struct, frozen=True, kw_only=True):
    """What a row measured."""

    figures: Figures
    at_most: Mapping[str, float] = {}  #: figure -> its bound
    at_least: Mapping[str, float] = {}
    skipped: str = ""  #: why it could not run here

    @property
    def failures(self) -> list[str]:
        """One line for each bound that does not hold; a figure that is missing fails."""
        nan = float("nan")
        found = {name: float(self.figures.get(name, nan)) for name in (*self.at_most, *self.at_least)}
        high = [f"{n} = {found[n]:g} exceeds {b:g}" for n, b in self.at_most.items() if not found[n] <= b]
        low = [f"{n} = {found[n]:g} is below {b:g}" for n, b in self.at_least.items() if not found[n] >= b]
        return high + low


Row = Callable[[Setting], Coroutine[Any, Any, Outcome]]
