"""Two servers on PostgreSQL: backends killed, the database crashed, a server stopped and resumed.

Devices go on all the while. At the end the task is stopped and the ledger audited: each acknowledged update
is there, in one terminal state, and the factors of every version hold exactly the devices that it says.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import numpy as np

from benchmarks.faults.devices import Notes, devices
from benchmarks.faults.kill import places
from benchmarks.faults.ledger import NOTHING_WRONG, audit
from benchmarks.faults.row import Outcome, Setting
from benchmarks.faults.server import ServerProcess, on_one_port, task_text
from benchmarks.faults.tables import PostgresqlTables
from benchmarks.local_postgresql import LocalPostgresql, postgresql_binaries

__all__ = ["run", "shared"]

_NUMBERS = 1000
_BACK_S = 30.0  #: in which acknowledgements must come again
_GAP_S = 10.0  #: the longest without an acknowledgement that a fault may cause
_STOPPED_S, _QUICK_STOPPED_S = 30.0, 15.0  #: well past the bound: that the server resumes cannot end the gap

Fault = Callable[[LocalPostgresql, list[ServerProcess]], Coroutine[Any, Any, None]]


async def run(setting: Setting) -> Outcome:
    count, times, stopped_s = (20, 1, _QUICK_STOPPED_S) if setting.quick else (100, 15, _STOPPED_S)
    return await shared(setting, count=count, times=times, stopped_s=stopped_s)


async def shared(setting: Setting, *, count: int, times: int, stopped_s: float) -> Outcome:
    """times: that each fault strikes; stopped_s: for how long a server is stopped."""
    binaries = postgresql_binaries()
    if binaries is None:
        return Outcome(figures={}, skipped="no initdb on this machine (Debian: apt install postgresql)")
    database = await asyncio.to_thread(LocalPostgresql, binaries, durable=True)
    try:
        return await _run(setting, database, count, times, stopped_s)
    finally:
        await asyncio.to_thread(database.close)


async def _run(
    setting: Setting, database: LocalPostgresql, count: int, times: int, stopped_s: float
) -> Outcome:
    faults: dict[str, Fault] = {
        "backends_killed": _kill_backends,
        "database_crashed": _crash,
        "server_stopped": partial(_stop_a_server, stopped_s),
    }
    url = await asyncio.to_thread(database.new_database)
    servers = on_one_port(setting.directory / "data", 2, "--database", url)
    gaps: dict[str, list[float]] = {name: [] for name in faults}
    over = asyncio.Event()
    async with AsyncExitStack() as stack:
        for server in servers:
            await stack.enter_async_context(server.running())
        peers, notes = await stack.enter_async_context(devices(count, servers[0].url, _NUMBERS))
        text = task_text(cohort=count, buffer=max(1, count // 2), quorum=1, deadline_s=2, give_up_after=10**6)
        await servers[0].open_task(text, _NUMBERS)
        await asyncio.gather(*(peer.enroll(servers[0].token) for peer in peers))
        living = [asyncio.create_task(peer.live(over)) for peer in peers]
        try:
            for number in range(times):
                for name, fault in faults.items():
                    await _acknowledge_more(notes)
                    gaps[name].append(await _gap(notes, fault(database, servers)))
                setting.report.line(row="postgresql", times=number + 1, acknowledged=len(notes.acknowledged))
        finally:
            over.set()
            await asyncio.gather(*living)
        await servers[0].end_task()
        for server in servers:
            await server.stop()
    for line in notes.wrong[:5]:
        setting.report.line(row="postgresql", wrong=line)
    found = audit(servers[0].data, notes, places(peers), tables=PostgresqlTables(database, url))
    return Outcome(
        figures={
            **found.figures(),
            "devices": count,
            "servers": len(servers),
            "stopped_s": stopped_s,
            **{f"{name}_gap_max_s": round(max(gap), 2) for name, gap in gaps.items()},
            **{name.replace(" ", "_"): value for name, value in sorted(notes.counts.items())},
        },
        at_most={**NOTHING_WRONG, **{f"{name}_gap_max_s": _GAP_S for name in faults}},
        at_least={"acknowledged": times, "versions": times},
    )


async def _kill_backends(database: LocalPostgresql, servers: list[ServerProcess]) -> None:
    everybody = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'fedtt'"
    await asyncio.to_thread(database.sql, everybody)


async def _crash(database: LocalPostgresql, servers: list[ServerProcess]) -> None:
    """As good as kill -9: it recovers from its log."""
    await asyncio.to_thread(database.stop, "immediate")
    await asyncio.to_thread(database.start)


async def _stop_a_server(stopped_s: float, database: LocalPostgresql, servers: list[ServerProcess]) -> None:
    """Whatever it holds just then, the other goes on; once back, it must not do what has been done."""
    servers[0], servers[1] = servers[1], servers[0]
    os.kill(servers[0].pid, signal.SIGSTOP)
    await asyncio.sleep(stopped_s)
    os.kill(servers[0].pid, signal.SIGCONT)


async def _acknowledge_more(notes: Notes) -> None:
    """Wait until the servers are at work."""
    before = len(notes.acknowledged)
    async with asyncio.timeout(_BACK_S):
        while len(notes.acknowledged) < before + 5:
            await asyncio.sleep(0.01)


async def _gap(notes: Notes, fault: Coroutine[Any, Any, None]) -> float:
    """The longest time without an acknowledgement from the beginning of a fault until they come again."""
    began = time.time()
    await fault
    await _acknowledge_more(notes)
    at = np.sort([began, *(moment for moment in notes.acknowledged_at.values() if moment > began)])
    return float(np.diff(at).max())
