"""Power cuts: what was written and not yet synced is lost, sector by sector, by the throw of a coin.

strace records every write, sync, truncation and renaming of a whole server while devices upload and rounds
are folded. Cut after any of these calls, the disk holds all that was synced before, half of the sectors that
were not, and the first few of the renamings whose directory was not. From each such disk the ledger must
open, sound and with every update that a device had been acknowledged by then; of each life a server starts
on one such disk, goes on until the task's end, and is audited again. What this can see at all is shown by
some of the same cuts without the syncs of the ledger's log: those must lose updates, or all.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections import Counter
from pathlib import Path

import numpy as np
from msgspec import Struct

from benchmarks.faults.devices import Habits, Notes, devices
from benchmarks.faults.disk import CALLS, Call, Disk, calls_in
from benchmarks.faults.ledger import NOTHING_WRONG, Audit, audit
from benchmarks.faults.row import Outcome, Setting
from benchmarks.faults.server import ServerProcess, task_text

__all__ = ["cut", "run"]

_NUMBERS = 100
_COHORT, _ROUNDS = 4, 3
_CONTROLS = 4  #: every how many cuts the same one is made without syncs
_HABITS = Habits(pause_s=0.02, retry_s=0.05)


async def run(setting: Setting) -> Outcome:
    lives, cuts = (1, 40) if setting.quick else (10, 100)
    return await cut(setting, lives=lives, cuts=cuts)


async def cut(setting: Setting, *, lives: int, cuts: int) -> Outcome:
    """lives: of a server that are recorded; cuts: of each."""
    if shutil.which("strace") is None:
        return Outcome(figures={}, skipped="strace is not installed: apt install strace")
    counts = Counter[str](dict.fromkeys(("spoiled_without_syncs", *NOTHING_WRONG), 0))
    for life in range(lives):
        directory = setting.directory / f"life-{life}"
        recorded, rng = await _record(directory), setting.rng(life)
        counts["calls"] += len(recorded.calls)
        for number in range(cuts):
            after, image = int(rng.integers(1, len(recorded.calls) + 1)), directory / "image"
            counts["cuts"] += 1
            counts["expected"] += len(recorded.known(after).acknowledged)
            found = recorded.cut(after, image, rng)
            if number == 0:
                found = await recorded.go_on(after, image, found)
                counts["started"] += 1
            counts.update({name: int(getattr(found, name)) for name in NOTHING_WRONG})
            if any(getattr(found, name) for name in NOTHING_WRONG):
                setting.report.line(row="power", life=life, cut=number, after=after, found=str(found))
            shutil.rmtree(image)
            if number % _CONTROLS == 0:
                counts["controls"] += 1
                counts["spoiled_without_syncs"] += recorded.is_spoiled(after, image, rng)
                shutil.rmtree(image)
        setting.report.line(row="power", lives=life + 1, **counts)
        shutil.rmtree(directory)
    return Outcome(
        figures=dict(counts),
        at_most=NOTHING_WRONG,
        at_least={"cuts": lives * cuts, "expected": cuts, "started": lives, "spoiled_without_syncs": 1},
    )


# recording


class _Life(Struct, frozen=True, kw_only=True):
    """A server's directory, what was in it before, what it did, and what devices were told meanwhile."""

    data: Path
    first: Path
    calls: list[Call]
    notes: Notes
    places: dict[str, int]  #: device -> its place among the factors

    def known(self, after: int) -> Notes:
        """What devices had been acknowledged when so many calls had ended."""
        known, at = Notes(), self.calls[after - 1].at
        told = self.notes.acknowledged.items()
        known.acknowledged = {
            lease: digest for lease, digest in told if self.notes.acknowledged_at[lease] <= at
        }
        return known

    def cut(self, after: int, image: Path, rng: np.random.Generator, *, synced: bool = True) -> Audit:
        """Leave in `image` what a cut after so many calls does; not synced: without the syncs of the log."""
        made = [call for call in self.calls[:after] if synced or not _is_sync_of_log(call)]
        Disk(self.data, self.first).play(made).write(image, rng)
        return audit(image, self.known(after), self.places, ended=False, wiped=False)

    def is_spoiled(self, after: int, image: Path, rng: np.random.Generator) -> bool:
        """Whether the same cut without the syncs of the log loses an update, or the whole database."""
        try:
            return self.cut(after, image, rng, synced=False).lost > 0
        except sqlite3.DatabaseError:
            return True

    async def go_on(self, after: int, image: Path, found: Audit) -> Audit:
        """Start a server on it and end its task; what the disk is then, or was before if that was wrong."""
        if any(getattr(found, name) for name in NOTHING_WRONG):
            return found
        server = ServerProcess(image)
        async with server.running():
            if (await server.task())["state"] != "finished":
                await server.end_task()
            await server.stop()
        return audit(image, self.known(after), self.places)


def _is_sync_of_log(call: Call) -> bool:
    return call.name == "sync" and call.path.endswith("-wal")


async def _record(directory: Path) -> _Life:
    data, first, log = directory / "data", directory / "first", directory / "calls"
    server = ServerProcess(data)
    async with server.running():
        await server.open_task(task_text(cohort=_COHORT, count=_ROUNDS, retry_s=0.05), _NUMBERS)
        await server.stop()
    shutil.copytree(data, first)
    options = ("-f", "-qq", "-ttt", "-xx", "-y", "-s", "1000000", "-e", f"trace={CALLS}", "-o", str(log))
    traced = ServerProcess(data, "strace", *options)
    over = asyncio.Event()
    async with traced.running(), devices(_COHORT, traced.url, _NUMBERS, _HABITS) as (peers, notes):
        await asyncio.gather(*(peer.enroll(traced.token) for peer in peers))
        living = [asyncio.create_task(peer.live(over)) for peer in peers]
        async with asyncio.timeout(60):
            while (await traced.task())["state"] != "finished":
                await asyncio.sleep(0.05)
        over.set()
        await asyncio.gather(*living)
        await traced.stop()
    places = {peer.identity.device: peer.number for peer in peers}
    calls = list(calls_in(log.read_text(), data))
    return _Life(data=data, first=first, calls=calls, notes=notes, places=places)
