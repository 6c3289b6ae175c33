"""What a part of `benchmarks.server` is given, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from benchmarks.harness import Report

__all__ = ["Measure", "Measured", "Part"]


class Part(Struct, frozen=True, kw_only=True):
    """Where and how large it runs."""

    report: Report
    directory: Path  #: its own, and empty
    quick: bool = False
    seed: int = 0


class Measured(Struct, frozen=True, kw_only=True):
    """Figures with their unit in the name, and what they refer to."""

    figures: Mapping[str, float] = {}
    against: Mapping[str, str] = {}
    skipped: str = ""  #: why it could not run here


Measure = Callable[[Part], Coroutine[Any, Any, Measured]]
