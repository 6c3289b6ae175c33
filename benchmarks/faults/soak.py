"""An hour under steady load: the server's memory and open files stay where they were after a warm-up."""

from __future__ import annotations

import asyncio
import time

import numpy as np
from msgspec.structs import replace

from benchmarks.faults.devices import Habits, devices
from benchmarks.faults.kill import places
from benchmarks.faults.ledger import NOTHING_WRONG, audit
from benchmarks.faults.row import Outcome, Setting
from benchmarks.faults.server import ServerProcess, task_text
from benchmarks.serving.processes import cpu_s

__all__ = ["run", "soaked"]

_NUMBERS = 1000
_WARM_UP = 1 / 3  #: of the time
_OWN_SOCKETS = (
    8  #: two listeners, what wakes the loop, an administrator; devices send some updates twice at once
)
_LEAST_LOAD = {  #: in the hour: half of what the stored one has seen
    "server_cpu_share": 0.32,
    "acknowledged_per_s": 22.0,
}
_HABITS = Habits(pause_s=0.2, retry_s=0.4)  #: they keep the server busy for more than half of the time


async def run(setting: Setting) -> Outcome:
    seconds, every_s = (45.0, 1.0) if setting.quick else (3600.0, 10.0)
    found = await soaked(setting, count=40, seconds=seconds, every_s=every_s)
    if setting.quick:  # a minute says nothing about an hour's slope
        return found
    at_most = {**found.at_most, "resident_mb_per_h": 1.0}
    return replace(found, at_most=at_most, at_least={**found.at_least, **_LEAST_LOAD})


async def soaked(setting: Setting, *, count: int, seconds: float, every_s: float) -> Outcome:
    """count: of devices; every_s: how often memory and open files are looked at."""
    server, over = ServerProcess(setting.directory / "data"), asyncio.Event()
    samples: list[tuple[float, int, int, int, int]] = []
    async with server.running(), devices(count, server.url, _NUMBERS, _HABITS) as (peers, notes):
        text = task_text(cohort=count, buffer=count // 2, quorum=1, deadline_s=5, retry_s=0.5)
        await server.open_task(text, _NUMBERS)
        await asyncio.gather(*(peer.enroll(server.token) for peer in peers))
        living = [asyncio.create_task(peer.live(over)) for peer in peers]
        started = time.perf_counter()
        while (at := time.perf_counter() - started) < seconds:
            memory = server.resident_bytes(), server.anonymous_bytes()
            samples.append((at, *memory, *server.descriptors()))
            if len(samples) % 30 == 0:
                setting.report.line(row="soak", at_s=round(at), **_figures(*samples[-1][1:]))
            await asyncio.sleep(every_s)
        server_cpu_s = cpu_s(server.pid)
        over.set()
        await asyncio.gather(*living)
        await server.end_task()
        await server.stop()
    found = audit(server.data, notes, places(peers))
    warm = np.array([sample for sample in samples if sample[0] >= _WARM_UP * seconds])
    hours, resident_mb, anonymous_mb = warm[:, 0] / 3600, warm[:, 1] / 2**20, warm[:, 2] / 2**20
    files, sockets = warm[:, 3], warm[:, 4]
    return Outcome(
        figures={
            **found.figures(),
            "seconds": seconds,
            "acknowledged_per_s": round(found.acknowledged / seconds, 1),
            "server_cpu_share": round(server_cpu_s / seconds, 2),
            "resident_mb": round(float(resident_mb[-1]), 1),
            "resident_mb_per_h": round(float(np.polyfit(hours, resident_mb, 1)[0]), 3),
            "anonymous_mb_per_h": round(float(np.polyfit(hours, anonymous_mb, 1)[0]), 3),
            "files_grown": int(files[-5:].min() - files[:5].min()),  # some are open for a moment
            "sockets_most": int(sockets.max()),
        },
        at_most={**NOTHING_WRONG, "files_grown": 0, "sockets_most": 2 * count + _OWN_SOCKETS},
        at_least={"acknowledged": count},
    )


def _figures(resident: int, anonymous: int, files: int, sockets: int) -> dict[str, float]:
    resident_mb, anonymous_mb = round(resident / 2**20, 2), round(anonymous / 2**20, 2)
    return {"resident_mb": resident_mb, "anonymous_mb": anonymous_mb, "files": files, "sockets": sockets}
