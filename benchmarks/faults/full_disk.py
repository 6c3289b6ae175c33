"""The disk runs full under load and has room again: nothing acknowledged is lost, and nobody has to help.

A small file system in memory holds the server's directory; another file takes all that is left of it.
"""

from __future__ import annotations

import asyncio
import errno
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.faults.devices import Notes, devices
from benchmarks.faults.kill import places
from benchmarks.faults.ledger import NOTHING_WRONG, audit
from benchmarks.faults.row import Outcome, Setting
from benchmarks.faults.server import ServerProcess, task_text

__all__ = ["filled", "run"]

_NUMBERS = 1000
_SIZE_MB = 24
_RECOVERED_S = 30.0


async def run(setting: Setting) -> Outcome:
    return await filled(setting, times=2 if setting.quick else 10)


async def filled(setting: Setting, *, times: int, full_s: float = 2.0) -> Outcome:
    """full_s: how long the disk stays full."""
    data = setting.directory / "data"
    try:
        with _small_disk(data):
            return await _filled(setting, data, times, full_s)
    except subprocess.CalledProcessError as error:
        return Outcome(figures={}, skipped=f"no file system can be mounted here: {error.stderr.strip()}")


async def _filled(setting: Setting, data: Path, times: int, full_s: float) -> Outcome:
    server, over = ServerProcess(data), asyncio.Event()
    recovered_s: list[float] = []
    async with server.running(), devices(20, server.url, _NUMBERS) as (peers, notes):
        await server.open_task(task_text(cohort=20, buffer=10, retry_s=0.1, give_up_after=10**6), _NUMBERS)
        await asyncio.gather(*(peer.enroll(server.token) for peer in peers))
        living = [asyncio.create_task(peer.live(over)) for peer in peers]
        try:
            for number in range(times):
                await _acknowledges_more(notes)
                filler = data / "filler"
                await asyncio.to_thread(_fill, filler)
                await asyncio.sleep(full_s)
                filler.unlink()
                recovered_s.append(await _acknowledges_more(notes))
                setting.report.line(row="full-disk", filled=number + 1, acknowledged=len(notes.acknowledged))
        finally:
            over.set()
            await asyncio.gather(*living)
        lived = server.is_running
        await server.end_task()
        await server.stop()
        found = audit(data, notes, places(peers))
    return Outcome(
        figures={
            **found.figures(),
            "times_full": times,
            "died": int(not lived),
            "refused_busy": notes.counts["refused busy"],
            "recovered_max_s": round(max(recovered_s), 3),
        },
        at_most={**NOTHING_WRONG, "died": 0, "recovered_max_s": 10.0},
        at_least={"acknowledged": 2 * times, "refused_busy": 1},
    )


async def _acknowledges_more(notes: Notes) -> float:
    """Seconds until ten more updates are acknowledged."""
    before, started = len(notes.acknowledged), time.perf_counter()
    async with asyncio.timeout(_RECOVERED_S):
        while len(notes.acknowledged) < before + 10:
            await asyncio.sleep(0.01)
    return time.perf_counter() - started


def _fill(path: Path) -> None:
    """Write until nothing more goes in, smaller and smaller."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


@contextmanager
def _small_disk(directory: Path) -> Iterator[None]:
    """Raises CalledProcessError where this user may not mount."""
    directory.mkdir()
    options = f"size={_SIZE_MB}m,mode=0700"
    mount = ("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory))
    subprocess.run(mount, check=True, capture_output=True, text=True)
    try:
        yield
    finally:
        unmount = ("umount", "--lazy", str(directory))
        subprocess.run(unmount, check=True, capture_output=True)
