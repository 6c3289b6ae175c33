"""Short versions of `python -m benchmarks.faults`: what a server process survives."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults.kill import killed
from benchmarks.faults.ledger import NOTHING_WRONG
from benchmarks.faults.row import Outcome, Setting
from benchmarks.harness import Report

pytestmark = pytest.mark.slow


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(report=Report("faults", None), directory=tmp_path, quick=True)


def wrong(outcome: Outcome) -> dict[str, float | int | str]:
    """The figures of an audit that should be zero and are not."""
    assert set(NOTHING_WRONG) <= set(outcome.figures)
    return {name: outcome.figures[name] for name in NOTHING_WRONG if outcome.figures[name] != 0}


async def test_a_server_killed_again_and_again_loses_and_doubles_nothing(setting: Setting) -> None:
    outcome = await killed(setting, count=12, kills=3, up_s=0.3)
    assert wrong(outcome) == {}
    assert int(outcome.figures["acknowledged"]) >= 3
    assert int(outcome.figures["unreachable"]) > 0
