"""`fedtt demo` as a process, on a tiny random encoder: everything real but the size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def fedtt(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "fedtt", *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_demo_trains_a_version_that_predicts(tiny_model: Path, tmp_path: Path) -> None:
    demo = fedtt(
        *("demo", "--model", str(tiny_model), "--dir", str(tmp_path / "demo"), "--json"),
        *("--rounds", "2", "--devices", "14"),
    )
    assert demo.returncode == 0, demo.stderr
    *rounds, outcome = [json.loads(line) for line in demo.stdout.splitlines()]
    assert [report["round"] for report in rounds] == [0, 1, 2]
    assert rounds[2]["updates"] >= 6
    assert outcome["rounds"] == 2
    assert outcome["devices"] == 14
    assert 0 <= outcome["accuracy_before"] <= 1
    assert 0 <= outcome["accuracy_after"] <= 1
    assert outcome["participations"] >= 12  # 2 rounds, at least 6 updates each
    assert outcome["uplink_bytes_per_participation"] > 100
    predicted = fedtt("predict", outcome["result"], "wake me at seven", "--json")
    assert predicted.returncode == 0, predicted.stderr
    label = json.loads(predicted.stdout)["label"]
    config = json.loads((Path(outcome["result"]) / "config.json").read_text())
    assert label in config["labels"]


def test_more_devices_than_people_is_refused_in_one_line(tmp_path: Path) -> None:
    demo = fedtt("demo", "--devices", "1000", "--dir", str(tmp_path))
    assert demo.returncode == 2
    assert demo.stderr.startswith("fedtt: error: --devices = 1000 is not allowed")
    assert demo.stderr.count("\n") == 1
