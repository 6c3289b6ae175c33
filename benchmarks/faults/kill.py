"""kill -9 of the server at random instants, also while it starts, with devices in flight.

Devices repeat uploads, send some twice at once and some with other bytes. At the end the task is stopped and
the ledger audited: each acknowledged update is there, in one terminal state, and the factors of every
version hold exactly the devices that the ledger says.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, suppress

import numpy as np

from benchmarks.faults.devices import Device, Notes, devices
from benchmarks.faults.ledger import NOTHING_WRONG, audit
from benchmarks.faults.row import Outcome, Setting
from benchmarks.faults.server import ServerProcess, on_one_port, task_text

__all__ = ["killed", "places", "run"]

NUMBERS = 1000
_WHILE_STARTING = 0.15  #: of the kills come before it listens
_NEXT_ACKNOWLEDGEMENT_S = 30.0


async def run(setting: Setting) -> Outcome:
    count, kills = (40, 8) if setting.quick else (200, 200)
    return await killed(setting, count=count, kills=kills)


async def killed(setting: Setting, *, count: int, kills: int, up_s: float = 1.0, servers: int = 1) -> Outcome:
    """up_s: the longest a server lives after its first acknowledgement."""
    rng, row = setting.rng(), "kill" if servers == 1 else "kill-one-of-two"
    running = (
        [ServerProcess(setting.directory / "data")]
        if servers == 1
        else on_one_port(setting.directory / "data", servers)
    )
    server = running[0]
    text = task_text(cohort=count, buffer=max(1, count // 2), quorum=1, deadline_s=2, give_up_after=10**6)
    starts_s: list[float] = []
    back_s: list[float] = []
    over = asyncio.Event()
    async with AsyncExitStack() as stack:
        for process in running:
            await stack.enter_async_context(process.running())
        peers, notes = await stack.enter_async_context(devices(count, server.url, NUMBERS))
        await server.open_task(text, NUMBERS)
        await asyncio.gather(*(peer.enroll(server.token) for peer in peers))
        living = [asyncio.create_task(peer.live(over)) for peer in peers]
        try:
            for number in range(kills):
                await asyncio.sleep(float(rng.random() * up_s))
                victim = running[number % servers]
                await victim.kill()
                if rng.random() < _WHILE_STARTING:
                    await _killed_while_starting(victim, rng)
                before = len(notes.acknowledged)
                starts_s.append(await victim.start())
                back_s.append(await _acknowledges(notes, before, starts_s[-1]))
                if (number + 1) % 20 == 0:
                    setting.report.line(row=row, kills=number + 1, acknowledged=len(notes.acknowledged))
        finally:
            over.set()
            await asyncio.gather(*living)
        await server.end_task()
        for process in running:
            await process.stop()
    found = audit(server.data, notes, places(peers))
    for line in notes.wrong[:5]:
        setting.report.line(row=row, wrong=line)
    return Outcome(
        figures={
            **found.figures(),
            "kills": kills,
            "devices": count,
            "servers": servers,
            "listening_again_median_s": round(float(np.median(starts_s)), 3),
            "listening_again_max_s": round(max(starts_s), 3),
            "acknowledging_again_median_s": round(float(np.median(back_s)), 3),
            "acknowledging_again_max_s": round(max(back_s), 3),
            **{name.replace(" ", "_"): value for name, value in sorted(notes.counts.items())},
        },
        # where another goes on, nobody waits for the one to listen, but for what it was summing
        at_most={**NOTHING_WRONG}
        | ({"listening_again_max_s": 2.0} if servers == 1 else {"acknowledging_again_max_s": 10.0}),
        at_least={"acknowledged": kills},
    )


def places(peers: list[Device]) -> dict[str, int]:
    return {peer.identity.device: peer.number % NUMBERS for peer in peers}


async def _killed_while_starting(server: ServerProcess, rng: np.random.Generator) -> None:
    await server.start(wait=False)
    with suppress(TimeoutError):
        await asyncio.wait_for(server.listening(), float(rng.random()) * 2)
    await server.kill()


async def _acknowledges(notes: Notes, before: int, start_s: float) -> float:
    """Seconds from the start of the process to its first acknowledgement of something new."""
    started = time.perf_counter()
    async with asyncio.timeout(_NEXT_ACKNOWLEDGEMENT_S):
        while len(notes.acknowledged) == before:
            await asyncio.sleep(0.005)
    return start_s + time.perf_counter() - started
