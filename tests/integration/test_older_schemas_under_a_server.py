"""The schema goes back under a server: devices are told to wait, and it goes on once the schema is back."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import Connection

from benchmarks.faults.devices import devices
from benchmarks.faults.kill import NUMBERS, places
from benchmarks.faults.ledger import NOTHING_WRONG, audit
from benchmarks.faults.server import ServerProcess, task_text
from benchmarks.faults.tables import PostgresqlTables, SqliteTables, Tables
from storage.backend import open_backend
from storage.migrate import downgrade, newest_schema, upgrade
from storage.sql import change_schema
from tests.support.postgresql import needs_postgresql, server

pytestmark = pytest.mark.slow

DEVICES = 12
REFUSED = re.compile("the database failed|the ledger refuses")  #: as the server's log has it


def on_sqlite(data: Path) -> tuple[str | Path, Tables]:
    return data / "fedtt.db", SqliteTables(data / "fedtt.db")


def on_postgresql(_: Path) -> tuple[str | Path, Tables]:
    url = server().new_database()
    return url, PostgresqlTables(server(), url)


@pytest.mark.parametrize("place", [on_sqlite, pytest.param(on_postgresql, marks=needs_postgresql)])
async def test_devices_wait_out_an_older_schema_and_nothing_acknowledged_is_lost(
    place: Callable[[Path], tuple[str | Path, Tables]], tmp_path: Path
) -> None:
    data, log = tmp_path / "data", tmp_path / "server.log"
    database, tables = place(data)
    serving = ServerProcess(data, options=("--database", database) if isinstance(database, str) else ())
    over = asyncio.Event()
    async with serving.running(), devices(DEVICES, serving.url, NUMBERS) as (peers, notes):
        text = task_text(cohort=DEVICES, buffer=DEVICES // 2, quorum=1, deadline_s=2, give_up_after=10**6)
        await serving.open_task(text, NUMBERS)
        await asyncio.gather(*(peer.enroll(serving.token) for peer in peers))
        living = [asyncio.create_task(peer.live(over)) for peer in peers]
        for revision in (f"{int(newest_schema()) - 1:04}", "0005", "0001"):
            await until_more(20, lambda: len(notes.acknowledged))
            await asyncio.to_thread(change, database, partial(downgrade, revision=revision))
            await until_more(3, lambda: len(REFUSED.findall(log.read_text())))
            await asyncio.to_thread(change, database, partial(upgrade, where="the ledger"))
        await until_more(20, lambda: len(notes.acknowledged))
        over.set()
        await asyncio.gather(*living)
        await serving.stop()
        await serving.start()  # going back so far took people's tokens away; a start makes the first one anew
        await serving.end_task()
        await serving.stop()
    figures = audit(data, notes, places(peers), tables=tables).figures()
    assert {name: figures[name] for name in NOTHING_WRONG if figures[name]} == {}
    assert notes.wrong == []
    assert notes.counts["refused busy"] > 0
    assert "Traceback" not in log.read_text()


def change(database: str | Path, step: Callable[[Connection], None]) -> None:
    """Change the schema as a program of its own would."""
    backend = open_backend(database, busy_timeout_s=10.0)
    try:
        change_schema(backend, step)
    finally:
        backend.reader.dispose()
        backend.writer.dispose()


async def until_more(more: int, count: Callable[[], int]) -> None:
    before = count()
    async with asyncio.timeout(30):
        while count() < before + more:
            await asyncio.sleep(0.02)
