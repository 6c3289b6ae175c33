"""Servers on PostgreSQL: named by the environment, and two of them on one that do nothing twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults.postgresql import shared
from benchmarks.faults.row import Setting
from benchmarks.faults.server import TASK, ServerProcess, task_text
from benchmarks.harness import Report
from tests.support.postgresql import needs_postgresql, server

STOPPED_S = 15.0


@needs_postgresql
@pytest.mark.slow
async def test_nothing_acknowledged_is_lost_or_folded_twice_when_database_or_server_fails(
    tmp_path: Path,
) -> None:
    setting = Setting(report=Report("faults", None), directory=tmp_path)
    outcome = await shared(setting, count=10, times=1, stopped_s=STOPPED_S)
    # how long it took says little while other tests run, but that one goes on while the other is stopped
    assert [failure for failure in outcome.failures if "gap_max_s" not in failure] == []
    assert float(outcome.figures["server_stopped_gap_max_s"]) < STOPPED_S
    assert outcome.skipped == ""


@needs_postgresql
async def test_a_server_process_finds_its_database_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server().new_database()
    monkeypatch.setenv("FEDTT_DATABASE", url)
    process = ServerProcess(tmp_path / "data")
    async with process.running():
        await process.open_task(task_text(), 20)
        await process.stop()
    assert server().sql("SELECT name FROM tasks", url.rpartition("/")[2]) == [(TASK,)]
    assert not list((tmp_path / "data").glob("fedtt.db*"))
