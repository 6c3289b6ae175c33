"""Short versions of `python -m benchmarks.server`: real servers under its load, and what it makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness import Report
from benchmarks.serving import faults, uploads
from benchmarks.serving.part import Part
from tests.support.postgresql import needs_postgresql, server

pytestmark = pytest.mark.slow

UPDATES = 300


@pytest.fixture
def part(tmp_path: Path) -> Part:
    return Part(report=Report("server", None), directory=tmp_path, quick=True)


@pytest.mark.parametrize("processes", [1, 2])
async def test_all_updates_of_the_load_are_acknowledged_and_in_the_file(part: Part, processes: int) -> None:
    database = part.directory / "data" / "fedtt.db"
    answers, cpu = await uploads.taken(
        part, database, "sqlite", updates=UPDATES, connections=20, processes=processes
    )
    assert answers.statuses == {"200": UPDATES}
    assert 0 < answers.p50_ms <= answers.p99_ms
    assert answers.update_bytes > 10_000
    assert min(answers.seconds, answers.cpu_s, cpu.servers_s) > 0


@needs_postgresql
async def test_all_updates_of_the_load_are_acknowledged_by_two_servers_on_one_postgresql(part: Part) -> None:
    url, pid = server().new_database(), server().pid
    answers, cpu = await uploads.taken(
        part, url, "postgresql", updates=UPDATES, connections=20, servers=2, database_pid=pid
    )
    assert answers.statuses == {"200": UPDATES}
    assert min(cpu.servers_s, cpu.database_s) > 0


async def test_the_figures_of_a_fold_are_named_by_how_many_updates_there_were(part: Part) -> None:
    assert set((await faults.fold(part)).figures) == {"fold_2000_s"}


async def test_the_figures_of_a_herd_are_named_by_how_many_devices_there_were(part: Part) -> None:
    found = await faults.herd(part)
    if found.skipped:
        pytest.skip(f"SKIPPED: {found.skipped}")
    assert found.figures["checkins_1000_answered"] == 1000
