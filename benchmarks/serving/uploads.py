"""Durable signed updates a second: one or more server processes on one database, loaded from another."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil

from aggregator.lifecycle import Lifecycle
from aggregator.promised import promised
from benchmarks.faults.server import TASK, ServerProcess, on_one_port, task_text
from benchmarks.local_postgresql import LocalPostgresql, postgresql_binaries
from benchmarks.serving.load import Answers, Load, identity, lease_id
from benchmarks.serving.part import Measured, Part
from storage.records import MAIN, Device, DeviceState, Lease, LeaseState, UpdateState
from storage.sql import SqlStore

__all__ = [
    "CONNECTIONS",
    "Cpu",
    "give_leases",
    "postgresql",
    "postgresql_one_process",
    "postgresql_two_servers",
    "sqlite",
    "sqlite_one_process",
    "taken",
]

_NUMBERS = 10_000  #: in an update, a byte each
CONNECTIONS = 200
_PUT_AT_ONCE = 2000


class Cpu(NamedTuple):
    """CPU seconds."""

    servers_s: float
    database_s: float  #: of its processes that live when it is looked at; 0 where it has none


async def sqlite(part: Part) -> Measured:
    """As deployment.md sizes it for two cores: one server, with a process for each."""
    return await _on_sqlite(part, "sqlite", processes=2)


async def sqlite_one_process(part: Part) -> Measured:
    return await _on_sqlite(part, "sqlite_one_process")


async def postgresql(part: Part) -> Measured:
    return await _on_postgresql(part, "postgresql", processes=2)


async def postgresql_two_servers(part: Part) -> Measured:
    """Replicas of a process each, as many as one server's two."""
    return await _on_postgresql(part, "postgresql_two_servers", servers=2)


async def postgresql_one_process(part: Part) -> Measured:
    return await _on_postgresql(part, "postgresql_one_process")


async def _on_sqlite(part: Part, name: str, *, processes: int = 1) -> Measured:
    return await _measured(part, part.directory / "data" / "fedtt.db", name, processes=processes)


async def _on_postgresql(part: Part, name: str, *, servers: int = 1, processes: int = 1) -> Measured:
    binaries = postgresql_binaries()
    if binaries is None:
        return Measured(skipped="no initdb on this machine (Debian: apt install postgresql)")
    database = LocalPostgresql(binaries, durable=True)
    try:
        return await _measured(
            part,
            database.new_database(),
            name,
            servers=servers,
            processes=processes,
            database_pid=database.pid,
        )
    finally:
        database.close()


async def _measured(
    part: Part,
    database: str | Path,
    name: str,
    *,
    servers: int = 1,
    processes: int = 1,
    database_pid: int | None = None,
) -> Measured:
    updates = 2000 if part.quick else 15_000
    answers, cpu = await taken(
        part,
        database,
        name,
        updates=updates,
        servers=servers,
        processes=processes,
        database_pid=database_pid,
    )
    database_figures = (
        {f"database_cpu_us_per_update_{name}": round(1e6 * cpu.database_s / updates, 1)}
        if database_pid is not None
        else {}
    )
    return Measured(
        figures={
            f"durable_signed_updates_per_s_{name}": round(updates / answers.seconds, 1),
            f"p50_ms_{name}": round(answers.p50_ms, 1),
            f"p99_ms_{name}": round(answers.p99_ms, 1),
            f"server_cpu_us_per_update_{name}": round(1e6 * cpu.servers_s / updates, 1),
            f"load_cpu_us_per_update_{name}": round(1e6 * answers.cpu_s / updates, 1),
            **database_figures,
        },
        against={
            f"durable_signed_updates_per_s_{name}": f"{updates} updates of {answers.update_bytes} bytes, "
            f"each by a device of its own, over {CONNECTIONS} connections from a process on the same cores; "
            f"servers: {servers}, of {processes} process{'es' * (processes > 1)}"
        },
    )


