"""Rows of `benchmarks.faults` whose figures are also the server's: folding, and a herd of check-ins."""

from __future__ import annotations

from benchmarks.faults import fold as fold_row
from benchmarks.faults import herd as herd_row
from benchmarks.faults.row import Setting
from benchmarks.serving.part import Measured, Part

__all__ = ["fold", "herd"]


def _setting(part: Part) -> Setting:
    return Setting(report=part.report, directory=part.directory, quick=part.quick, seed=part.seed)


async def fold(part: Part) -> Measured:
    """Of 10,000 updates of 20,000 numbers; fewer, and under their own number, with --quick."""
    figures = (await fold_row.run(_setting(part))).figures
    name = f"fold_{figures['updates']}_s"
    return Measured(
        figures={name: float(figures["fold_s"])},
        against={name: "at most 2, updates of 20,000 numbers in 8 bits"},
    )


async def herd(part: Part) -> Measured:
    found = await herd_row.run(_setting(part))
    if found.skipped:
        return Measured(skipped=found.skipped)
    count = found.figures["devices"]
    return Measured(
        figures={
            f"checkins_{count}_answered": float(found.figures["answered"]),
            "checkins_kb_a_connection": float(found.figures["kb_a_connection_peak"]),
        },
        against={
            f"checkins_{count}_answered": "all, sent at the same moment",
            "checkins_kb_a_connection": "at most 64",
        },
    )
