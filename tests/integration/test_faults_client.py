"""A short version of `python -m benchmarks.faults client`: real clients that are killed go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.faults.client import clients_killed
from benchmarks.faults.row import Setting
from benchmarks.harness import Report

ROWS = [
    json.dumps({"text": f"set the alarm for {word}", "label": "alarm"}) for word in ("seven", "nine", "noon")
]


@pytest.mark.slow
async def test_a_client_killed_in_each_phase_sends_what_it_would_have_sent_unharmed(
    tmp_path: Path, tiny_bundle: Path
) -> None:
    setting = Setting(report=Report("faults", None), directory=tmp_path)
    outcome = await clients_killed(setting, bundle=tiny_bundle, rows=ROWS, kills=10)
    # the bundle is smaller than what lies beside it, so the home's size says nothing about growth here
    assert [failure for failure in outcome.failures if "home_over_bundle_max" not in failure] == []