async def taken(
    part: Part,
    database: str | Path,
    name: str,
    *,
    updates: int,
    connections: int = CONNECTIONS,
    servers: int = 1,
    processes: int = 1,
    database_pid: int | None = None,
) -> tuple[Answers, Cpu]:
    """So many updates, all acknowledged and in the ledger; and what that took.

    processes: of each server.
    """
    options = ("--database", database) if isinstance(database, str) else ()
    first = ServerProcess(part.directory / "data", options=options)
    async with first.running():
        await first.open_task(task_text("int8", cohort=updates + 1, deadline_s=3600), _NUMBERS)
        await first.stop()
    give_leases(database, updates)
    async with AsyncExitStack() as stack:
        data, options = part.directory / "data", (*options, "--processes", str(processes))
        alone = [ServerProcess(data, options=options)]
        running = alone if servers == 1 else on_one_port(data, servers, *options)
        for server in running:
            await stack.enter_async_context(server.running())
        load = Load(
            url=running[0].url, updates=updates, connections=connections, numbers=_NUMBERS, seed=part.seed
        )
        answers, cpu = await _send(load, [server.pid for server in running], database_pid)
    with closing(SqlStore.open(database)) as store, store.reading() as tx:
        durable = tx.count_updates(1, MAIN, 1, UpdateState.ACCEPTED)
    part.report.line(
        part=name, durable=durable, server_cpu_s=cpu.servers_s, **msgspec.structs.asdict(answers)
    )
    failed = updates - answers.statuses.get("200", 0)
    if failed or durable != updates:
        raise RuntimeError(f"{failed} of {updates} were not acknowledged, {durable} are in the ledger")
    return answers, cpu


def give_leases(database: str | Path, count: int) -> None:
    """So many devices of this program's key, each with a lease in the task's first round."""
    now = time.time()
    with closing(SqlStore.open(database)) as store:
        with store.transaction() as tx:
            task = promised(tx.task(TASK), "the task")
            round_ = promised(Lifecycle().ensure_round(tx, now, task), "its round")
        for start in range(0, count, _PUT_AT_ONCE):
            with store.transaction() as tx:
                for number in range(start, min(start + _PUT_AT_ONCE, count)):
                    device = identity(number)
                    tx.put_device(
                        Device(
                            id=device.device,
                            public_key=device.public_key,
                            client="benchmark",
                            runtimes=("onnxruntime",),
                            examples=50,
                            enrolled_at=now,
                            seen_at=now,
                            state=DeviceState.ACTIVE,
                        )
                    )
                    tx.put_lease(
                        Lease(
                            id=lease_id(number),
                            task_id=task.id,
                            branch=MAIN,
                            round_number=round_.number,
                            version_number=0,
                            device_id=device.device,
                            granted_at=now,
                            expires_at=now + 3600,
                            state=LeaseState.ACTIVE,
                        )
                    )


async def _send(load: Load, servers: Sequence[int], database_pid: int | None) -> tuple[Answers, Cpu]:
    """What was answered, and the CPU seconds that this took meanwhile."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.serving.load"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(msgspec.json.encode(load) + b"\n")
    await process.stdin.drain()
    await process.stdout.readline()
    before = _cpu(servers, database_pid)
    process.stdin.write(b"go\n")
    await process.stdin.drain()
    line = await process.stdout.readline()
    after = _cpu(servers, database_pid)
    await process.wait()
    taken = Cpu(after.servers_s - before.servers_s, after.database_s - before.database_s)
    return msgspec.json.decode(line, type=Answers), taken


def _cpu(servers: Sequence[int], database_pid: int | None) -> Cpu:
    database = [] if database_pid is None else psutil.Process(database_pid).children()
    return Cpu(_cpu_s(map(psutil.Process, servers)), _cpu_s(database))


def _cpu_s(processes: Iterable[psutil.Process]) -> float:
    """Of each and of all that descend from it."""
    all_of_them = [one for root in processes for one in (root, *root.children(recursive=True))]
    return float(sum(times.user + times.system for times in (one.cpu_times() for one in all_of_them)))
