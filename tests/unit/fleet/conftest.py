"""A fleet file beside what it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.edge import write_small_bundle

FILE = """
bundle = "bundle"

[fleet]
devices = 20
seed = 4
trainer = "noop"

[data]
train = "train.jsonl"
partition = { kind = "dirichlet", alpha = 1.0 }

[task]
name = "lights"

[task.rounds]
count = 6
cohort = 8
buffer = 6
deadline_s = 60
retry_s = 20

[task.training]
local_steps = 2
batch_size = 4

[task.codec]
quantise = "int4"
error_feedback = true

[[profiles]]
name = "phone"
share = 3
speed_spread = 0.5
dropout = 0.2

[[profiles]]
name = "board"
up_bps = 1e5

[faults]
lost_answer = 0.1
corrupt = 0.05
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_small_bundle(tmp_path / "bundle", base_bytes=10)
    rows = [{"text": f"lights {n}", "label": n % 2, "user": f"u{n % 25}"} for n in range(200)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "fleet.toml").write_text(FILE)
    return tmp_path / "fleet.toml"
