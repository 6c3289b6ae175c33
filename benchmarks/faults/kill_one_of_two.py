"""kill -9 of one of two servers on one SQLite file at random instants, while the other goes on."""

from __future__ import annotations

from benchmarks.faults.kill import killed
from benchmarks.faults.row import Outcome, Setting

__all__ = ["run"]


async def run(setting: Setting) -> Outcome:
    count, kills = (40, 8) if setting.quick else (200, 200)
    return await killed(setting, count=count, kills=kills, servers=2)
