"""What a server's processes have used, by the standard library alone: peers' environments have no more."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["cpu_s"]


def cpu_s(root: int) -> float:
    """Seconds of a process and of all that descend from it and live."""
    parents: dict[int, int] = {}
    used: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(ValueError, OSError):
            pid, fields = int(entry.name), (entry / "stat").read_text().rpartition(")")[2].split()
            parents[pid], used[pid] = int(fields[1]), int(fields[11]) + int(fields[12])
    ours = {root}
    while found := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= found
    return sum(used.get(pid, 0) for pid in ours) / os.sysconf("SC_CLK_TCK")
